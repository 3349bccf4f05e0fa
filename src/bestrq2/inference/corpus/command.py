"""The command: a corpus in, one Parquet file out, in steps that survive a kill."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

import torch

from bestrq2.data.open_source import absolute_spec, open_source
from bestrq2.data.prepare.run import worker_count
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import disk_errors, folder_lock
from bestrq2.inference.corpus.identity import EmbedOptions, identity
from bestrq2.inference.corpus.parts import Counts, PartsFolder, read_identity
from bestrq2.inference.corpus.reading import Reader
from bestrq2.inference.corpus.sharing import Process, own_count, own_stretches, this_process
from bestrq2.inference.corpus.tasks import AnySource, Stretch
from bestrq2.inference.corpus.work import Part, PartMaker
from bestrq2.inference.embedder import load
from bestrq2.progress import Progress
from bestrq2.text import counted

logger = logging.getLogger(__name__)

# More processes than these decode faster than any model embeds.
_MOST_WORKERS = 16


def embed_corpus(
    model: str,
    source: str,
    output: Path,
    frames: bool = False,
    phases: int = 1,
    layers: int | list[int] | str | None = None,
    pooling: str = "mean",
    normalize: bool = False,
    device: str | None = None,
    num_workers: int | None = None,
    ray: str | None = None,
    ray_actors: int | None = None,
) -> Path:
    """Embed every recording of a source, whole; those that cannot be read are skipped and listed.

    An interrupted run goes on where it was when the same command is given again. Started by `torchrun`, each process
    embeds its share, on a GPU of its own where there are any, and the one that ends last writes the result; all need
    the same folder for it.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        source: whatever `pretrain` takes as data: folder, file, list (.txt, .csv, .jsonl), tars, HDF5, "hub:NAME",
            mixture (.yaml, each recording once), URLs of tars, "soundworld".
        output: Parquet file to write: columns path, seconds and embedding, one row a recording, in the order of the
            source; rejected ones go to OUTPUT.rejected.csv. While it is made, parts of it lie in OUTPUT.parts.
        frames: write one row per frame instead, with its time: columns path, time (s, centre) and embedding.
        phases: shifted copies of the patch grid, for frames every 1/phases of the hop.
        layers: hidden layer to take instead of the last output (0 is what enters the first block, -1 the last block's
            output), several of which the mean is taken, or "mean" for the mean of all.
        pooling: how the frames of a recording become one vector: "mean", "mean+max" (twice as wide) or "attention".
        normalize: scale every vector to length 1, for retrieval by dot products.
        device: such as "cpu" or "cuda:0"; CUDA where there is one by default.
        num_workers: processes that decode while the model runs, 0 for a thread; by default one per CPU, at most 16.
        ray: "local" for a Ray instance of this machine, or the address of a Ray cluster, such as "auto": actors there
            embed, each decoding in a thread of its own; they must find model and source under the same names.
        ray_actors: how many; one per GPU of the cluster, else one per CPU, by default.

    Returns:
        The Parquet file; started by `torchrun`, it is there when the last process has ended.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    output, process, options = Path(output), this_process(), EmbedOptions(frames, phases, layers, pooling, normalize)
    _check_ray(ray, ray_actors, process)
    workers = _worker_count(num_workers, process)
    spec = absolute_spec(source)
    opened = open_source(spec)
    parts = PartsFolder(output)
    with disk_errors(output), parts.held(process.rank) as temporary:
        embedder = load(model, _device(device, process))
        maker = PartMaker(embedder, options)
        made_by = identity(opened, embedder, options)
        parts.check(made_by)
        # The parts are looked at before the result: whoever writes that deletes them after it.
        todo = own_stretches(opened, parts.ranges(), process)
        if output.exists():
            _check_same(output, made_by)
            parts.delete()
            logger.info("%s: is complete already", output)
            return output
        if ray is None:
            made = local_parts(opened, todo, maker, workers, temporary)
        else:
            from bestrq2.inference.corpus.ray_backend import RayJob, ray_parts

            made = ray_parts(RayJob(model, device, spec, options, made_by), todo, ray, ray_actors)
        try:
            _write(parts, made, made_by, opened, process)
        except KeyboardInterrupt as error:
            error.args = (f"what is done stays in {parts.path}; run the same command again to continue",)
            raise
        if (counts := _joined(parts, opened, maker, made_by)) is None:
            logger.info(
                "process %d of %d: its share is done; the process that ends last writes %s",
                process.rank, process.world_size, output,
            )  # fmt: skip
            return output
    if not counts.rows:
        raise DataError(
            f"{source}: not one of {counted(counts.rejected, 'recording')} could be embedded; see {parts.listing}"
        )
    logger.info("%s: %s", output, _in_words(counts, parts))
    return output


