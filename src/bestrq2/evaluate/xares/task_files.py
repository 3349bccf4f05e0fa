"""The harness's task files: which there are, and what each asks.

`describe` and `load_task` run a task file, which imports the harness; they belong in a process of the harness.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.xares.identity import INSTALL

FRAME_LEVEL = ("frame", "asr")


@dataclass(frozen=True)
class TaskFile:
    """What is known of a task before it is run.

    Attributes:
        path: of its file.
        name: the harness's name of it, also that of the folder of its data; that of the file where it has an error.
        title: its formal name.
        kind: "clip", "frame", "contrastive" or "asr".
        metric: of the MLP.
        knn: whether k-NN is scored too.
        private: whether its data were never published.
        disabled: whether the harness passes it over.
        zenodo: record of its data; None where they cannot be downloaded.
        error: why the file is of no use; "" for none.
    """

    path: str
    name: str
    title: str = ""
    kind: str = "clip"
    metric: str = ""
    knn: bool = False
    private: bool = False
    disabled: bool = False
    zenodo: str | None = None
    error: str = ""

    def names(self) -> set[str]:
        """All by which `--tasks` may ask for it, in lower case."""
        stem = Path(self.path).stem
        return {name.lower() for name in (self.name, self.title, stem, stem.removesuffix("_task")) if name}


def installed_task_files() -> list[Path]:
    """The harness's own task files, which its package installs as `tasks/*_task.py`.

    Raises:
        ConfigError: the harness is not installed.
    """
    try:
        files = importlib.metadata.files("xares") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(INSTALL) from error
    own = [file for file in files if file.parts[0] == "tasks" and file.name.endswith("_task.py")]
    return sorted(Path(str(file.locate())) for file in own)


def describe(path: str) -> dict[str, Any]:
    """A `TaskFile` as plain JSON types; what is wrong with the file becomes its `error`."""
    try:
        config = load_task(Path(path))(None)
        return asdict(
            TaskFile(
                path, str(config.name), str(config.formal_name), config.task_type, str(config.metric),
                bool(config.do_knn), bool(config.private), bool(config.disabled), config.zenodo_id,
            )
        )  # fmt: skip
    except DataError as error:
        return asdict(TaskFile(path, Path(path).stem.removesuffix("_task"), error=str(error)))
    except BaseException as error:  # anything may be in a file, even a call of sys.exit
        return asdict(TaskFile(path, Path(path).stem.removesuffix("_task"), error=_where(Path(path), error)))


def load_task(path: Path) -> Callable[[Any], Any]:
    """The `*_config` function of a task file.

    Raises:
        DataError: the file cannot be run, or has none or several of them.
    """
    spec = importlib.util.spec_from_file_location(f"xares_task_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise DataError(f"{path}: there is no such task file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.absolute())
    sys.path.append(folder)  # for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise DataError(_where(path, error)) from error
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
    found = [name for name in vars(module) if name.endswith("_config")]
    if len(found) != 1:
        raise DataError(f"{path}: should define one function whose name ends in _config, found {len(found)}")
    function: Callable[[Any], Any] = getattr(module, found[0])
    return function


def checked_config(path: Path, encoder: Any) -> Any:
    """The `TaskConfig` of a task for an encoder.

    Raises:
        DataError: the function fails, or the name it gives is no name of a folder.
    """
    function = load_task(path)
    try:
        config = function(encoder)
        name = config.name
    except Exception as error:
        raise DataError(_where(path, error)) from error
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise DataError(f"{path}: the task is called {name!r}; its name must be that of a folder")
    return config


def file_digest(path: Path) -> str:
    """Digest of a task file's text."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _where(path: Path, error: BaseException) -> str:
    """One sentence on an error in a task file, with the last line of it that ran."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    place = f"{path}, line {line}" if line else str(path)
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{place}: the task file has an error ({type(error).__name__}{f': {said}' if said else ''})"
