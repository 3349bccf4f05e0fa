"""Entry points of `bestrq2 xares-llm`: an encoder through the benchmark's own training and scoring, and its check."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bestrq2.convert.loading import load_encoder
from bestrq2.convert.weights import quiet_hub
from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.evaluate.provenance import model_name, software_provenance
from bestrq2.evaluate.published import published_averages
from bestrq2.evaluate.result import XARES_LLM, Result, TaskScore, write_result
from bestrq2.evaluate.score_table import mean_of_means
from bestrq2.evaluate.table import Table
from bestrq2.evaluate.xares_llm import harness as package
from bestrq2.evaluate.xares_llm import task_files
from bestrq2.evaluate.xares_llm.encoder import BestRQ2Encoder, check_contract
from bestrq2.evaluate.xares_llm.harness import MISSING, Harness, drop_unfinished, read_score, run_harness
from bestrq2.evaluate.xares_llm.task_files import dataset_name, is_custom, read_task_file
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
    "Other": "mecat",
}
"""Domains of the datasets as in X-ARES; MECAT has sounds of all and is "Other", as are datasets of one's own."""
OTHER = "Other"


@dataclass(frozen=True)
class _Job:
    """One model prepared for the benchmark.

    Attributes:
        name: name of the model.
        folder: folder of this model, these settings and this version of the benchmark.
        identity: weights, options and versions that scores depend on.
        model_args: keyword arguments of `BestRQ2Encoder`.
    """

    name: str
    folder: Path
    identity: dict[str, Any]
    model_args: dict[str, Any]


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
    tasks = harness.check_versions() / "tasks"
    train_file = task_files.task_file(tasks, task, "train")
    if evaluation is None and is_custom(task):
        raise ConfigError(f"{task} defines the training only; name what to score with --evaluation NAME or FILE.yaml")
    eval_file = task_files.task_file(tasks, evaluation or task, "eval")
    task_files.check_tars(train_file, eval_file, data)
    content, evaluations = read_task_file(train_file) | settings, read_task_file(eval_file)
    task_files.check_models(content.get("decoder_model_name", task_files.DECODER), evaluations)
    several = ["-m", "accelerate.commands.launch", "--num_processes", str(processes)] if processes > 1 else []
    with disk_errors(output):
        job = _prepare(model, output, {"phases": phases, "layers": layers, "training": settings}, harness)
        with folder_lock(job.folder):
            environment = package.child_environment(job.folder / "imports", data.absolute())
            audio = package.own_check(harness, job.model_args, environment)
            title = f"{Path(task).stem}-{_digest(content)[:8]}" if is_custom(task) else task  # of what the file says
            command = [harness.python, *several, "-m", package.LAUNCH]
            failures = _run(job, title, content, eval_file, evaluations, command, environment)
            provenance = {
                **software_provenance(["bestrq2 xares-llm", job.name, "--task", task]), **job.identity, "task": title,
                "evaluation": evaluation or task, "versions": harness.versions | {"torchaudio": audio},
                "training_file": str(train_file), "evaluation_file": str(eval_file),
            }  # fmt: skip
            return _collect(job, title, evaluations, failures, provenance)


def check_encoder(
    model: str | os.PathLike[str], phases: int = 2, layers: int | None = None, python: str | None = None
) -> str:
    """Check an encoder by the contract of XARES-LLM, and by the benchmark's own check where it is installed.

    Returns:
        What was checked, in a sentence or two.

    Raises:
        BestRQ2Error: the encoder breaks the contract or cannot be loaded, or the benchmark does not run there.
    """
    harness = package.find_harness(python or sys.executable)
    if harness.folder is not None:
        harness.check_versions()
    with tempfile.TemporaryDirectory(prefix="bestrq2-xares-llm-") as folder, disk_errors(Path(folder)):
        job = _prepare(model, Path(folder), {"phases": phases, "layers": layers}, harness)
        passed = f"{job.name}: keeps the contract of XARES-LLM, {job.identity['output_dim']} values per frame"
        if harness.folder is None:
            return f"{passed}. Its own check was not run: {harness.python} {MISSING}"
        environment = package.child_environment(job.folder / "imports", Path(folder))
        audio = package.own_check(harness, job.model_args, environment)
    benchmark = " ".join(filter(None, ("xares_llm", harness.versions["xares-llm"])))
    return f"{passed}. Passed the check of {benchmark} too; audio is decoded by {audio}."


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


def result_parts(result: Result) -> list[Table | str]:
    """Scores by domain and their means, beside the published means where those are of the same tasks and training."""
    known = {score.task: f"{score.score:.3f}" for score in result.scores}
    names = [*known, *result.failures]
    rows: list[tuple[str, ...]] = []
    for domain in DOMAINS:
        own = [name for name in names if _domain(name) == domain]
        rows += [(domain,), *((f"  {name}", known.get(name, "-")) for name in own)] if own else []
    overall, of_domains = overall_mean(result), mean_over_domains(result)
    if overall is not None and of_domains is not None:
        rows += [("overall (weighted mean)", f"{overall:.3f}"), ("mean of domain means", f"{of_domains:.3f}")]
    title = f"{BENCHMARK}, {result.provenance.get('task', '')}: {result.model}"
    parts: list[Table | str] = [Table(("", "score"), tuple(rows), title)]
    if result.failures:
        lines = [f"no mean: {len(known)} of {len(names)} datasets have a score"]
        parts.append("\n".join([*lines, *(f"  {name}: {reason}" for name, reason in result.failures.items())]))
    return [*parts, *_published_parts(result)]


