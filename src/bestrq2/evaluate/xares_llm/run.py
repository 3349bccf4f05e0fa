"""Entry points of `bestrq2 xares-llm`: an encoder through the benchmark's own training and scoring, and its check."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bestrq2.convert.loading import load_encoder
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.evaluate.provenance import model_name, software_provenance
from bestrq2.evaluate.published import published_averages
from bestrq2.evaluate.result import XARES_LLM, Result, TaskScore, write_result
from bestrq2.evaluate.score_table import mean_of_means
from bestrq2.evaluate.table import Table
from bestrq2.evaluate.xares_llm import harness as package
from bestrq2.evaluate.xares_llm.encoder import BestRQ2Encoder, check_contract, write_encoder
from bestrq2.evaluate.xares_llm.harness import Harness, drop_unfinished, run_harness
from bestrq2.files import disk_errors, folder_lock, write_folder, write_text
from bestrq2.inference.embedder import weights_hash

logger = logging.getLogger(__name__)

ENCODER = f"{BestRQ2Encoder.__module__}.{BestRQ2Encoder.__name__}"
BENCHMARK, METRIC = "XARES-LLM", "score"
DOMAINS = {
    "Speech": (
        "aishell-1 asvspoof2015 cremad fluentspeechcommands libricount librispeech speechcommandsv1 vocalsound "
        "voxceleb1 voxlingua33"
    ),
    "Music": "freemusicarchive gtzan nsynth songdescriber",
    "Environment": "clotho esc-50 fsd50k fsdkaggle2018 urbansound8k",
}
"""Domains of the datasets as in X-ARES; MECAT has sounds of all and is "Other"."""
OTHER = "Other"


@dataclass(frozen=True)
class _Job:
    """One model prepared for the benchmark.

    Attributes:
        name: name of the model.
        folder: folder of this model, these settings and this version of the benchmark.
        identity: weights, options and versions that scores depend on.
        model_args: keyword arguments of `BestRQ2Encoder`.
        harness: the installed benchmark.
    """

    name: str
    folder: Path
    identity: dict[str, Any]
    model_args: dict[str, Any]
    harness: Harness


def run_xares_llm(
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
) -> Result:
    """Train a small language model behind the frozen encoder and score it; see `bestrq2.xares_llm` for the arguments.

    The result is written into the model's folder in `output`, as xares-llm-TASK.json.

    Raises:
        BestRQ2Error: with one sentence that says what to change; failures of the benchmark too.
    """
    if processes < 1:
        raise ConfigError(f"processes must be at least 1, got {processes}")
    settings = dict(training or {})
    if decoder is not None:
        settings["decoder_model_name"] = str(Path(decoder).absolute()) if Path(decoder).is_dir() else decoder
    harness = package.find_harness(python or sys.executable)
    train_file = package.task_file(harness, task, "train")
    if evaluation is None and Path(task).suffix in (".yaml", ".yml"):
        raise ConfigError(f"{task} defines the training only; name what to score with --evaluation NAME or FILE.yaml")
    eval_file = package.task_file(harness, evaluation or task, "eval")
    package.check_tars(train_file, eval_file, data)
    with disk_errors(output):
        job = _prepare(model, output, phases, layers, settings, harness)
        with folder_lock(job.folder):
            environment = package.child_environment(job.folder / "imports", data.absolute())
            package.own_check(job.harness, job.model_args, environment)
            return _run(job, task, train_file, eval_file, settings, processes, environment)


def check_encoder(
    model: str | os.PathLike[str], phases: int = 2, layers: int | None = None, python: str | None = None
) -> str:
    """Check an encoder by the contract of XARES-LLM, and by the benchmark's own check where it is installed.

    Args:
        model: run folder, exported folder, reference checkpoint, recipe name or hub id.
        phases: number of shifted copies of the patch grid.
        layers: hidden layer instead of the encoder's output.
        python: interpreter of the environment with xares_llm; the current one by default.

    Returns:
        What was checked, in a sentence or two.

    Raises:
        BestRQ2Error: the encoder breaks the contract, or cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="bestrq2-xares-llm-") as folder, disk_errors(Path(folder)):
        job = _prepare(model, Path(folder), phases, layers, {}, package.find_harness(python or sys.executable))
        passed = f"{job.name}: keeps the contract of XARES-LLM, {job.identity['output_dim']} values per frame"
        if job.harness.folder is None:
            return f"{passed}. Its own check was not run: {job.harness.python} {package.MISSING}"
        environment = package.child_environment(job.folder / "imports", Path(folder))
        package.own_check(job.harness, job.model_args, environment)
    return f"{passed}. Passed the check of xares_llm {job.harness.versions['xares-llm']} too."


def overall_mean(result: Result) -> float | None:
    """The benchmark's weighted mean; None unless all datasets have a score."""
    total = sum(score.weight for score in result.scores)
    if result.failures or not total:
        return None
    return sum(score.weight * score.score for score in result.scores) / total


def mean_over_domains(result: Result) -> float | None:
    """Mean over domains of their means; None unless all datasets have a score."""
    if result.failures or not result.scores:
        return None
    return mean_of_means((_domain(score.task), score.score) for score in result.scores)["mean"]


