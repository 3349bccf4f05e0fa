"""One pass over a corpus: the parts of a job made by this process, by several processes, or on a Ray cluster.

`embed`, `predict`, `prepare` and `prepare --check` are `CorpusJob`s (`parts`). Worker processes read recordings in
spans of some minutes (`spans`); the job turns spans into parts, tables of rows for neighbouring recordings; a
`PartsFolder` keeps finished parts, so that a killed job continues after them. Processes started by torchrun and actors
of Ray Data make the same parts: a part depends on the recordings alone, not on where it is made.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bestrq2.child_processes import available_cpus
from bestrq2.data.parts import ALONE, CorpusJob, Part, PartsFolder, Process, Result
from bestrq2.data.spans import Span, SpanStream, Stretch
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.progress import Progress

logger = logging.getLogger(__name__)

# Ray handles this many tasks well; with more stretches a task has several.
_MOST_TASKS = 20_000


def this_process() -> Process:
    """The process according to RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; the only one if they are not set.

    Raises:
        ConfigError: they are not numbers, or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not all(value.isascii() and value.isdigit() for value in found.values()) or not (
        int(found["RANK"]) < int(found["WORLD_SIZE"])
    ):
        raise ConfigError(f"{' '.join('='.join(pair) for pair in found.items())}: expected numbers, RANK < WORLD_SIZE")
    return Process(**{name.lower(): int(value) for name, value in found.items()})


@dataclass(frozen=True)
class Workers:
    """Processes that make the parts.

    Attributes:
        num_workers: processes that read for this one; 0 reads in a thread.
        process: which one of several processes started by torchrun this is.
        ray: "local" or the address of a Ray cluster; None without Ray.
        ray_actors: number of Ray actors; None for one per GPU, or per CPU without GPUs.
    """

    num_workers: int = 0
    process: Process = ALONE
    ray: str | None = None
    ray_actors: int | None = None

    @property
    def are_several(self) -> bool:
        """Whether parts are made by more than this process and its readers."""
        return self.process.world_size > 1 or self.ray is not None