def local_parts(
    source: AnySource, stretches: list[Stretch], maker: PartMaker, num_workers: int, temporary: Path
) -> Iterator[Part]:
    """Parts of some stretches, made by this process; see `Reader` for the arguments."""
    if not stretches:
        return
    rate = maker.embedder.config.sampling_rate
    with Reader(source, stretches, rate, num_workers, temporary) as reader:
        yield from maker.parts(reader)


def _write(
    parts: PartsFolder, made: Iterator[Part], made_by: dict[str, str], source: AnySource, process: Process
) -> None:
    """Write parts as they come, and show how far it is."""
    total = own_count(source, process)
    left = own_stretches(source, parts.ranges(), process)
    done = 0 if total is None else total - sum((one.stop or 0) - one.start for one in left)
    seconds = 0.0
    shown = Progress("embed", total, "recordings", done) if process.rank == 0 else nullcontext()
    with closing(made), shown as progress:  # type: ignore[type-var]
        for part in made:
            parts.write(part, made_by)
            done, seconds = done + part.stop - part.start, seconds + part.seconds
            if progress is not None:
                progress.show(done, seconds / 3600)


def _joined(parts: PartsFolder, source: AnySource, maker: PartMaker, made_by: dict[str, str]) -> Counts | None:
    """What the result holds, once it is written; None where other processes are still at work, or just write it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(parts.path))
        except (ConfigError, FileNotFoundError):
            return None
        if parts.output.exists() or own_stretches(source, parts.ranges()):
            return None
        return parts.join(maker.schema, made_by)


def _in_words(counts: Counts, parts: PartsFolder) -> str:
    rows = "" if counts.rows == counts.embedded else f" in {counted(counts.rows, 'frame')}"
    text = f"{counted(counts.embedded, 'recording')} embedded{rows}, {counts.rejected} rejected"
    if counts.damaged_shards:
        text += f", {counted(counts.damaged_shards, 'shard')} damaged"
    return text + (f"; see {parts.listing}" if counts.rejected or counts.damaged_shards else "")


def _check_same(output: Path, made_by: dict[str, str]) -> None:
    """Pass if a file is the finished result of the same command.

    Raises:
        ConfigError: it is something else.
    """
    found = read_identity(output) or {}
    if any(found.get(name) != value for name, value in made_by.items()):
        raise ConfigError(f"{output}: exists already; delete it or name another --output")


def _check_ray(ray: str | None, ray_actors: int | None, process: Process) -> None:
    if ray is not None and process.world_size > 1:
        raise ConfigError("--ray spreads the work by itself; start one process, without torchrun")
    if ray_actors is not None and (ray is None or ray_actors < 1):
        raise ConfigError(f"ray_actors is {ray_actors}; it must be 1 or more, and goes with --ray")


def _device(device: str | None, process: Process) -> str | None:
    """The GPU of this process where there are several of either; else what is asked for."""
    if process.world_size > 1 and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{process.local_rank % torch.cuda.device_count()}"
    return device


def _worker_count(num_workers: int | None, process: Process) -> int:
    if num_workers is None:
        return max(1, min(_MOST_WORKERS, worker_count(None) // process.local_world_size))
    if num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 or more.")
    return num_workers
