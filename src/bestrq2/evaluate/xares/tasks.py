"""Tasks of X-ARES: what the published averages count, the harness's task files, and the choice of a call."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from bestrq2.data.tar_labels import xares_rows
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.table import Table
from bestrq2.text import nearest

Method = Literal["mlp", "knn"]
Domain = Literal["speech", "music", "environment"]

METHODS: tuple[Method, ...] = ("mlp", "knn")
METHOD_TITLES: Mapping[str, str] = MappingProxyType({"mlp": "linear probe", "knn": "k-NN"})
DOMAINS: tuple[Domain, ...] = ("speech", "music", "environment")
FRAME_LEVEL = ("frame", "asr")
"""Kinds of tasks that use frames; the others use their mean."""

INSTALL = "the X-ARES harness is not installed: pip install 'bestrq2[xares]'"


@dataclass(frozen=True)
class PublicTask:
    """One task of X-ARES.

    Attributes:
        name: `TaskConfig.name` of the harness; also the folder of its data.
        title: name in tables.
        domain: domain by the model cards.
        paper_domain: domain by the paper; they differ for Vocal Imitation only.
        methods: methods that the harness scores.
        metric: the harness's name of the metric; scores are in 0..1, higher is better.
        entries: whether its scores are among the 37 entries of the model cards.
        paper: whether it is among the 21 datasets of the paper.
    """

    name: str
    title: str
    domain: Domain
    paper_domain: Domain
    methods: tuple[Method, ...]
    metric: str
    entries: bool
    paper: bool


def _public_tasks() -> Mapping[str, PublicTask]:
    tasks = {}
    for row in xares_rows():
        values: dict[str, Any] = {field.name: row[field.name] for field in fields(PublicTask)}
        values |= {name: row[name] == "yes" for name in ("entries", "paper")}
        tasks[row["name"]] = PublicTask(**values | {"methods": tuple(row["methods"].split())})
    return MappingProxyType(tasks)


TASKS = _public_tasks()
"""Tasks of xares 0.1.3 by name, from xares_tasks.csv; "nsynthinstument" is spelt as in the harness."""


@dataclass(frozen=True)
class TaskFile:
    """Description of a task file, before the task runs.

    Attributes:
        path: path of the file.
        name: the harness's name of the task, also the folder of its data; the name of a file that has an error.
        title: formal name.
        kind: "clip", "frame", "contrastive" or "asr".
        metric: metric of the linear probe.
        knn: whether k-NN is scored too.
        private: whether its data were never published.
        disabled: whether the harness skips it.
        zenodo: record of its data; None where they cannot be downloaded.
        error: why the file cannot be used; "" if it can.
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
        """All names by which `--tasks` may select it, in lower case."""
        stem = Path(self.path).stem
        return {name.lower() for name in (self.name, self.title, stem, stem.removesuffix("_task")) if name}


@dataclass(frozen=True)
class DataFolder:
    """Folder of the tasks' tars.

    Attributes:
        path: folder with one folder per task.
        download: whether the harness may download missing tasks into it.
        task_files: task files that came with the data.
    """

    path: Path
    download: bool
    task_files: tuple[Path, ...] = ()


def data_folder(data: Path | None, cache: Path) -> DataFolder:
    """The folder of tars that a call uses.

    Args:
        data: folder with one folder of tars per task, or one that holds such a folder as `env` and task files in
            `tasks`, as `bestrq2 soundworld --format xares` writes it; None for downloads.
        cache: folder of downloads.

    Raises:
        DataError: there is no such folder.
    """
    if data is None:
        return DataFolder(cache / "data", True)
    if not data.is_dir():
        raise DataError(f"{data}: there is no such folder; give one that holds a folder of tars for each task")
    own = tuple(sorted((data / "tasks").glob("*_task.py")))
    return DataFolder((data / "env" if (data / "env").is_dir() else data).absolute(), False, own)


def split_names(tasks: str | Sequence[str] | None) -> list[str] | None:
    """Split task names given as "a,b" or as a list; None for no choice.

    Raises:
        ConfigError: no name is given.
    """
    if tasks is None:
        return None
    listed = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in listed if name.strip()]
    if not names:
        raise ConfigError("tasks is empty; name some, such as esc50,gtzan, or leave it out for all")
    return names


def candidate_files(folder: DataFolder, wanted: Sequence[str] | None) -> list[str]:
    """Task files that may be selected: those given by path, those beside the data, and those of the harness.

    Raises:
        ConfigError: the harness is not installed.
    """
    try:
        files = importlib.metadata.files("xares") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(INSTALL) from error
    installed = sorted(
        Path(str(file.locate())) for file in files if file.parts[0] == "tasks" and file.name.endswith("_task.py")
    )
    by_path = [Path(name).absolute() for name in wanted or () if name.endswith(".py")]
    found = [*by_path, *(path.absolute() for path in folder.task_files), *installed]
    return [str(path) for path in dict.fromkeys(found)]