def choose_workers(
    num_workers: int | None, ray: str | None = None, ray_actors: int | None = None, most: int | None = None
) -> Workers:
    """Processes to use, from the arguments of a command and the variables that torchrun sets.

    Args:
        num_workers: processes that read; None for one per available CPU, shared by the processes of this machine.
        ray: "local", the address of a cluster, or None.
        ray_actors: number of actors.
        most: limit of the default.

    Raises:
        ConfigError: a number is out of range, or Ray and torchrun are used together.
    """
    process = this_process()
    if ray is not None and process.world_size > 1:
        raise ConfigError("--ray distributes the work itself; start one process, without torchrun")
    if ray_actors is not None and (ray is None or ray_actors < 1):
        raise ConfigError(f"ray_actors is {ray_actors}; it must be 1 or more, and requires --ray")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 or more")
    if num_workers is None:
        cpus = available_cpus()
        num_workers = max(1, min(most or cpus, cpus // process.local_world_size))
    return Workers(num_workers, process, ray, ray_actors)


def make_parts(
    job: CorpusJob,
    stretches: list[Stretch],
    workers: Workers,
    *,
    label: str,
    unit: str,
    remake: Callable[[], CorpusJob] | None = None,
    device: str | None = None,
) -> Generator[Part, None, None]:
    """Parts of some stretches as they are made, with progress on standard error; closing it ends the workers.

    Args:
        job: the work.
        stretches: recordings to do, for instance from `PartsFolder.missing`.
        workers: processes that make the parts; without Ray the parts come in order.
        label: name of the work in the display.
        unit: unit of the display, such as "files".
        remake: makes the same job in another process, for Ray; picklable.
        device: device of the job; with "cpu" Ray reserves no GPU.

    Raises:
        BestRQ2Error: a worker died, or the source cannot be read any more.
    """
    total = sum(map(len, job.blocks(workers.process)))
    begun = total - sum(stop - start[0] for start, stop in stretches)
    if not stretches:
        return
    with Progress(label, total, unit, begun, shown=workers.process.rank == 0) as progress:
        done, seconds = float(begun), 0.0

        def count(recordings: float, audio: float) -> None:
            nonlocal done, seconds
            done, seconds = done + recordings, seconds + audio
            progress.show(done, seconds / 3600)

        if workers.ray is None:
            with SpanStream(job.read, stretches, workers.num_workers, job.describe) as stream:
                yield from job.parts(_counted(stream, count))
            return
        assert remake is not None
        for part in ray_parts(remake, job.identity, stretches, workers.ray, workers.ray_actors, device):
            count(part.recordings, part.seconds)
            yield part


def share_parts(
    job: CorpusJob,
    parts: PartsFolder,
    stretches: list[Stretch],
    workers: Workers,
    *,
    is_joined: Callable[[], bool],
    join: Callable[[], Result],
    label: str,
    unit: str,
    remake: Callable[[], CorpusJob],
    device: str | None = None,
) -> Result | None:
    """Make the missing parts of this process and keep them; join all parts if none is missing then.

    Args:
        job: the work.
        parts: ledger of the finished parts, held by this process.
        stretches: recordings of this process to do, from `parts.missing`.
        workers: processes that make the parts.
        is_joined: whether another process joined the parts.
        join: joins the parts.
        label: name of the work in the display.
        unit: unit of the display.
        remake: makes the same job in another process, for Ray; picklable.
        device: device of the job; with "cpu" Ray reserves no GPU.

    Returns:
        Result of `join`; None if other processes still make parts, or one of them joins or joined them.

    Raises:
        ConfigError: the folder holds parts of another job.
        BestRQ2Error: a worker died, or the source cannot be read any more.
    """
    parts.check(job.identity)
    made = make_parts(job, stretches, workers, label=label, unit=unit, remake=remake, device=device)
    try:
        with closing(made):
            for part in made:
                parts.write(part, job.identity)
    except KeyboardInterrupt as error:
        error.args = (f"finished parts stay in {parts.path}; run the same command again to continue",)
        raise
    joined = parts.join_once(list(job.blocks(ALONE)), is_joined, join)
    if joined is None:
        rank, size = workers.process.rank, workers.process.world_size
        logger.info("process %d of %d: its share is done; the process that ends last joins all shares", rank, size)
    return joined


def _counted(spans: Iterable[Span], count: Callable[[float, float], None]) -> Iterator[Span]:
    for span in spans:
        yield span
        count(1 / span.spans, span.seconds)


class PartActor:
    """Maker of parts in a process of the cluster; errors are part of its answer, because Ray would retry them.

    Args:
        make_job: makes the job.
        identity: identity of the job where it was submitted, which must be the same here.
    """

    def __init__(self, make_job: Callable[[], CorpusJob], identity: dict[str, str]) -> None:
        self._make_job, self._identity = make_job, identity
        self._job: CorpusJob | None = None

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Turn rows (recording, span, stop) of stretches into rows of parts."""
        try:
            stretches = [Stretch((row["recording"], row["span"]), row["stop"]) for row in batch.to_pylist()]
            # Once per actor: opening a source or loading a model takes far longer than a stretch.
            job = self._job = self._job or self._checked()
            with SpanStream(job.read, stretches, 0) as stream:
                for part in job.parts(stream):
                    yield packed(part)
        except BestRQ2Error as error:
            yield packed(None, str(error))

    def _checked(self) -> CorpusJob:
        job = self._make_job()
        if different := [name for name, value in self._identity.items() if job.identity.get(name) != value]:
            raise DataError(
                f"model and data are not the same on all machines of the cluster (different: {', '.join(different)}); "
                "put both where all machines see them"
            )
        return job


def packed(part: Part | None, problem: str = "") -> pa.Table:
    """A part, or the problem that prevented it, as one row."""
    # Pickled, like everything that Ray sends between its own processes.
    return pa.table({"part": pa.array([pickle.dumps(part)], pa.large_binary()), "problem": [problem]})


def unpacked(row: dict[str, Any]) -> Part:
    """The part in a row of `packed`.

    Raises:
        DataError: the row holds a problem.
    """
    if row["problem"]:
        raise DataError(row["problem"])
    part: Part = pickle.loads(row["part"])
    return part


def ray_parts(
    make_job: Callable[[], CorpusJob],
    identity: dict[str, str],
    stretches: list[Stretch],
    address: str,
    actors: int | None,
    device: str | None = None,
) -> Iterator[Part]:
    """Parts of some stretches in the order in which actors make them; the work of an actor that dies is done again.

    Args:
        make_job: makes the job in an actor; picklable.
        identity: identity of the job, which every actor compares with its own.
        stretches: recordings to do.
        address: address of the cluster, or "local" for an instance on this machine; an existing connection is used.
        actors: number of actors; None for one per GPU, or per CPU without GPUs.
        device: "cpu" reserves no GPUs.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at that address.
        BestRQ2Error: an actor failed.
    """
    with _connected(address) as ray:
        resources = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
        count = min(actors or gpus or int(resources.get("CPU", 1)), len(stretches))
        ray.data.DataContext.get_current().enable_progress_bars = False  # one display is enough
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        columns = {
            "recording": [start[0] for start, _ in stretches],
            "span": [start[1] for start, _ in stretches],
            "stop": [stop for _, stop in stretches],
        }
        table = pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()})
        work = ray.data.from_arrow(table, override_num_blocks=min(len(stretches), _MOST_TASKS))
        made = work.map_batches(
            PartActor,
            fn_constructor_args=[make_job, identity],
            batch_size=1,  # a stretch is some minutes to hours of audio: work enough for one call
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=1,
            num_gpus=1 if gpus else None,
        )
        try:
            for row in made.iter_rows():
                yield unpacked(row)
        except ray.exceptions.RayError as error:
            raise BestRQ2Error(
                f"Ray stopped ({_last_line(error)}); finished parts are kept: run the same command again to continue"
            ) from error


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'bestrq2[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    settings: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except Exception as error:  # Ray raises built-in exceptions too
        raise ConfigError(
            f'--ray {address}: no Ray cluster answers there ({" ".join(str(error).split())[:200]}); give "local" or '
            "the address that `ray start --head` printed"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _last_line(error: Exception) -> str:
    # Ray's messages hold the traceback of the actor first.
    return ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1].strip()[:300]
