"""Which tasks a call is about, and what is known of them before they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bestrq2 import flags
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.xares.entries import TASKS
from bestrq2.evaluate.xares.task_files import TaskFile, installed_task_files


@dataclass(frozen=True)
class DataFolder:
    """Where the tars of tasks lie.

    Attributes:
        path: folder with a folder a task.
        download: whether the harness may put there what is missing.
        task_files: those that came with the data.
    """

    path: Path
    download: bool
    task_files: tuple[Path, ...] = ()


def data_folder(data: Path | None, cache: Path) -> DataFolder:
    """The tars at hand, or the folder of downloads.

    Args:
        data: a folder with a folder of tars a task, or one that holds such a folder as `env`, with task files in
            `tasks`, as `bestrq2 soundworld --format xares` writes it; None for downloads.
        cache: where downloads are kept.

    Raises:
        DataError: there is no such folder.
    """
    if data is None:
        return DataFolder(cache / "data", True)
    if not data.is_dir():
        raise DataError(f"{data}: there is no such folder; give one that holds a folder of tars for each task")
    own = tuple(sorted((data / "tasks").glob("*_task.py")))
    return DataFolder((data / "env" if (data / "env").is_dir() else data).absolute(), False, own)


def candidate_files(folder: DataFolder, wanted: Sequence[str] | None) -> list[str]:
    """Task files that may be meant: those that are asked for by path, those beside the data, the harness's own."""
    by_path = [Path(name).absolute() for name in wanted or () if name.endswith(".py")]
    found = [*by_path, *(path.absolute() for path in folder.task_files), *installed_task_files()]
    return [str(path) for path in dict.fromkeys(found)]


def select(described: Sequence[TaskFile], folder: DataFolder, wanted: Sequence[str] | None) -> list[TaskFile]:
    """The tasks that are asked for; by default all with public data, or all whose data are at hand.

    Args:
        described: all there are.
        folder: of the data.
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


def split_names(tasks: str | Sequence[str] | None) -> list[str] | None:
    """Names given as "a,b" or as a list.

    Raises:
        ConfigError: there is none.
    """
    if tasks is None:
        return None
    listed = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in listed if name.strip()]
    if not names:
        raise ConfigError("tasks is empty; name some, such as esc50,gtzan, or leave it out for all")
    return names


def _is_default(task: TaskFile, folder: DataFolder) -> bool:
    """Whether a task of the harness itself runs without being named."""
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
        raise ConfigError(f"there is no task {name!r}{flags.nearest(name.lower(), known)}; see bestrq2 xares --list")
    return found[0]


def listing(described: Sequence[TaskFile], folder: DataFolder) -> str:
    """All tasks as a table: name, title, kind, what is scored, and where the data are."""
    rows = [("task", "title", "kind", "scores", "data")]
    rows += [
        (task.name, task.title, task.kind, _methods(task), _place(task, folder)) for task in described if not task.error
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(task.error for task in described if task.error)])


def _methods(task: TaskFile) -> str:
    return f"MLP ({task.metric})" + (", k-NN" if task.knn else "")


def _place(task: TaskFile, folder: DataFolder) -> str:
    if any((folder.path / task.name).glob("*.tar")):
        return str(folder.path / task.name)
    if task.private or not task.zenodo:
        return "not public"
    return f"zenodo.org/records/{task.zenodo}"


def from_json(values: Sequence[dict[str, Any]]) -> list[TaskFile]:
    """What workers describe."""
    return [TaskFile(**one) for one in values]