def format_llm_result(result: Result) -> str:
    """Format a result as text: scores by domain, their means where nothing is missing, and the published means."""
    known = {score.task: f"{score.score:.3f}" for score in result.scores}
    names = [*known, *result.failures]
    rows: list[tuple[str, ...]] = []
    for domain in (*DOMAINS, OTHER):
        own = [name for name in names if _domain(name) == domain]
        rows += [(domain,), *((f"  {name}", known.get(name, "-")) for name in own)] if own else []
    overall, of_domains = overall_mean(result), mean_over_domains(result)
    if overall is not None and of_domains is not None:
        rows += [("overall (weighted mean)", f"{overall:.3f}"), ("mean of domain means", f"{of_domains:.3f}")]
    task = result.provenance.get("task", "")
    parts = [Table(("", "score"), tuple(rows), f"{BENCHMARK}, {task}: {result.model}").text(width=None)]
    if result.failures:
        lines = [f"no mean: {len(known)} of {len(names)} datasets have a score"]
        parts.append("\n".join([*lines, *(f"  {name}: {reason}" for name, reason in result.failures.items())]))
    published = published_averages(BENCHMARK)
    if published:
        header = ("published, of both tasks together", "overall", "mean of domain means")
        cells = [[f"{float(mean) / 100:.2f}" if mean else "-" for mean in (row.global_mean, row.mean_of_means)]
                 for row in published]  # fmt: skip
        table = Table(header, tuple((row.model, *own) for row, own in zip(published, cells, strict=True)))
        sources = "\n".join(sorted({f"source: {row.source}" for row in published}))
        parts += [table.text(width=None), sources]
    return "\n\n".join(parts)


def read_scores(path: Path) -> list[tuple[str, float, float]]:
    """Dataset, score and weight of every row of the benchmark's scores.tsv, without its row of the mean.

    Raises:
        DataError: the file cannot be read, or a score is not a finite number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if row["Task"] != "Overall"]
        scores = [(_dataset(row["Task"]), float(row["score"]), float(row["weight"])) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as scores of xares_llm ({error!r}); delete it, run again") from error
    for name, score, _ in scores:
        if not math.isfinite(score):
            raise DataError(f"{path}: the score of {name} is {score}; delete it, run again")
    return scores


def _domain(task: str) -> str:
    return next((domain for domain, names in DOMAINS.items() if task in names.split()), OTHER)


def _dataset(name: str) -> str:
    """Name of a dataset without the prefix that it has in files of joint tasks."""
    return name.removeprefix("eval_").lower()


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
        "weights_sha256": weights_hash(encoder),
        "phases": phases,
        "layers": layers,
        "training": settings,
        "bestrq2": software_provenance()["bestrq2"],
        "xares-llm": harness.versions["xares-llm"],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    name = model_name(model)
    folder = (output / f"{name}-{digest[:12]}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "encoder" / "config.json").is_file():
        write_folder(folder / "encoder", lambda fresh: write_encoder(encoder, fresh))
    model_args: dict[str, Any] = {"folder": str(folder / "encoder"), "phases": phases, "layers": layers}
    wrapped = BestRQ2Encoder(**model_args)
    check_contract(wrapped)
    return _Job(name, folder, {**identity, "output_dim": wrapped.output_dim}, model_args, harness)


def _run(
    job: _Job,
    task: str,
    train_file: Path,
    eval_file: Path,
    settings: dict[str, Any],
    processes: int,
    environment: dict[str, str],
) -> Result:
    """Train and score at once; where scoring fails after training, score each remaining dataset by itself."""
    title = Path(task).stem
    own_file = job.folder / f"{title}.yaml"
    content = package.read_task_file(train_file) | settings | {"output_dir": str(job.folder)}
    write_text(own_file, yaml.safe_dump(content, sort_keys=False))
    results, log = job.folder / title, job.folder / f"{title}.log"
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
        for name, value, weight in found:
            scores[name] = TaskScore(job.name, name, XARES_LLM, METRIC, value, domain=_domain(name), weight=weight)

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
                failures[_dataset(name)] = str(failure)
    for name in map(_dataset, evaluations):
        if name not in scores:
            failures.setdefault(name, "the benchmark wrote no score of it")
    provenance = {
        **software_provenance(["bestrq2 xares-llm", job.name, "--task", task]), **job.identity, "task": title,
        "versions": job.harness.versions, "training_file": str(train_file), "evaluation_file": str(eval_file),
    }  # fmt: skip
    result = Result(XARES_LLM, job.name, tuple(scores.values()), failures, provenance)
    path = job.folder / f"xares-llm-{title}.json"
    write_result(path, result, {"overall": overall_mean(result), "mean_of_means": mean_over_domains(result)})
    logger.info("%s: result", path)
    return result


def _command(job: _Job, train_file: Path, eval_file: Path, processes: int) -> Sequence[str]:
    """The benchmark's own command line."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes)] if processes > 1 else []
    arguments = [ENCODER, str(train_file), str(eval_file), "--model_args", json.dumps(job.model_args)]
    return [job.harness.python, *launch, "-m", "xares_llm.run", *arguments]
