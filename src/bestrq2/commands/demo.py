"""`bestrq2 demo`: the encoder of the package on sound, then two tiny ones pretrained in minutes, without a GPU."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bestrq2 import flags
from bestrq2.errors import ConfigError, DataError
from bestrq2.progress import starting
from bestrq2.text import counted

if TYPE_CHECKING:
    from bestrq2.data.labels import LabelledTask
    from bestrq2.data.sources import ArraySource, Source
    from bestrq2.evaluate.result import TaskScore
    from bestrq2.inference.embedder import Embedder
    from bestrq2.report.page import ReportContents
    from bestrq2.report.recordings import Recordings

logger = logging.getLogger(__name__)

ENCODER_TASKS = ("speech/voice", "music/instrument", "environment/event")
ENCODER_PAGE = "encoder.html"
# Recordings of a group of which a fifth, at least one, is for test.
_FEWEST_OF_GROUP = 5
RECIPE = "demo"
OBJECTIVES = {"two-step": "two_step", "one-stage": "one_stage"}


@dataclass(frozen=True)
class DemoResult:
    """Result of the demo.

    Attributes:
        scores: probe scores of all features on all tasks.
        summary: the outcome in a sentence.
        report: path of the HTML report.
        encoder_scores: probe scores of the encoder of the package.
        encoder_report: path of its HTML report.
    """

    scores: list[TaskScore]
    summary: str
    report: Path
    encoder_scores: list[TaskScore]
    encoder_report: Path


def demo(
    output: Path = Path("demo"),
    seed: int = 0,
    steps: int | None = None,
    clips: int = 1200,
    train: int = 240,
    test: int = 120,
    data: str | os.PathLike[str] | None = None,
) -> DemoResult:
    """Show what the encoder of the package makes of sound, then pretrain two small ones on SoundWorld.

    Within a minute or two, encoder.html has a map of recordings, their nearest neighbours and probe scores. Then a
    two-step and a one-stage encoder are pretrained with equal compute and probed beside baselines, for report.html.

    Args:
        output: folder to write, with both pages, both runs and the scores; an earlier demo there is replaced.
        seed: random seed of weights, data order, crops and masks.
        steps: training steps of the two-step encoder; those of the recipe by default.
        clips: unlabelled clips of 10 s for pretraining.
        train: labelled clips per task for fitting the probes; encoder.html takes half of them.
        test: labelled clips per task for scoring the probes.
        data: folder of recordings, or other audio as for `bestrq2 pretrain`, of which encoder.html shows up to 400;
            its probes tell their top folders, or labels, apart. Clips of SoundWorld by default.

    Returns:
        Scores and paths of both reports, and a summary of the comparison.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    for name, value in (("steps", steps), ("clips", clips), ("train", train), ("test", test)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    from bestrq2.files import disk_errors

    with starting("demo"), disk_errors(Path(output)):
        from bestrq2.data.open_source import open_source

        source = None if data is None else open_source(os.fspath(data))
        folder = _fresh_folder(Path(output))
        encoder_scores = _show_encoder(folder / ENCODER_PAGE, source, seed, max(2, train // 2), test)
        scores, summary = _compare_objectives(folder, seed, steps, clips, train, test)
        return DemoResult(scores, summary, folder / "report.html", encoder_scores, folder / ENCODER_PAGE)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 demo`."""
    result = demo(**flags.parse_command(demo, argv))
    from bestrq2.evaluate.score_table import format_scores

    print(format_scores(result.scores))
    print(f"\n{result.summary}\nreports: {result.encoder_report}, {result.report}")


# --- the encoder of the package ---


def _show_encoder(page: Path, source: Source | None, seed: int, train: int, test: int) -> list[TaskScore]:
    """Write the page of the encoder of the package on recordings, or on clips of SoundWorld, and log its scores."""
    from bestrq2.data.labels import soundworld_tasks
    from bestrq2.evaluate.probe import LogMelStatistics, probe_all
    from bestrq2.evaluate.score_table import format_scores
    from bestrq2.inference.embedder import load
    from bestrq2.inference.info import model_info
    from bestrq2.report.embeddings import embedded_recordings, embedded_task_clips
    from bestrq2.report.page import ReportContents, corpus_name, write_report
    from bestrq2.report.recordings import shown_recordings

    embedder = load()
    name, sound, grouped_by, notes = embedder.name, "generated sound", "domain", ["Made by: bestrq2 demo"]
    if source is None:
        tasks = soundworld_tasks(ENCODER_TASKS, train, test)
        clips = embedded_task_clips(embedder, tasks)
    else:
        recordings = shown_recordings(source, None, embedder.config, seed)
        if not recordings.names:
            raise DataError(f"{source.name}: none of {counted(len(source), 'recording')} can be used")
        sound, grouped_by = corpus_name(source.name), recordings.grouped_by
        notes.insert(
            0, f"Of longer recordings, {embedder.config.max_seconds:g} s at a place that the seed draws are used."
        )
        tasks = _group_tasks(recordings, embedder.config.sampling_rate, seed)
        clips = embedded_recordings(embedder, recordings)
    scores = probe_all([embedder, LogMelStatistics()], tasks, seed)
    lead = (
        f"{name} comes with the package. It turned {counted(len(clips), 'recording')} into embeddings, lists of "
        f"{clips[0].vector.size} numbers, which are similar where it takes the sound to be alike: hear for yourself."
    )
    probes = " Probes, small classifiers, show what can be read off embeddings, beside the log-mel spectrogram."
    contents = ReportContents(
        title=f"{name} on {sound}",
        lead=lead + probes * bool(scores),
        facts={key: fact for key, fact in model_info(name).items() if key != "model"},
        probes=scores,
        clips=clips,
        grouped_by=grouped_by,
        notes=notes,
    )
    write_report(page, contents)
    table = format_scores(scores) if scores else "no probes: they take two folders or labels of five recordings each"
    logger.info("%s\n\n%s on %s, with map and neighbours to hear: %s", table, name, sound, page)
    return scores


def _group_tasks(recordings: Recordings, rate: int, seed: int) -> list[LabelledTask]:
    """The task of telling the groups of recordings apart; none where fewer than two groups are large enough."""
    import numpy as np

    from bestrq2.data.labels import LabelledClips, LabelledTask
    from bestrq2.data.splits import stratified_splits

    groups = recordings.groups
    classes = tuple(sorted({group for group in groups if group and groups.count(group) >= _FEWEST_OF_GROUP}))
    if len(classes) < 2:
        return []
    places = np.array([place for place, group in enumerate(groups) if group in classes])
    labels = np.array([classes.index(groups[place]) for place in places])
    drawn = stratified_splits(np.eye(len(classes))[labels], [""] * len(places), ("train", "test"), seed)
    splits = (
        LabelledClips([recordings.waveforms[place] for place in places[drawn == split]], labels[drawn == split], rate)
        for split in ("train", "test")
    )
    return [LabelledTask(recordings.grouped_by, "", "clip", classes, *splits)]


# --- two steps against one stage ---


def _compare_objectives(
    output: Path, seed: int, steps: int | None, clips: int, train: int, test: int
) -> tuple[list[TaskScore], str]:
    """Pretrain both encoders and write their scores and report; returns the scores and the outcome in a sentence."""
    from bestrq2 import soundworld
    from bestrq2.commands.pretrain import pretrain
    from bestrq2.data.labels import soundworld_tasks
    from bestrq2.data.sources import ArraySource
    from bestrq2.evaluate.probe import LogMelStatistics, probe_all, random_twin
    from bestrq2.evaluate.provenance import software_provenance
    from bestrq2.evaluate.result import PROBE, Result, write_result
    from bestrq2.evaluate.score_table import all_means
    from bestrq2.inference.embedder import Embedder, load
    from bestrq2.report.page import write_report

    source = ArraySource(soundworld.unlabelled(clips), soundworld.SAMPLE_RATE, f"soundworld:{clips}")
    tasks = soundworld_tasks(train=train, test=test)
    embedders: list[Embedder] = []
    for label, run_steps in equal_compute_steps(steps).items():
        logger.info("pretraining the %s encoder, %d steps", label, run_steps)
        run = pretrain(
            recipe=RECIPE,
            data=source,
            output=output / label,
            seed=seed,
            model={"objective": OBJECTIVES[label]},
            trainer={"max_steps": run_steps},
        )
        embedders.append(Embedder(load(run).model, name=label))
    scores = probe_all([*embedders, random_twin(embedders[0]), LogMelStatistics()], tasks, seed)
    result = Result(PROBE, embedders[0].name, tuple(scores), {}, software_provenance(["bestrq2 demo"]))
    write_result(output / "probes.json", result, all_means(scores))
    summary = _summary(scores)
    write_report(output / "report.html", _contents(output, scores, summary, embedders[0], tasks, source))
    return scores, summary


def equal_compute_steps(steps: int | None) -> dict[str, int]:
    """Steps per objective for equal training GFLOPs; `steps` are those of the two-step encoder."""
    from bestrq2.inference.cost import cost
    from bestrq2.model.configuration_bestrq2 import BestRQ2Config
    from bestrq2.recipe_book import recipe

    settings = recipe(RECIPE)
    wanted = settings["trainer"]["max_steps"] if steps is None else steps
    gflops = {
        label: cost(BestRQ2Config(**{**settings["model"], "objective": objective})).training_gflops
        for label, objective in OBJECTIVES.items()
    }
    return {label: max(1, round(wanted * gflops["two-step"] / each)) for label, each in gflops.items()}


def _fresh_folder(output: Path) -> Path:
    """An empty folder; an earlier demo in it is deleted, other files are refused."""
    if output.is_dir() and any(output.iterdir()):
        ours = {*OBJECTIVES, ENCODER_PAGE, "report.html", "probes.json"}
        if not {entry.name for entry in output.iterdir()} <= ours:
            raise ConfigError(f"{output}: holds files that are not a demo's; name a new folder with --output")
        for entry in output.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    output.mkdir(parents=True, exist_ok=True)
    return output


def _summary(scores: list[TaskScore]) -> str:
    from bestrq2.evaluate.score_table import domain_means

    means = {
        features: domain_means(scores, "linear", features)["mean"]
        for features in dict.fromkeys(score.features for score in scores)
    }
    gain = 100 * (means["two-step"] - means["random encoder"])
    listed = ", ".join(f"{features} {100 * mean:.1f}" for features, mean in means.items())
    return (
        f"Mean linear-probe score over the domains, in percent: {listed}. Two-step pretraining changed the encoder by "
        f"{gain:+.1f} points against random weights."
    )


def _contents(
    output: Path,
    scores: list[TaskScore],
    summary: str,
    embedder: Embedder,
    tasks: list[LabelledTask],
    source: ArraySource,
) -> ReportContents:
    """The contents of the report."""
    import numpy as np

    from bestrq2 import soundworld
    from bestrq2.convert.weights import load_model_folder
    from bestrq2.inference.cost import cost
    from bestrq2.model.modeling_bestrq2 import BestRQ2ForPreTraining
    from bestrq2.report.embeddings import embedded_task_clips
    from bestrq2.report.page import ReportContents
    from bestrq2.report.patches import mask_example
    from bestrq2.report.runs import read_curves

    model = load_model_folder(output / "two-step" / "model", BestRQ2ForPreTraining)
    numbers = cost(model.config)
    hours = len(source) * source.waveforms[0].size / soundworld.SAMPLE_RATE / 3600
    examples = []
    for domain in soundworld.DOMAINS:
        task = next(task for task in tasks if task.domain == domain and task.kind == "clip")
        label = task.classes[int(task.test.labels[0])]
        waveform = np.asarray(task.test.audio[0], dtype=np.float32)
        examples.append(mask_example(model, waveform, f"{domain}: {task.name.split('/')[-1]} = {label}"))
    return ReportContents(
        title="BEST-RQ-2 on SoundWorld",
        lead=f"Two encoders of {numbers.encoder_parameters / 1e6:.2f} M parameters were pretrained on {len(source)} "
        f"synthetic clips ({hours:.1f} h of speech, music and environmental sound) with equal training compute: one in "
        f"two steps (contextualize, then predict), one in a single stage. {summary}",
        facts={
            "encoder": f"{model.config.num_hidden_layers} layers x {model.config.hidden_size}, "
            f"{numbers.encoder_parameters / 1e6:.2f} M parameters",
            "unlabelled audio": f"{len(source)} clips, {hours:.1f} h",
            "speech by": soundworld.synthesiser(),
            "labelled tasks": f"{len(tasks)}, {len(tasks[0].train)} training and {len(tasks[0].test)} test clips each",
            "training compute": f"{numbers.training_gflops:.2f} GFLOPs per clip (two-step)",
        },
        runs=[read_curves(output / label) for label in OBJECTIVES],
        examples=examples,
        probes=scores,
        clips=embedded_task_clips(embedder, tasks),
        notes=[
            "Bars show accuracy (balanced accuracy where the answer changes over time) on held-out clips with 95 % "
            "intervals over the test clips; they do not cover other seeds.",
            "Log-mel statistics (mean and deviation per band) need no training and are a strong baseline on synthetic "
            "sounds.",
            "Made by: bestrq2 demo",
        ],
    )
