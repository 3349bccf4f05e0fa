"""Model folders that travel: weights, configuration and the code of `model/`, so that transformers alone loads them."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from bestrq2.convert.weights import quiet_hub
from bestrq2.files import write_text
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.feature_extraction_bestrq2 import BestRQ2FeatureExtractor
from bestrq2.model.modeling_bestrq2 import BestRQ2ForAudioClassification, BestRQ2ForPreTraining, BestRQ2Model

_AUTO_CLASSES: dict[str, type] = {
    "AutoConfig": BestRQ2Config,
    "AutoFeatureExtractor": BestRQ2FeatureExtractor,
    "AutoModel": BestRQ2Model,
    "AutoModelForAudioClassification": BestRQ2ForAudioClassification,
}
# By name, because importing it takes all pipelines of transformers along.
_PIPELINE = "pipeline_bestrq2.BestRQ2FeatureExtractionPipeline"


def write_model(folder: Path, model: BestRQ2Model | BestRQ2ForPreTraining | BestRQ2ForAudioClassification) -> None:
    """Write a model so that `from_pretrained(folder, trust_remote_code=True)` needs torch and transformers only.

    Args:
        folder: made if missing. It gets `model.safetensors` (or shards with their index), `config.json`,
            `preprocessor_config.json` and the Python files of `bestrq2.model`.
        model: the encoder alone, the whole pretraining model, or a classifier.

    Raises:
        OSError: if something cannot be written.
    """
    classes = dict(_AUTO_CLASSES)
    if isinstance(model, BestRQ2ForPreTraining):
        classes["AutoModelForPreTraining"] = BestRQ2ForPreTraining
    auto_map = {auto: f"{one.__module__.rpartition('.')[2]}.{one.__name__}" for auto, one in classes.items()}
    with quiet_hub():
        model.save_pretrained(folder)
        BestRQ2FeatureExtractor(sampling_rate=model.config.sampling_rate).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read them
    _amend(
        folder / "config.json",
        auto_map=auto_map,
        custom_pipelines={"feature-extraction": {"impl": _PIPELINE, "pt": ["AutoModel"]}},
    )
    _amend(folder / "preprocessor_config.json", auto_map={"AutoFeatureExtractor": auto_map["AutoFeatureExtractor"]})
    with resources.as_file(resources.files("bestrq2.model")) as code:
        for file in code.glob("*.py"):
            if file.name != "__init__.py":
                shutil.copyfile(file, folder / file.name)


def _amend(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps({**content, **fields}, indent=2, sort_keys=True) + "\n")
