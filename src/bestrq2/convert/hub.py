"""Model folders in hub format, and their upload to the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from bestrq2.convert.weights import first_line, quiet_hub
from bestrq2.errors import BestRQ2Error, ConfigError
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
# By name, because importing it would import all pipelines of transformers.
_PIPELINE = "pipeline_bestrq2.BestRQ2FeatureExtractionPipeline"


def write_model(folder: Path, model: BestRQ2Model | BestRQ2ForPreTraining | BestRQ2ForAudioClassification) -> None:
    """Write a model and its code, for `from_pretrained(folder, trust_remote_code=True)` without this package.

    Args:
        folder: created if missing. It gets `model.safetensors` (or shards with their index), `config.json`,
            `preprocessor_config.json` and the Python files of `bestrq2.model`.
        model: the encoder alone, the whole pretraining model, or a classifier.

    Raises:
        OSError: if a file cannot be written.
    """
    classes = dict(_AUTO_CLASSES)
    if isinstance(model, BestRQ2ForPreTraining):
        classes["AutoModelForPreTraining"] = BestRQ2ForPreTraining
    auto_map = {auto: f"{one.__module__.rpartition('.')[2]}.{one.__name__}" for auto, one in classes.items()}
    with quiet_hub():
        model.save_pretrained(folder)
        BestRQ2FeatureExtractor(sampling_rate=model.config.sampling_rate).save_pretrained(folder)
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


def check_upload(repository: str) -> None:
    """Check, before a model is exported, that it can be uploaded.

    Raises:
        ConfigError: for an invalid name, or if there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        said = first_line(error).rstrip(".")
        raise ConfigError(f"'{repository}' is not a name on the hub ({said}); write USER/MODEL") from error
    if repository.count("/") != 1:
        raise ConfigError(f"'{repository}' is not a name on the hub: it lacks its owner; write USER/{repository}")
    if get_token() is None:
        raise ConfigError(f"{repository}: there is no token for the hub; run `hf auth login` or set HF_TOKEN")


def upload(folder: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Upload all files of a folder in one commit; repository and branch are created where they are missing.

    Args:
        folder: folder to upload.
        repository: "USER/MODEL".
        private: create a missing repository as private; an existing one stays as it is.
        revision: branch to upload to; None for the main branch.

    Returns:
        URL of the model.

    Raises:
        ConfigError: if the hub refuses the token or the write.
        BestRQ2Error: if the hub cannot be reached or fails.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="bestrq2")
    with _hub_errors(repository, api.endpoint):
        url = api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message="Upload by bestrq2 push"
        )
    return str(url)


@contextmanager
def _hub_errors(repository: str, endpoint: str) -> Iterator[None]:
    """Turn the errors of the hub's client in this block into one sentence."""
    # HTTPError is the error of the client's transport, which differs between its versions.
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"{repository}: the hub's client is offline (HF_HUB_OFFLINE is set); unset it") from error
    except HfHubHTTPError as error:
        answer = f"{error.response.status_code}: {' '.join((error.server_message or first_line(error)).split())}"
        raise _refusal(repository, error.response.status_code, answer.rstrip(".")) from error
    except ValueError as error:  # the metadata of the card, which the client checks first
        raise ConfigError(f"{repository}: the hub refuses the model card ({' '.join(str(error).split())})") from error
    except (HTTPError, ConnectionError) as error:
        said = first_line(error).rstrip(".")
        raise BestRQ2Error(
            f"{repository}: {endpoint} cannot be reached ({said}); check the network and push again"
        ) from error


def _refusal(repository: str, status: int, answer: str) -> BestRQ2Error:
    said = f"the hub answered {answer}"
    if status == 401:
        return ConfigError(f"{repository}: the token is not valid ({said}); run `hf auth login` again or set HF_TOKEN")
    if status in (403, 404):
        return ConfigError(
            f"{repository}: the token may not write there ({said}); use one with write access, or another owner"
        )
    if status < 500:
        return ConfigError(f"{repository}: was refused ({said})")
    return BestRQ2Error(f"{repository}: the hub failed ({said}); push again later")
