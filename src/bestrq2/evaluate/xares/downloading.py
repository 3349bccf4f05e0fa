"""Data of the public tasks, downloaded by the harness from Zenodo."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bestrq2.convert.weights import first_line
from bestrq2.data.tar_labels import MARKER
from bestrq2.errors import BestRQ2Error, DataError
from bestrq2.files import folder_lock


def download(config: Any, data: Path) -> None:
    """Download and unpack the audio of a task, unless it is there; runs in a process of the harness.

    Args:
        config: the harness's `TaskConfig`.
        data: folder in which the task has a folder.

    Raises:
        DataError: the task has no public data, or they cannot be downloaded.
        ConfigError: another process downloads them.
    """
    folder = data / config.name
    if (folder / MARKER).exists():
        return
    if config.private or not config.zenodo_id:
        raise DataError(f"its data are not public; put their tars into {folder} and name {data} in --data")
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{config.zenodo_id}.zip"
    with folder_lock(folder), _temporary_files(folder / ".partial"):
        try:
            _by_harness(config, data)
        except zipfile.BadZipFile as error:
            archive.unlink(missing_ok=True)
            raise DataError(
                f"{archive}: what Zenodo sent is no whole archive, and is deleted; run the command again later"
            ) from error
        except BestRQ2Error:
            raise
        except Exception as error:  # of requests, of the disk, of unpacking
            raise DataError(
                f"record {config.zenodo_id} of Zenodo cannot be downloaded ({_reason(error)}); run the command again "
                f"later, or put its tars into {folder} and name {data} in --data"
            ) from error


def harness_task(config: Any) -> Any:
    """The harness's `XaresTask` of a configuration; for some it fetches a tokenizer or a language model.

    Raises:
        DataError: that cannot be fetched.
    """
    from xares.task import XaresTask

    needed = ", ".join(config.pretrained_dependencies or ())
    try:
        return XaresTask(config)
    except Exception as error:
        if not needed:
            raise
        raise DataError(
            f"the task needs {needed}, which cannot be fetched from the Hugging Face hub ({first_line(error)})"
        ) from error


def _by_harness(config: Any, data: Path) -> None:
    config.env_root = data
    harness_task(config).download_audio_tar()


def _reason(error: Exception) -> str:
    """What went wrong; errors of a connection repeat the address and more."""
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ in ("ConnectionError", "Timeout"):
        return "zenodo.org cannot be reached"
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _temporary_files(folder: Path) -> Iterator[None]:
    """Let temporary files of this process lie in a new folder.

    The harness downloads to the temporary folder of the machine under the number of the record, which two tasks may
    share, and continues what it finds there, although Zenodo packs an archive anew each time.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
