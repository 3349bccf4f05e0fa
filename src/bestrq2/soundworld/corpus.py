"""SoundWorld in bulk: clips generated on all cores and cached as arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from bestrq2.child_processes import available_cpus, become_worker
from bestrq2.errors import DataError
from bestrq2.files import cache_folder, whole_file
from bestrq2.progress import Progress
from bestrq2.soundworld import speech
from bestrq2.soundworld.acoustics import SAMPLE_RATE
from bestrq2.soundworld.clips import TASKS, TaskSpec, clip, label_of, presence_events, render

VERSION = "2"
"""Version of the audio, part of the name of every cached file: raise it whenever the audio changes."""

_CHUNK = 8  # clips that a worker generates before it reports


@dataclass(frozen=True)
class Series:
    """An endless series of clips: the unlabelled ones, or one split of a task.

    Attributes:
        seed: random seed of the world.
        seconds: length of each clip.
        task: name of the task; "" for unlabelled clips.
        split: "train" or "test"; "" for unlabelled clips.
    """

    seed: int
    seconds: float
    task: str = ""
    split: str = ""

    @property
    def samples(self) -> int:
        """Samples per clip."""
        return round(self.seconds * SAMPLE_RATE)

    def clip(self, index: int) -> np.ndarray:
        """Generate one clip: float32 [samples]."""
        if self.task:
            return render(self.task, self.split, self.seed, index)
        return clip(self.seed, index, self.seconds)

    def stem(self) -> str:
        """Name of the cached file without its count; it holds everything that the audio depends on."""
        what = f"{self.task.replace('/', '-')}-{self.split}" if self.task else "unlabelled"
        return f"soundworld-v{VERSION}-{speech.synthesiser()}-{what}-seed{self.seed}-{self.seconds:g}s"


class Waveforms(Sequence[np.ndarray]):
    """Waveforms stored as 16-bit integers and read one at a time, as float32 [samples] between -1 and 1.

    Args:
        stored: int16 [clips, samples].
    """

    def __init__(self, stored: np.ndarray) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return len(self.stored)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        """One waveform, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self.stored[index].astype(np.float32) / np.float32(32768.0)


class Split(NamedTuple):
    """One split of a task.

    Attributes:
        audio: float32 waveforms [samples] at 16 kHz.
        labels: int64 [clips], class indices; of a frame task float64 [events, 2] for each clip, onsets and offsets in
            seconds.
    """

    audio: Waveforms
    labels: np.ndarray | list[np.ndarray]


