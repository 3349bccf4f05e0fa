"""`bestrq2 xares-llm`: an encoder through the benchmark's own training and scoring."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from bestrq2._version import __version__
from bestrq2.convert.loading import load_encoder
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.evaluate.xares_llm import harness as package
from bestrq2.evaluate.xares_llm.contract import check_encoder
from bestrq2.evaluate.xares_llm.encoder import BestRQ2Encoder, write_encoder
from bestrq2.evaluate.xares_llm.harness import Harness
from bestrq2.evaluate.xares_llm.results import TaskScore, XaresLLMResult, read_scores, task_name, write_result
from bestrq2.evaluate.xares_llm.running import drop_unfinished, run_harness
from bestrq2.files import disk_errors, folder_lock, write_folder, write_text
from bestrq2.inference.embedder import Embedder, weights_hash

logger = logging.getLogger(__name__)

ENCODER = f"{BestRQ2Encoder.__module__}.{BestRQ2Encoder.__name__}"


@dataclass(frozen=True)
class _Job:
    """One model made ready for the benchmark.

    Attributes:
        name: of the model.
        folder: all that belongs to this model, these settings and this version of the benchmark.
        identity: what scores depend on.
        model_args: keyword arguments of `BestRQ2Encoder`.
        harness: the installed benchmark.
    """

    name: str
    folder: Path
    identity: dict[str, Any]
    model_args: dict[str, Any]
    harness: Harness


def xares_llm(
    model: str | os.PathLike[str],
    task: str = "task1",
    evaluation: str | None = None,
    output: Path = Path("xares-llm"),
    data: Path = Path("xares_data"),
    phases: int = 2,
    layers: int | None = None,
    decoder: str | None = None,
    training: dict[str, Any] | None = None,
    processes: int = 1,
    python: str | None = None,
) -> XaresLLMResult:
    """Train a small language model behind the frozen encoder and score it, by the package `xares_llm`.

    Run again after an interruption it does only what is missing: the benchmark cannot go on with a training that was
    cut short, which begins anew, but keeps a finished one and finished scores.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        task: what to train on: task1 (classification), task2 (understanding), all, the name of one dataset, or a .yaml
            file of the benchmark's form.
        evaluation: what to score, in the same words; the same as `task` by default. Needed with a .yaml file.
        output: folder for work and results; each model and its settings have a folder of their own there.
        data: folder of the benchmark's tars; it downloads there what is missing (unless HF_HUB_OFFLINE is 1).
        phases: how often the patch grid is shifted, for finer frames: as many times more positions.
        layers: a hidden layer instead of the encoder's output.
        decoder: name or folder of another language model; scores are then not comparable with published ones.
        training: other settings of the benchmark's training, such as {"max_steps": 1000}; scores are then not
            comparable with published ones.
        processes: GPUs to train on, by accelerate; 1 uses none or one.
        python: interpreter of the environment that has xares_llm; this one by default.

    Returns:
        The scores; also written as JSON into the model's folder in `output`.

    Raises:
        BestRQ2Error: with one sentence that says what to change; the benchmark's own failures too.
    """
    if processes < 1:
        raise ConfigError(f"processes must be at least 1, got {processes}")
    settings = {**(training or {}), **({} if decoder is None else {"decoder_model_name": _absolute(decoder)})}
    harness = package.find_harness(python or sys.executable)
    train_file = package.training_file(harness, task)
    eval_file = package.evaluation_file(harness, _evaluation(task, evaluation))
    _check_data(train_file, eval_file, data)
    with disk_errors(output):
        job = _prepare(model, output, phases, layers, settings, harness)
        with folder_lock(job.folder):
            environment = package.child_environment(job.folder / "imports", data.absolute())
            package.own_check(job.harness, job.model_args, environment)
            return _run(job, task, train_file, eval_file, settings, processes, environment)


def check(
    model: str | os.PathLike[str],
    output: Path = Path("xares-llm"),
    phases: int = 2,
    layers: int | None = None,
    python: str | None = None,
) -> str:
    """Check an encoder by the contract, and by the benchmark's own check where the benchmark is installed.

    Args:
        model: as in `xares_llm`, and so on.
        output: folder for the encoder in the form that the benchmark reads.
        phases: how often the patch grid is shifted.
        layers: a hidden layer instead of the encoder's output.
        python: interpreter of the environment that has xares_llm; this one by default.

    Returns:
        What was checked, in a sentence or two.

    Raises:
        BestRQ2Error: the encoder fails, or cannot be loaded.
    """
    with disk_errors(output):
        job = _prepare(model, output, phases, layers, {}, package.find_harness(python or sys.executable))
        passed = f"{job.name}: keeps the contract of XARES-LLM, {job.identity['output_dim']} values a frame"
        if job.harness.folder is None:
            return f"{passed}. Its own check was not run: {job.harness.python} {package.MISSING}"
        environment = package.child_environment(job.folder / "imports", output.absolute())
        package.own_check(job.harness, job.model_args, environment)
    return f"{passed}. Passed the own check of xares_llm {job.harness.versions['xares-llm']} too."


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _evaluation(task: str, evaluation: str | None) -> str:
    if evaluation is None and Path(task).suffix in (".yaml", ".yml"):
        raise ConfigError(f"{task} says what to train on; name what to score with --evaluation NAME or FILE.yaml")
    return evaluation or task


def _prepare(
    model: str | os.PathLike[str],
    output: Path,
    phases: int,
    layers: int | None,
    settings: dict[str, Any],
    harness: Harness,
) -> _Job:
    """Load, write and check the encoder."""
    encoder = load_encoder(model)
    identity = {
        "weights_sha256": weights_hash(Embedder(encoder, "cpu")),
        "phases": phases,
        "layers": layers,
        "training": settings,
        "bestrq2": __version__,
        "xares-llm": harness.versions["xares-llm"],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    name = os.path.basename(os.path.abspath(model))
    folder = (output / f"{name}-{digest[:12]}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "encoder" / "config.json").is_file():
        write_folder(folder / "encoder", lambda fresh: write_encoder(encoder, fresh))
    model_args: dict[str, Any] = {"folder": str(folder / "encoder"), "phases": phases, "layers": layers}
    wrapped = BestRQ2Encoder(**model_args)
    check_encoder(wrapped)
    return _Job(name, folder, {**identity, "output_dim": wrapped.output_dim}, model_args, harness)


def _check_data(train_file: Path, eval_file: Path, data: Path) -> None:
    """Say what is missing before the training, not days into it."""
    tars = package.find_tars(train_file, eval_file, data)
    if not tars.absent:
        return
    missing = f"{len(tars.absent)} of {len(tars.here) + len(tars.absent)} tars are missing, first {tars.absent[0]}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise DataError(f"{data}: {missing}; download them (docs/benchmarks.md), or unset HF_HUB_OFFLINE")
    logger.info("%s: %s; xares_llm downloads them", data, missing)


def _run(
    job: _Job,
    task: str,
    train_file: Path,
    eval_file: Path,
    settings: dict[str, Any],
    processes: int,
    environment: dict[str, str],
) -> XaresLLMResult:
    """Everything at once; where scoring fails after training, each dataset that is left by itself."""
    title = Path(task).stem
    own_file = job.folder / f"{title}.yaml"
    content = package.read_task_file(train_file) | settings | {"output_dir": str(job.folder)}
    write_text(own_file, yaml.safe_dump(content, sort_keys=False))
    results = job.folder / title
    log = job.folder / f"{title}.log"
    evaluations = package.read_task_file(eval_file)
    scores: dict[str, TaskScore] = {}
    failures: dict[str, str] = {}

    def score(file: Path) -> None:
        for stale in results.glob("*/scores.tsv"):
            stale.unlink()
        run_harness(_command(job, own_file, file, processes), environment, log)
        found = [one for table in sorted(results.glob("*/scores.tsv")) for one in read_scores(table)]
        if not found:
            raise BestRQ2Error(f"xares_llm ended without an error but wrote no scores.tsv in {results}; see {log}")
        scores.update({one.task: one for one in found})

    drop_unfinished(results)
    try:
        score(eval_file)
    except BestRQ2Error as error:
        if not drop_unfinished(results):
            raise
        logger.warning("%s; the datasets are now scored one by one", error)
        for name, entry in evaluations.items():
            single = job.folder / f"{title}-{name}.yaml"
            write_text(single, yaml.safe_dump({name: entry}, sort_keys=False))
            try:
                score(single)
            except BestRQ2Error as failure:
                failures[task_name(name)] = str(failure)
    expected = tuple(task_name(name) for name in evaluations)
    provenance = {
        **job.identity,
        "versions": job.harness.versions,
        "training_file": str(train_file),
        "evaluation_file": str(eval_file),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    result = XaresLLMResult(job.name, title, expected, tuple(scores.values()), failures, provenance)
    path = job.folder / f"xares-llm-{title}.json"
    write_result(path, result)
    logger.info("%s: result", path)
    return result


def _command(job: _Job, train_file: Path, eval_file: Path, processes: int) -> list[str]:
    """The benchmark's own command line."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes)] if processes > 1 else []
    arguments = [ENCODER, str(train_file), str(eval_file), "--model_args", json.dumps(job.model_args)]
    return [job.harness.python, *launch, "-m", "xares_llm.run", *arguments]