def select(described: Sequence[TaskFile], folder: DataFolder, wanted: Sequence[str] | None) -> list[TaskFile]:
    """Select tasks; by default all with public data, or all whose data are in the folder.

    Args:
        described: all tasks.
        folder: folder of the data.
        wanted: names, titles or paths of files; None for the default.

    Raises:
        ConfigError: there is no task of a name, or two have the same one.
        DataError: there is no data for any task.
    """
    if wanted is not None:
        chosen = [_named(name, described) for name in wanted]
    else:
        own = {str(path.absolute()) for path in folder.task_files}
        chosen = [task for task in described if task.path in own or _is_default(task, folder)]
        if not chosen:
            raise DataError(f"{folder.path}: holds no folder of a task, such as esc50; see bestrq2 xares --list")
    chosen = list({task.path: task for task in chosen}.values())
    names = [task.name for task in chosen]
    if double := sorted({name for name in names if names.count(name) > 1}):
        files = " and ".join(task.path for task in chosen if task.name == double[0])
        raise ConfigError(f"two tasks are called {double[0]!r}: {files}; leave one out")
    return chosen


def _is_default(task: TaskFile, folder: DataFolder) -> bool:
    """Whether a task of the harness runs without being named."""
    if not folder.download:
        return (folder.path / task.name).is_dir()
    known = TASKS.get(task.name)
    return not task.disabled and not task.private and (known is None or known.entries)


def _named(name: str, described: Sequence[TaskFile]) -> TaskFile:
    if name.endswith(".py"):
        return next(task for task in described if task.path == str(Path(name).absolute()))
    found = [task for task in described if name.lower() in task.names()]
    if not found:
        known = sorted({one for task in described for one in task.names()})
        raise ConfigError(f"there is no task {name!r}{nearest(name.lower(), known)}; see bestrq2 xares --list")
    return found[0]


def listing(described: Sequence[TaskFile], folder: DataFolder) -> str:
    """List all tasks: name, title, kind, scores, and the place of the data."""
    rows = [
        (task.name, task.title, task.kind, f"MLP ({task.metric}){', k-NN' if task.knn else ''}", _place(task, folder))
        for task in described
        if not task.error
    ]
    table = Table(("task", "title", "kind", "scores", "data"), tuple(rows), left=5)
    return "\n".join([table.text(width=None), *(task.error for task in described if task.error)])


def _place(task: TaskFile, folder: DataFolder) -> str:
    if any((folder.path / task.name).glob("*.tar")):
        return str(folder.path / task.name)
    if task.private or not task.zenodo:
        return "not public"
    return f"zenodo.org/records/{task.zenodo}"


def describe(path: str) -> dict[str, Any]:
    """Describe a task file as the fields of `TaskFile`; an error in the file becomes its `error`.

    It runs the file, which imports the harness: call it in a worker process, as `load_task` and `task_config`.
    """
    try:
        config = load_task(Path(path))(None)
        return asdict(
            TaskFile(
                path, str(config.name), str(config.formal_name), config.task_type, str(config.metric),
                bool(config.do_knn), bool(config.private), bool(config.disabled), config.zenodo_id,
            )
        )  # fmt: skip
    except DataError as error:
        reason = str(error)
    except BaseException as error:  # a file may do anything, even call sys.exit
        reason = _error_in(Path(path), error)
    return asdict(TaskFile(path, Path(path).stem.removesuffix("_task"), error=reason))


def load_task(path: Path) -> Callable[[Any], Any]:
    """Load the `*_config` function of a task file.

    Raises:
        DataError: the file cannot be run, or defines none or several of them.
    """
    spec = importlib.util.spec_from_file_location(f"xares_task_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise DataError(f"{path}: there is no such task file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.absolute())
    sys.path.append(folder)  # for imports of files beside it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise DataError(_error_in(path, error)) from error
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
    found = [name for name in vars(module) if name.endswith("_config")]
    if len(found) != 1:
        raise DataError(f"{path}: should define one function whose name ends in _config, found {len(found)}")
    function: Callable[[Any], Any] = getattr(module, found[0])
    return function


def task_config(path: Path, encoder: Any) -> Any:
    """The harness's `TaskConfig` of a task for an encoder.

    Raises:
        DataError: the function fails, or the task's name is not a folder name.
    """
    function = load_task(path)
    try:
        config = function(encoder)
        name = config.name
    except Exception as error:
        raise DataError(_error_in(path, error)) from error
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise DataError(f"{path}: the task is called {name!r}; its name must be that of a folder")
    return config


def file_digest(path: Path) -> str:
    """Digest of a task file's text."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _error_in(path: Path, error: BaseException) -> str:
    """One sentence on an error in a task file, with the last line of it that ran."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    place = f"{path}, line {line}" if line else str(path)
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{place}: the task file has an error ({type(error).__name__}{f': {message}' if message else ''})"
