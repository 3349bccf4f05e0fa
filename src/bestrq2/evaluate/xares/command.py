"""The command: a model through the tasks of X-ARES, by its own harness, side by side in processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bestrq2.convert.weights import quiet_hub
from bestrq2.errors import BestRQ2Error, CheckpointError, ConfigError, DataError
from bestrq2.evaluate.provenance import is_run_folder, model_provenance
from bestrq2.evaluate.xares.entries import RESULT_NAME, Score, XaresResult, read_result, write_result
from bestrq2.evaluate.xares.identity import Extraction, digest, harness_version, model_identity
from bestrq2.evaluate.xares.pool import WorkerPool
from bestrq2.evaluate.xares.scoring import Job
from bestrq2.evaluate.xares.selection import (
    DataFolder,
    candidate_files,
    data_folder,
    from_json,
    listing,
    select,
    split_names,
)
from bestrq2.evaluate.xares.task_files import TaskFile
from bestrq2.files import cache_folder, check_writable, disk_errors, write_folder
from bestrq2.inference.embedder import Embedder, load, weights_hash
from bestrq2.progress import Progress
from bestrq2.text import counted

logger = logging.getLogger(__name__)


def xares(
    model: str | os.PathLike[str],
    data: Path | None = None,
    tasks: str | list[str] | None = None,
    jobs: int = 1,
    phases: int | None = None,
    clip_phases: int = 1,
    layers: int | list[int] | str | None = None,
    output: Path | None = None,
    device: str | None = None,
    cache: Path | None = None,
    keep_embeddings: bool = False,
) -> XaresResult:
    """Score a model on tasks of X-ARES by the benchmark's own harness: its splits, its linear probe and its k-NN.

    Each task runs in a process of the harness. One that fails is listed with the reason, and the others go on. Finished
    scores are kept under the identity of the model (weights, architecture, options, versions), so the same command
    again does only what is missing. A run folder gets the result as xares.json.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        data: folder with the tars of tasks, one folder each, such as DATA/esc50/*.tar or what
            `bestrq2 soundworld DATA --format xares` wrote; nothing is downloaded then. Without it the harness downloads
            what is missing from Zenodo, into the cache.
        tasks: such as "esc50,gtzan", or paths of task files; by default all with public data, or all in DATA.
        jobs: tasks that run at once, on the GPUs in turn.
        phases: shifted copies of the patch grid for frame-level tasks, for frames every 1/phases of the hop; 2 by
            default, or 1 where a patch is 1 frame wide.
        clip_phases: the same for clip-level tasks.
        layers: hidden layer instead of the model's output, several for their mean, "mean" for that of all.
        output: JSON file for the result.
        device: "cpu", "cuda", or one GPU such as "cuda:1"; all GPUs where there are any by default.
        cache: folder of downloads and of what is kept of models; $BESTRQ2_CACHE or ~/.cache/bestrq2 by default.
        keep_embeddings: leave the embeddings of every clip on disk when a task is scored.

    Returns:
        Scores, reasons of failures, and what they depend on.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    wanted, version = split_names(tasks), harness_version()
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; at least 1 task must run")
    files = result_files(model, output)
    root = cache_folder(cache).absolute() / "xares"
    folder = data_folder(None if data is None else Path(data), root)
    embedder = load(model, "cpu")
    extraction = Extraction(min(2, embedder.config.patch_size[1]) if phases is None else phases, clip_phases, layers)
    extraction.check(embedder.config)
    identity = model_identity(embedder, extraction)
    with _writable(root), WorkerPool(jobs, _environments(device)) as pool:
        chosen = select(_describe(pool, root, candidate_files(folder, wanted)), folder, wanted)
        snapshot = _snapshot(embedder, root, identity)
        requests = [
            {
                "do": "score",
                "log": str(root / "logs" / digest(identity) / f"{Path(task.path).stem}.log"),
                "work": str(root / "hub"),
                "model": str(snapshot),
                "weights_sha256": identity["weights_sha256"],
                "job": asdict(_job(task, folder, root, identity, extraction, jobs, keep_embeddings)),
            }
            for task in chosen
            if not task.error
        ]
        result = _run(pool, [task for task in chosen if not task.error], requests)
    failures = {task.name: task.error for task in chosen if task.error} | dict(result.failures)
    provenance = model_provenance(model, embedder.config) | {
        "identity": identity,
        "extraction": asdict(extraction),
        "hop_ms": 1000 * embedder.hop_seconds,
        "xares": version,
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
        **result.provenance,
    }
    name = os.path.basename(os.path.abspath(model)) if is_run_folder(model) else embedder.name
    result = XaresResult(name, result.scores, failures, provenance)
    for file in files:
        with disk_errors(file):
            write_result(file, _with_earlier(file, result))
        logger.info("%s: result of X-ARES", file)
    return result


def list_tasks(data: Path | None = None, cache: Path | None = None) -> str:
    """All tasks of the installed harness, and those that came with the data, as a table.

    Args:
        data: as of `xares`.
        cache: as of `xares`.

    Raises:
        BestRQ2Error: the harness is not installed, or there is no such folder.
    """
    harness_version()
    root = cache_folder(cache).absolute() / "xares"
    folder = data_folder(None if data is None else Path(data), root)
    with _writable(root), WorkerPool(1, _environments("cpu")) as pool:
        return listing(_describe(pool, root, candidate_files(folder, None)), folder)


def check_complete(result: XaresResult) -> None:
    """Pass if every task was scored.

    Raises:
        DataError: none was.
        BestRQ2Error: some were not.
    """
    if result.failures:
        total = len({score.task for score in result.scores} | set(result.failures))
        kind = BestRQ2Error if result.scores else DataError
        lacking = f"{len(result.failures)} of {counted(total, 'task')} without a score: {', '.join(result.failures)}"
        raise kind(f"{lacking}; the same command again does what is missing")


def result_files(model: str | os.PathLike[str], output: Path | None) -> list[Path]:
    """The JSON files that a result goes into: `output`, and a run folder's own."""
    files = [] if output is None else [Path(output)]
    if is_run_folder(model):
        files.insert(0, Path(model) / RESULT_NAME)
    for file in files:
        check_writable(file)
    return files


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        yield


def _describe(pool: WorkerPool, root: Path, files: Sequence[str]) -> list[TaskFile]:
    log, work = str(root / "logs" / "tasks.log"), str(root / "hub")
    request = {"do": "describe", "files": list(files), "log": log, "work": work}
    for answer in pool.run([request]):
        if "failed" in answer.content:
            raise BestRQ2Error(f"the X-ARES harness does not start: {answer.content['failed']}")
        if "done" in answer.content:
            return from_json(answer.content["done"])
    raise AssertionError("a request has a last answer")


def _snapshot(embedder: Embedder, root: Path, identity: dict[str, str]) -> Path:
    """The model as a folder that processes load, whatever becomes of the source meanwhile."""
    folder = root / "models" / digest(identity) / "model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(CheckpointError):  # what is damaged is written anew
        if folder.is_dir() and weights_hash(load(folder, "cpu")) == identity["weights_sha256"]:
            return folder
    with quiet_hub():
        write_folder(folder, lambda fresh: embedder.model.save_pretrained(fresh))
    return folder


def _job(
    task: TaskFile,
    folder: DataFolder,
    root: Path,
    identity: dict[str, str],
    extraction: Extraction,
    jobs: int,
    keep_embeddings: bool,
) -> Job:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // jobs
    return Job(
        task.path, str(folder.path), folder.download, str(root / "models"), digest(identity), asdict(extraction),
        decoders=min(4, share) if share > 1 else 0, keep_embeddings=keep_embeddings,
    )  # fmt: skip


def _run(pool: WorkerPool, tasks: Sequence[TaskFile], requests: Sequence[dict[str, Any]]) -> XaresResult:
    """Scores and failures, in the order of the tasks, and facts of each task as provenance."""
    scores: dict[str, list[Score]] = {}
    failures: dict[str, str] = {}
    facts: dict[str, Any] = {}
    known: dict[str, Any] = {}
    parts = dict.fromkeys(range(len(tasks)), 0.0)
    with Progress("x-ares", len(tasks), "tasks") if tasks else nullcontext() as progress:
        try:
            for place, content in pool.run(requests):
                name = tasks[place].name
                if "encoded" in content:
                    # embedding takes most of the time; training what is left
                    parts[place] = 0.9 * min(1.0, content["encoded"] / max(1, content["of"]))
                elif "failed" in content:
                    failures[name], parts[place] = content["failed"], 1.0
                    logger.warning("%s: no score: %s", name, content["failed"])
                else:
                    scores[name] = [Score(**values) for values in content["done"]["scores"]]
                    facts[name], parts[place] = content["done"]["facts"], 1.0
                    known["torchaudio"] = content["torchaudio"]
                    logger.info("%s: %s", name, _in_words(scores[name], content["done"]["reused"]))
                assert progress is not None
                progress.show(sum(parts.values()))
        except KeyboardInterrupt as error:
            error.args = (f"{len(scores)} of {len(tasks)} tasks are done; the same command again does what is missing",)
            raise
    ordered = [score for task in tasks for score in scores.get(task.name, [])]
    failed = {task.name: failures[task.name] for task in tasks if task.name in failures}
    return XaresResult("", ordered, failed, {**known, "tasks": facts})


def _in_words(scores: Sequence[Score], reused: bool) -> str:
    said = ", ".join(f"{'MLP' if score.method == 'mlp' else 'k-NN'} {100 * score.value:.1f}" for score in scores)
    return said + (" (scored before)" if reused else "")


def _with_earlier(file: Path, result: XaresResult) -> XaresResult:
    """The result with the tasks that an earlier call scored for the same model and wrote to the same file."""
    try:
        earlier = read_result(file)
    except DataError:
        return result
    if earlier.provenance.get("identity") != result.provenance["identity"]:
        return result
    now = {score.task for score in result.scores} | set(result.failures)
    facts = earlier.provenance.get("tasks", {}) | result.provenance["tasks"]
    return replace(
        result,
        scores=[*result.scores, *(score for score in earlier.scores if score.task not in now)],
        failures={**{task: why for task, why in earlier.failures.items() if task not in now}, **result.failures},
        provenance=result.provenance | {"tasks": facts},
    )


def _environments(device: str | None) -> list[dict[str, str]]:
    """What workers see of the GPUs: the harness takes the first one it sees, so each is shown one.

    Raises:
        ConfigError: there is no such device.
    """
    count = torch.cuda.device_count()
    if device == "cpu" or (device is None and count == 0):
        return [{"CUDA_VISIBLE_DEVICES": ""}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    if device in (None, "cuda") and count:
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:count]]
    index = (device or "").removeprefix("cuda:")
    if not index.isdigit() or int(index) >= count:
        raise ConfigError(f"device {device!r}: X-ARES runs on 'cpu' or one of {count} CUDA devices, such as 'cuda:0'")
    return [{"CUDA_VISIBLE_DEVICES": names[int(index)]}]
