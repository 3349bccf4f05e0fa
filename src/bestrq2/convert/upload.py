"""Uploading a model folder to the Hugging Face hub, with one sentence for whatever it answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bestrq2.errors import BestRQ2Error, ConfigError


def check_upload(repository: str) -> None:
    """Say before the work that it could not be uploaded.

    Raises:
        ConfigError: if the name is none, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"'{repository}' is no name on the hub ({_first_line(error)}); write USER/MODEL") from error
    if repository.count("/") != 1:
        raise ConfigError(f"'{repository}' is no name on the hub: it lacks its owner; write USER/{repository}")
    if get_token() is None:
        raise ConfigError(f"{repository}: there is no token for the hub; run `hf auth login` or set HF_TOKEN")


def upload(folder: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Upload all files of a folder in one commit; repository and branch are made where they are missing.

    Args:
        folder: to upload.
        repository: "USER/MODEL".
        private: whether a new repository is private; an existing one stays as it is.
        revision: branch to upload to; None for the main one.

    Returns:
        URL of the model.

    Raises:
        ConfigError: as `check_upload`, or if the hub refuses the token or the write.
        BestRQ2Error: if the hub cannot be reached or fails.
    """
    check_upload(repository)
    from huggingface_hub import HfApi

    api = HfApi(library_name="bestrq2")
    with _explained(repository, api.endpoint):
        url = api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message="Upload by bestrq2 push"
        )
    return str(url)


@contextmanager
def _explained(repository: str, endpoint: str) -> Iterator[None]:
    """One sentence for what the hub's client raises in this block."""
    # HTTPError is that of the client's own transport, which differs between its versions.
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"{repository}: the hub's client is offline (HF_HUB_OFFLINE is set); unset it") from error
    except HfHubHTTPError as error:
        raise _refusal(repository, error.response.status_code, error.server_message or _first_line(error)) from error
    except ValueError as error:  # the metadata of the card, which the hub checks first
        raise ConfigError(f"{repository}: the hub refuses the model card ({' '.join(str(error).split())})") from error
    except (HTTPError, ConnectionError) as error:
        raise BestRQ2Error(
            f"{repository}: {endpoint} cannot be reached ({_first_line(error)}); check the network and push again"
        ) from error


def _refusal(repository: str, status: int, message: str) -> BestRQ2Error:
    said = f"the hub said {status}: {' '.join(message.split()).rstrip('.')}"
    if status == 401:
        return ConfigError(f"{repository}: the token is not valid ({said}); run `hf auth login` again or set HF_TOKEN")
    if status in (403, 404):
        return ConfigError(
            f"{repository}: the token may not write there ({said}); take one with write access, or another owner"
        )
    if status < 500:
        return ConfigError(f"{repository}: was refused ({said})")
    return BestRQ2Error(f"{repository}: the hub failed ({said}); push again later")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
