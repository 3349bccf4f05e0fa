"""Exported folders load where this package is not installed, with the same outputs, and natively where it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import bestrq2
from bestrq2.convert.hub import write_model
from bestrq2.convert.loading import load_encoder, load_pretraining
from bestrq2.errors import CheckpointError
from example_sounds import scene
from separate_environment import make_environment, run_there

VARIANTS = {
    "sincos": {},
    "rope": {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "position_embedding": "rope_2d"},
    "conformer": {
        "encoder_type": "conformer", "position_embedding": "relative", "objective": "one_stage", "patch_size": [80, 4],
        "num_mel_bands": 80, "n_fft": 400, "win_length": 400, "hop_length": 160, "mask_fill": "noise",
        "mask_ratio": [0.6, 0.6], "input_normalization": "clip",
        "conformer_channels": [8, 4], "conformer_kernel_size": 7,
    },
}  # fmt: skip
LENGTHS = (40_000, 26_000)


@pytest.fixture(scope="module")
def models(tiny_pretraining):
    return {name: tiny_pretraining(**changes) for name, changes in VARIANTS.items()}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, models):
    return models[request.param]


def clips() -> list[np.ndarray]:
    return [scene(length, seed) for seed, length in enumerate(LENGTHS)]


def half_hidden(model: bestrq2.BestRQ2ForPreTraining) -> torch.Tensor:
    return torch.arange(model.config.patch_rows * model.config.columns(LENGTHS[0])) % 2 == 0


# Runs where this package is missing: the encoder, both pipelines, the classifier, and pretraining.
PROGRAM = """
import importlib.util
import numpy as np
absent = [name for name in ("bestrq2", "lightning_fabric", "soundfile", "soxr") if importlib.util.find_spec(name)]
assert not absent, absent
import torch
from transformers import (
    AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, AutoModelForPreTraining, pipeline,
)
clips = [np.array(clip, dtype=np.float32) for clip in np.load(given["clips"]).values()]
kinds = {}
torch.set_grad_enabled(False)
for name, hidden in given["hidden"].items():
    place, results = given["folder"] + "/an.export-" + name, {}
    extractor = AutoFeatureExtractor.from_pretrained(place, trust_remote_code=True)
    model = AutoModel.from_pretrained(place, trust_remote_code=True).eval()
    batch = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    output = model(**batch)
    extract = pipeline("feature-extraction", model=place, trust_remote_code=True)
    several = extract([{"raw": clip, "sampling_rate": extractor.sampling_rate} for clip in clips], batch_size=2)
    results |= {"frames": output.last_hidden_state, "clips": output.pooler_output}
    results |= {"one": extract(clips[0], return_tensors=True)}
    results |= {f"several{index}": np.array(frames) for index, frames in enumerate(several)}
    classifier = AutoModelForAudioClassification.from_pretrained(place, num_labels=3, trust_remote_code=True).eval()
    classifier.save_pretrained(place + "-tuned")
    tuned = AutoModelForAudioClassification.from_pretrained(place + "-tuned", trust_remote_code=True).eval()
    results |= {"pooled": classifier.bestrq2(**batch).pooler_output, "logits": classifier(**batch).logits}
    results |= {"tuned": tuned(**batch).logits}
    whole = AutoModelForPreTraining.from_pretrained(place + "-whole", trust_remote_code=True).eval()
    loss = whole(torch.from_numpy(clips[0])[None], hidden_mask=torch.tensor(hidden)).loss
    np.savez(place + ".npz", loss=loss, **results)
    kinds[name] = type(model).__module__.split(".")[0]
