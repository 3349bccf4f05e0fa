"""Entry point of `bestrq2 xares`: a model through tasks of X-ARES by the benchmark's own harness."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bestrq2.convert.readout import set_readout
from bestrq2.convert.weights import quiet_hub
from bestrq2.errors import BestRQ2Error, CheckpointError, ConfigError, DataError
from bestrq2.evaluate.provenance import digest, is_run_folder, model_name, model_provenance
from bestrq2.evaluate.result import XARES, Result, TaskScore, write_result
from bestrq2.evaluate.xares.encoder import Extraction, harness_version, model_identity
from bestrq2.evaluate.xares.results import RESULT_NAME, plain_averages, read_xares_result, xares_csv, xares_parts
from bestrq2.evaluate.xares.scoring import Job
from bestrq2.evaluate.xares.tasks import (
    TASKS,
    TaskFile,
    candidate_files,
    data_folder,
    listing,
    select,
    split_names,
)
from bestrq2.evaluate.xares.workers import WorkerPool
from bestrq2.files import cache_folder, check_writable, disk_errors, write_folder, write_text
from bestrq2.inference.embedder import Embedder, load, weights_hash
from bestrq2.progress import Progress

logger = logging.getLogger(__name__)


def run_xares(
    model: str | os.PathLike[str],
    data: Path | None = None,
    tasks: str | list[str] | None = None,
    jobs: int = 1,
    phases: int | None = None,
    clip_phases: int = 1,
    layers: int | list[int] | str | None = None,
    frequency: str | None = None,
    pooling: str | None = None,
    extraction: Literal["overlap", "chunks"] = "overlap",
    output: Path | None = None,
    device: str | None = None,
    cache: Path | None = None,
    keep_embeddings: bool = False,
) -> Result:
    """Score a model on tasks of X-ARES; see `bestrq2.xares` for the arguments.

    The result is written as JSON and as CSV, to `output` and into a run folder as xares.json and xares.csv. Finished
    scores are cached under the identity of the model (weights, architecture, options, versions).

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
    set_readout(embedder.model, layers, frequency, pooling)
    if phases is None:
        phases = 1 if extraction == "chunks" else min(2, embedder.config.patch_size[1])
    options = Extraction(phases, clip_phases, extraction == "chunks")
    options.check(embedder.config)
    identity = model_identity(embedder, options)
    name = model_name(model)
    with _writable(root), WorkerPool(jobs, worker_environments(device)) as pool:
        chosen = select(_describe(pool, root, candidate_files(folder, wanted)), folder, wanted)
        usable = [task for task in chosen if not task.error]
        common = {"do": "score", "work": str(root / "hub"), "model": str(_snapshot(embedder, root, identity))}
        common["weights_sha256"] = identity["weights_sha256"]
        requests = []
        for task in usable:
            job = Job(
                task.path, str(folder.path), folder.download, str(root / "models"), digest(identity), asdict(options),
                keep_embeddings,
            )  # fmt: skip
            log = root / "logs" / digest(identity) / f"{Path(task.path).stem}.log"
            requests.append({**common, "log": str(log), "job": asdict(job)})
        scores, failures, facts = _run(pool, name, usable, requests)
    failures = {task.name: task.error for task in chosen if task.error} | failures
    provenance = model_provenance(model, embedder.config, ["bestrq2 xares", os.fspath(model)]) | facts
    provenance |= {"identity": identity, "extraction": asdict(options) | embedder.model.readout.settings()}
    provenance |= {"hop_ms": 1000 * embedder.hop_seconds, "xares": version}
    provenance["device"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    result = Result(XARES, name, tuple(scores), failures, provenance, xares_parts)
    for file in files:
        with disk_errors(file):
            merged = _with_earlier(file, result)
            write_result(file, merged, plain_averages(merged))
            write_text(file.with_suffix(".csv"), xares_csv(merged))
        logger.info("%s: result of X-ARES", file)
    return result


def list_tasks(data: Path | None = None, cache: Path | None = None) -> str:
    """List all tasks of the installed harness, and those that came with the data, as a table.

    Args:
        data: folder of tars, as in `run_xares`.
        cache: folder of downloads, as in `run_xares`.

    Raises:
        BestRQ2Error: the harness is not installed, or there is no such folder.
    """
    harness_version()
    root = cache_folder(cache).absolute() / "xares"
    folder = data_folder(None if data is None else Path(data), root)
    with _writable(root), WorkerPool(1, worker_environments("cpu")) as pool:
        return listing(_describe(pool, root, candidate_files(folder, None)), folder)


def result_files(model: str | os.PathLike[str], output: Path | None) -> list[Path]:
    """JSON files of a result: `output`, and that of a run folder."""
    files = [] if output is None else [Path(output)]
    if is_run_folder(model):
        files.insert(0, Path(model) / RESULT_NAME)
    for file in files:
        check_writable(file)
    return files


def worker_environments(device: str | None) -> list[dict[str, str]]:
    """Environment variables that restrict each worker to one GPU, since the harness uses the first visible one.

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


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        yield


def _describe(pool: WorkerPool, root: Path, files: Sequence[str]) -> list[TaskFile]:
    log, work = str(root / "logs" / "tasks.log"), str(root / "hub")
    request = {"do": "describe", "files": list(files), "log": log, "work": work}
    ((_, answer),) = pool.run([request])
    if "failed" in answer:
        raise BestRQ2Error(f"the X-ARES harness does not start: {answer['failed']}")
    return [TaskFile(**values) for values in answer["done"]]


def _snapshot(embedder: Embedder, root: Path, identity: dict[str, str]) -> Path:
    """The model as a folder that workers load, whatever happens to the source meanwhile."""
    folder = root / "models" / digest(identity) / "model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(CheckpointError):  # a damaged folder is written again
        if folder.is_dir() and weights_hash(load(folder, "cpu").model) == identity["weights_sha256"]:
            return folder
    with quiet_hub():
        write_folder(folder, lambda fresh: embedder.model.save_pretrained(fresh))
    return folder


def _run(
    pool: WorkerPool, model: str, tasks: Sequence[TaskFile], requests: Sequence[dict[str, Any]]
) -> tuple[list[TaskScore], dict[str, str], dict[str, Any]]:
    """Scores and failures in the order of the tasks, and facts for the provenance."""
    scores: dict[str, list[TaskScore]] = {}
    failures: dict[str, str] = {}
    facts: dict[str, Any] = {"tasks": {}}
    parts = dict.fromkeys(range(len(tasks)), 0.0)
    with Progress("x-ares", len(tasks), "tasks") if tasks else nullcontext() as progress:
        try:
            for place, content in pool.run(requests):
                name = tasks[place].name
                if "encoded" in content:
                    # embedding takes most of the time, probes the rest
                    parts[place] = 0.9 * min(1.0, content["encoded"] / max(1, content["of"]))
                elif "failed" in content:
                    failures[name], parts[place] = content["failed"], 1.0
                    logger.warning("%s: no score: %s", name, content["failed"])
                else:
                    domain = TASKS[name].domain if name in TASKS else ""
                    scores[name] = [TaskScore(model, domain=domain, **one) for one in content["done"]["scores"]]
                    facts["tasks"][name], parts[place] = content["done"]["facts"], 1.0
                    facts["torchaudio"] = content["torchaudio"]
                    logger.info("%s: %s", name, _log_text(scores[name], content["done"]["reused"]))
                assert progress is not None
                progress.show(sum(parts.values()))
        except KeyboardInterrupt as error:
            error.args = (f"{len(scores)} of {len(tasks)} tasks are done; rerun the same command for the others",)
            raise
    names = [task.name for task in tasks]
    ordered = [score for name in names for score in scores.get(name, [])]
    return ordered, {name: failures[name] for name in names if name in failures}, facts


def _log_text(scores: Sequence[TaskScore], reused: bool) -> str:
    text = ", ".join(f"{'MLP' if score.method == 'mlp' else 'k-NN'} {100 * score.score:.1f}" for score in scores)
    return text + (" (cached)" if reused else "")


def _with_earlier(file: Path, result: Result) -> Result:
    """The result with the tasks that an earlier call scored for the same model and wrote to the same file."""
    try:
        earlier = read_xares_result(file)
    except DataError:
        return result
    if earlier.provenance.get("identity") != result.provenance["identity"]:
        return result
    now = {score.task for score in result.scores} | set(result.failures)
    facts = earlier.provenance.get("tasks", {}) | result.provenance["tasks"]
    return replace(
        result,
        scores=(*result.scores, *(score for score in earlier.scores if score.task not in now)),
        failures={**{task: why for task, why in earlier.failures.items() if task not in now}, **result.failures},
        provenance={**result.provenance, "tasks": facts},
    )