def unlabelled(
    count: int,
    seed: int = 0,
    seconds: float = 10.0,
    cache: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Unlabelled clips of a world, generated once and cached.

    Args:
        count: number of clips; a larger number begins with the same clips.
        seed: random seed of the world.
        seconds: length of each clip.
        cache: folder; None for $BESTRQ2_CACHE or ~/.cache/bestrq2.
        workers: processes; None for one per core.
        progress: show progress.

    Returns:
        int16 [count, samples] at 16 kHz, read-only, mapped from the cached file.

    Raises:
        DataError: the cache cannot be written, or `count` or `seconds` is not positive.
    """
    return generate([(Series(seed, seconds), count)], cache, workers, progress)[0]


def generated_tasks(
    names: Sequence[str] | None = None,
    train: int = 400,
    test: int = 200,
    seed: int = 0,
    cache: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> list[tuple[TaskSpec, Split, Split]]:
    """Labelled tasks, generated once, in one pool of processes, and cached.

    Args:
        names: keys of `TASKS`; None for all.
        train: clips in the training split; classes differ by at most one clip.
        test: clips in the test split, from seeds disjoint from training and pretraining.
        seed: random seed of the world.
        cache: folder; None for $BESTRQ2_CACHE or ~/.cache/bestrq2.
        workers: processes; None for one per core.
        progress: show progress.

    Returns:
        For each name the task with its training and its test split.

    Raises:
        DataError: a name is unknown, a count is not positive, or the cache cannot be written.
    """
    specs = [_spec(name) for name in (tuple(TASKS) if names is None else names)]
    splits = (("train", train), ("test", test))
    requests = [(Series(seed, spec.seconds, spec.name, split), count) for spec in specs for split, count in splits]
    arrays = iter(generate(requests, cache, workers, progress))
    result = []
    for spec in specs:
        first, second = (Split(Waveforms(next(arrays)), _labels(spec, split, seed, count)) for split, count in splits)
        result.append((spec, first, second))
    return result


def _spec(name: str) -> TaskSpec:
    if name not in TASKS:
        raise DataError(f"SoundWorld has no task {name!r}; it has {', '.join(TASKS)}")
    return TASKS[name]


def _labels(spec: TaskSpec, split: str, seed: int, count: int) -> np.ndarray | list[np.ndarray]:
    if spec.kind == "frame":
        return [presence_events(seed, split, index, spec.seconds) for index in range(count)]
    return np.array([label_of(spec, index) for index in range(count)], dtype=np.int64)


def to_int16(wave: np.ndarray) -> np.ndarray:
    """Quantise a wave to int16 by rounding; samples beyond [-1, 1] are clipped."""
    return np.minimum(np.round(np.clip(wave, -1.0, 1.0) * 32768.0), 32767).astype(np.int16)


# The cache


def generate(
    requests: Sequence[tuple[Series, int]], cache: Path | None, workers: int | None, progress: bool
) -> list[np.ndarray]:
    """The first clips of several series, from the cache; missing ones are generated in one pool.

    Args:
        requests: pairs of a series and the number of its clips that are wanted.
        cache: folder; None for the default one.
        workers: processes; None for one per core.
        progress: show progress.

    Returns:
        For each request int16 [count, samples], read-only, mapped from the cached file.

    Raises:
        DataError: the cache cannot be written, or a count or length is not positive.
    """
    for series, count in requests:
        if count < 1 or series.samples < 1600:
            raise DataError(
                f"SoundWorld was asked for {count} clips of {series.seconds:g} s; at least 1 clip of 0.1 s is required"
            )
    folder = cache_folder(cache)
    missing = [(series, count) for series, count in requests if _cached(series, count, folder) is None]
    try:
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            _fill(missing, folder, workers, progress)
    except OSError as error:
        raise DataError(
            f"SoundWorld cannot be cached in {folder} ({error.strerror or error}); "
            "free space there or set BESTRQ2_CACHE to another folder"
        ) from error
    arrays = []
    for series, count in requests:
        path = _cached(series, count, folder)
        if path is None:
            raise DataError(f"the cached SoundWorld in {folder} vanished while it was being read; run again")
        arrays.append(np.load(path, mmap_mode="r")[:count])
    return arrays


def _cached(series: Series, count: int, folder: Path) -> Path | None:
    """The smallest whole cached file with at least `count` clips of a series."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(f"{series.stem()}-n*.npy"):
        with suppress(ValueError):
            found.append((int(path.stem.rpartition("-n")[2]), path))
    for size, path in sorted(found):
        if size >= count:
            with suppress(ValueError, OSError):
                if np.load(path, mmap_mode="r").shape == (size, series.samples):
                    return path
    return None


def _fill(missing: Sequence[tuple[Series, int]], folder: Path, workers: int | None, progress: bool) -> None:
    """Generate cached files; each appears under its name when it is whole."""
    jobs: list[tuple] = []
    with ExitStack() as stack:
        for series, count in missing:
            part = stack.enter_context(whole_file(folder / f"{series.stem()}-n{count}.npy"))
            _reserve(part, (count, series.samples))
            jobs += [(series, at, min(at + _CHUNK, count), str(part)) for at in range(0, count, _CHUNK)]
        run_parallel(_render_rows, jobs, sum(count for _, count in missing), workers, progress)


def _reserve(path: Path, shape: tuple[int, int]) -> None:
    """Create an array file with its space on disk allocated, so that a full disk is an error here, not a crash."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.int16, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _render_rows(series: Series, start: int, stop: int, path: str) -> int:
    stored = np.load(path, mmap_mode="r+")
    for index in range(start, stop):
        stored[index] = to_int16(series.clip(index))
    stored.flush()
    return stop - start


# The pool


def run_parallel(
    work: Callable[..., int], jobs: Sequence[tuple], total: int, workers: int | None, progress: bool
) -> None:
    """Run jobs in processes and show their progress in clips.

    Args:
        work: module-level function that returns the number of clips it made.
        jobs: arguments of `work`, one tuple per call.
        total: number of clips of all jobs together.
        workers: processes; None for one per core.
        progress: show progress.
    """
    speech.notice_missing_synthesiser()
    with Progress("SoundWorld", total, "clips", shown=progress) as shown:
        for done in _results(work, jobs, available_cpus() if workers is None else workers):
            shown.advance(done)


def _results(work: Callable[..., int], jobs: Sequence[tuple], workers: int) -> Iterator[int]:
    if workers <= 1 or len(jobs) <= 1:
        yield from (work(*job) for job in jobs)
        return
    # Forked workers start at once and need no `if __name__ == "__main__"` in the caller's script.
    method = "fork" if sys.platform == "linux" and "fork" in get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=get_context(method), initializer=become_worker, initargs=(os.getpid(),)
    )
    try:
        for future in as_completed([pool.submit(work, *job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