print(json.dumps(kinds))
"""


@pytest.fixture(scope="module")
def elsewhere(models, tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """What the exported models give in a separate environment."""
    folder = tmp_path_factory.mktemp("separate")
    python = make_environment(folder / "venv", "torch", "transformers")
    for name, model in models.items():
        write_model(folder / f"an.export-{name}", model.base_model)
        write_model(folder / f"an.export-{name}-whole", model)
    np.savez(folder / "clips.npz", *clips())
    hidden = {name: half_hidden(model).tolist() for name, model in models.items()}
    given = {"folder": str(folder), "clips": str(folder / "clips.npz"), "hidden": hidden}
    kinds = run_there(python, PROGRAM, folder / "home", given)
    assert kinds == dict.fromkeys(VARIANTS, "transformers_modules")
    return {name: dict(np.load(folder / f"an.export-{name}.npz")) for name in VARIANTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_separate_environment_gives_the_same_outputs(name, models, elsewhere):
    model, found = models[name], elsewhere[name]
    with torch.no_grad():
        expected = model.base_model(**bestrq2.BestRQ2FeatureExtractor()(clips(), return_tensors="pt"))
        loss = model(torch.from_numpy(clips()[0])[None], hidden_mask=half_hidden(model)).loss
    np.testing.assert_allclose(found["frames"], expected.last_hidden_state, atol=1e-6)
    np.testing.assert_allclose(found["clips"], expected.pooler_output, atol=1e-6)
    np.testing.assert_allclose(found["loss"], loss, atol=1e-6)
    counts = expected.frame_attention_mask.sum(dim=1).tolist()
    assert counts[0] > counts[1]
    np.testing.assert_allclose(found["one"], expected.last_hidden_state[:1], atol=1e-5)
    for index, count in enumerate(counts):  # the padding of a batch is no frame
        frames = expected.last_hidden_state[index : index + 1, :count]
        np.testing.assert_allclose(found[f"several{index}"], frames, atol=1e-5)
    np.testing.assert_allclose(found["pooled"], expected.pooler_output, atol=1e-6)
    assert found["logits"].shape == (2, 3)
    np.testing.assert_array_equal(found["tuned"], found["logits"])


def test_an_exported_encoder_loads_natively(model, tmp_path):
    write_model(tmp_path, model.base_model)
    clip = clips()[0]
    expected = bestrq2.Embedder(model.base_model, "cpu").embed(clip)
    found = bestrq2.load(tmp_path, "cpu").embed(clip)
    np.testing.assert_allclose(found.frames, expected.frames, atol=1e-6)
    np.testing.assert_allclose(found.clip, expected.clip, atol=1e-6)
    assert not any(name.startswith(("predictor", "head", "quantizer")) for name in _weights(tmp_path))
    with pytest.raises(CheckpointError, match=r"holds an encoder without the rest.*exported with --with-predictor"):
        load_pretraining(tmp_path)


def test_an_export_with_predictor_loads_as_the_whole_model(model, tmp_path):
    write_model(tmp_path, model)
    whole, encoder = load_pretraining(tmp_path), load_encoder(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name


@pytest.mark.usefixtures("empty_folder")
def test_the_model_of_a_recipe_is_the_same_with_and_without_its_predictor():
    encoder, whole = load_encoder("demo"), load_pretraining("demo")
    for name, value in encoder.state_dict().items():
        assert torch.equal(whole.base_model.state_dict()[name], value), name


def test_exported_code_is_complete_and_needs_only_torch_and_transformers(tiny_encoder, tmp_path):
    write_model(tmp_path, tiny_encoder())
    config = json.loads((tmp_path / "config.json").read_text())
    impl = config["custom_pipelines"]["feature-extraction"]["impl"]
    modules = {entry.split(".")[0] for entry in [*config["auto_map"].values(), impl]}
    needed = {tmp_path / f"{module}.py" for module in modules}
    needed |= {Path(file) for module in modules for file in get_relative_import_files(tmp_path / f"{module}.py")}
    assert all(file.is_file() for file in needed)
    assert needed == set(tmp_path.glob("*.py"))
    outside = {name for file in needed for name in get_imports(file)}
    assert outside - sys.stdlib_module_names <= {"torch", "transformers", "numpy"}


def _weights(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))
