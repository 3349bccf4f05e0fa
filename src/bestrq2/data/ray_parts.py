"""Parts of a corpus made on a Ray cluster: Ray Data hands stretches to actors, each with the job's model in memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from bestrq2.data.corpus_pass import CorpusJob, SpanStream
from bestrq2.data.parts import Part, Stretch
from bestrq2.errors import BestRQ2Error, ConfigError, DataError

# Ray handles this many tasks well; with more stretches a task has several.
_MOST_TASKS = 20_000


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
            job = self._job = self._job or self._checked()
            with SpanStream(job.read, stretches, 0) as stream:
                for part in job.parts(stream):
                    yield packed(part)
        except BestRQ2Error as error:
            yield packed(Part((0, 0), (0, 0), pa.table({})), problem=str(error))

    def _checked(self) -> CorpusJob:
        job = self._make_job()
        if different := [name for name, value in self._identity.items() if job.identity.get(name) != value]:
            raise DataError(
                f"model and data are not the same on all machines of the cluster (different: {', '.join(different)}); "
                "put both where all machines see them"
            )
        return job


def packed(part: Part, problem: str = "") -> pa.Table:
    """A part, or a problem, as one row of bytes and numbers."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.rows.schema) as writer:
        writer.write_table(part.rows)
    columns = {
        "positions": pa.array([[*part.start, *part.stop]]),
        "amounts": pa.array([[part.seconds, part.recordings]]),
        "rejected": pa.array([json.dumps(part.rejected)]),
        "rows": pa.array([sink.getvalue().to_pybytes()], pa.large_binary()),
        "problem": pa.array([problem]),
    }
    return pa.table(columns)


def unpacked(row: dict[str, Any]) -> Part:
    """The part in a row of `packed`.

    Raises:
        DataError: the row holds a problem.
    """
    if row["problem"]:
        raise DataError(row["problem"])
    first, span, last, end = map(int, row["positions"])
    rejected = [(name, reason) for name, reason in json.loads(row["rejected"])]
    rows = pa.ipc.open_stream(row["rows"]).read_all()
    return Part((first, span), (last, end), rows, rejected, *map(float, row["amounts"]))


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
            batch_size=1,
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