def _published_parts(result: Result) -> list[Table | str]:
    everything = {name for names in DOMAINS.values() for name in names.split()}
    protocol = [result.provenance.get(name) for name in ("task", "evaluation", "training")]
    if result.failures or protocol != ["all", "all", {}] or {score.task for score in result.scores} != everything:
        return [
            f"Published means are of all {len(everything)} datasets (--task all) with the benchmark's own language "
            "model and settings, so none stands beside this result."
        ]
    published = published_averages(BENCHMARK)
    cells = [[f"{float(mean) / 100:.2f}" for mean in (row.global_mean, row.mean_of_means)] for row in published]
    header = ("published, of both tasks together", "overall", "mean of domain means")
    table = Table(header, tuple((row.model, *own) for row, own in zip(published, cells, strict=True)))
    return [table, "\n".join(sorted({f"source: {row.source}" for row in published}))]


def _domain(task: str) -> str:
    return next((domain for domain, names in DOMAINS.items() if task in names.split()), OTHER)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _prepare(model: str | os.PathLike[str], output: Path, options: dict[str, Any], harness: Harness) -> _Job:
    """Load, write and check the encoder."""
    encoder = load_encoder(model)
    identity = {
        "weights_sha256": weights_hash(encoder), **options, "bestrq2": software_provenance()["bestrq2"],
        "xares-llm": harness.versions["xares-llm"],
    }  # fmt: skip
    if encoder.config.readout:
        identity["readout"] = encoder.config.readout
    name = model_name(model)
    folder = (output / f"{name}-{_digest(identity)[:12]}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "encoder" / "config.json").is_file():
        with quiet_hub():
            write_folder(folder / "encoder", encoder.save_pretrained)
    model_args = {"folder": str(folder / "encoder"), "phases": options["phases"], "layers": options["layers"]}
    wrapped = BestRQ2Encoder(**model_args)
    check_contract(wrapped)
    return _Job(name, folder, {**identity, "output_dim": wrapped.output_dim}, model_args)


def _run(
    job: _Job,
    title: str,
    content: dict[str, Any],
    eval_file: Path,
    evaluations: dict[str, Any],
    command: list[str],
    environment: dict[str, str],
) -> dict[str, str]:
    """Train and score at once; where scoring fails after training, score each remaining dataset by itself.

    Returns:
        Dataset → error for those whose scoring failed.
    """
    train_file, results = job.folder / f"{title}.yaml", job.folder / title
    write_text(train_file, yaml.safe_dump(content | {"output_dir": str(job.folder)}, sort_keys=False))

    def score(file: Path) -> None:
        arguments = [ENCODER, str(train_file), str(file), "--model_args", json.dumps(job.model_args)]
        run_harness([*command, *arguments], environment, job.folder / f"{title}.log")

    drop_unfinished(results)
    _drop_redefined(job.folder / f"{title}-scored.yaml", evaluations, results)
    failures: dict[str, str] = {}
    try:
        score(eval_file)
    except BestRQ2Error as error:
        if not drop_unfinished(results):
            raise
        logger.warning("%s; the datasets are now scored one by one", error)
        for name in [name for name in evaluations if _score(results, name) is None]:
            single = job.folder / f"{title}-{name}.yaml"
            write_text(single, yaml.safe_dump({name: evaluations[name]}, sort_keys=False))
            try:
                score(single)
            except BestRQ2Error as failure:
                failures[dataset_name(name)] = str(failure)
    return failures


def _drop_redefined(record: Path, evaluations: dict[str, Any], results: Path) -> None:
    """Delete scores of datasets that were defined otherwise: the benchmark keeps scores by name alone."""
    before = read_task_file(record) if record.is_file() else {}
    for name, entry in evaluations.items():
        if before.get(name, entry) != entry:
            for cache in results.glob(f"*/score_{name}.yaml"):
                cache.unlink()
    write_text(record, yaml.safe_dump(before | evaluations, sort_keys=False))


def _score(results: Path, name: str) -> float | None:
    return next((read_score(cache) for cache in results.glob(f"*/score_{name}.yaml")), None)


def _collect(
    job: _Job, title: str, evaluations: dict[str, Any], failures: dict[str, str], provenance: dict[str, Any]
) -> Result:
    """Read the scores that the benchmark kept, and write the result."""
    scores = []
    for entry_name, entry in evaluations.items():
        name, value = dataset_name(entry_name), _score(job.folder / title, entry_name)
        if value is not None and math.isfinite(value):
            weight = float(entry.get("weight", 1))
            scores.append(TaskScore(job.name, name, XARES_LLM, METRIC, value, domain=_domain(name), weight=weight))
        else:
            failures.setdefault(
                name, "the benchmark wrote no score of it" if value is None else f"its score is {value}"
            )
    result = Result(XARES_LLM, job.name, tuple(scores), failures, provenance, result_parts)
    path = job.folder / f"xares-llm-{title}.json"
    write_result(path, result, {"overall": overall_mean(result), "mean_of_means": mean_over_domains(result)})
    logger.info("%s: result", path)
    return result
