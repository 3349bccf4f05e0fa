"""Embedding on a Ray cluster: Ray Data hands stretches of the corpus to actors, each with a model of its own."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from bestrq2.data.open_source import open_source
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.inference.corpus.identity import EmbedOptions, identity
from bestrq2.inference.corpus.reading import Reader
from bestrq2.inference.corpus.tasks import Stretch
from bestrq2.inference.corpus.work import Part, PartMaker
from bestrq2.inference.embedder import load

# One task of Ray each, as far as that many are handled well.
_MOST_TASKS = 20_000


@dataclass(frozen=True)
class RayJob:
    """What an actor needs to know.

    Attributes:
        model: see `embed_corpus`.
        device: likewise.
        source: likewise, the same from any folder.
        options: what to write of each recording.
        made_by: `identity` of the whole, which each actor must find the same.
    """

    model: str
    device: str | None
    source: str
    options: EmbedOptions
    made_by: dict[str, str]


class PartActor:
    """Makes parts in a process of the cluster; what goes wrong is told in the answer, as Ray would try it again.

    Args:
        job: what to do.
    """

    def __init__(self, job: RayJob) -> None:
        self.job = job
        self._maker: PartMaker | None = None

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """From rows (lane, start, stop or null) of stretches to rows of parts, as `_packed`."""
        try:
            stretches = [Stretch(**row) for row in batch.to_pylist()]
            for part in self._parts(stretches):
                yield _packed(part)
        except BestRQ2Error as error:
            yield _packed(Part(0, 0, 0, pa.table({})), problem=str(error))

    def _parts(self, stretches: list[Stretch]) -> Iterator[Part]:
        if self._maker is None:
            self._source = open_source(self.job.source)
            embedder = load(self.job.model, self.job.device)
            found = identity(self._source, embedder, self.job.options)
            if different := [name for name, value in self.job.made_by.items() if found[name] != value]:
                raise DataError(
                    f"{self.job.model} and {self.job.source} are not the same on all machines of the cluster "
                    f"(different: {', '.join(different)}); put both where all machines see them"
                )
            self._maker = PartMaker(embedder, self.job.options)
        rate = self._maker.embedder.config.sampling_rate
        with (
            tempfile.TemporaryDirectory(prefix="bestrq2-") as folder,
            Reader(self._source, stretches, rate, 0, Path(folder)) as reader,
        ):
            yield from self._maker.parts(reader)


def _packed(part: Part, problem: str = "") -> pa.Table:
    """A part as one row of bytes and numbers, which Ray carries."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, part.rows.schema) as writer:
        writer.write_table(part.rows)
    columns = {
        "numbers": pa.array([[part.lane, part.start, part.stop]]),
        "seconds": pa.array([part.seconds]),
        "rejected": pa.array([json.dumps(part.rejected)]),
        "rows": pa.array([sink.getvalue().to_pybytes()], pa.large_binary()),
        "problem": pa.array([problem]),
    }
    return pa.table(columns)


def _unpacked(row: dict[str, Any]) -> Part:
    """A part again.

    Raises:
        BestRQ2Error: what went wrong at the actor.
    """
    if row["problem"]:
        raise DataError(row["problem"])
    rows = pa.ipc.open_stream(row["rows"]).read_all()
    rejected = [(name, reason) for name, reason in json.loads(row["rejected"])]
    lane, start, stop = row["numbers"]
    return Part(lane, start, stop, rows, rejected, row["seconds"])


def ray_parts(job: RayJob, stretches: list[Stretch], address: str, actors: int | None) -> Iterator[Part]:
    """Parts of some stretches as actors make them, in any order; what an actor that dies was at is done by another.

    Args:
        job: what to do.
        stretches: which recordings.
        address: of the cluster, or "local" for an instance of this machine; one that this program is connected to
            already is used as it is.
        actors: how many; None for one per GPU, or per CPU where there are none.

    Raises:
        ConfigError: Ray is missing, or there is no cluster at that address.
        BestRQ2Error: what went wrong at an actor.
    """
    if not stretches:
        return
    with _connected(address) as ray:
        resources = ray.cluster_resources()
        gpus = 0 if job.device == "cpu" else int(resources.get("GPU", 0))
        count = min(actors or gpus or int(resources.get("CPU", 1)), len(stretches))
        ray.data.DataContext.get_current().enable_progress_bars = False  # we show our own
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        columns = {name: [getattr(one, name) for one in stretches] for name in Stretch._fields}
        table = pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()})
        work = ray.data.from_arrow(table, override_num_blocks=min(len(stretches), _MOST_TASKS))
        # Ray Data starts an actor that died anew, and gives what it was at to another one.
        made = work.map_batches(
            PartActor,
            fn_constructor_args=[job],
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=1,
            num_gpus=1 if gpus else None,
        )
        try:
            for row in made.iter_rows():
                yield _unpacked(row)
        except ray.exceptions.RayError as error:
            raise BestRQ2Error(
                f"Ray stopped ({_short(error)}); what is done is kept: run the same command again to continue"
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
    except Exception as error:  # Ray raises plain ones too
        raise ConfigError(
            f'--ray {address}: no Ray cluster answers there ({" ".join(str(error).split())[:200]}); give "local" or '
            "the address that `ray start --head` printed"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _short(error: Exception) -> str:
    """The last line of an error, which in Ray's is what happened."""
    return ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1].strip()[:300]
