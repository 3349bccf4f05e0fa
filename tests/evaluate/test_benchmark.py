"""soundworld-1: what is frozen, how frames are judged, and its result files."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from toy_tasks import WaveformFeatures, make_clip_task, make_frame_task

import bestrq2
from bestrq2.cli import run
from bestrq2.data import soundworld
from bestrq2.data.labelled import LabelledClips, LabelledTask
from bestrq2.errors import BestRQ2Error, CheckpointError, ConfigError, DataError
from bestrq2.evaluate import benchmark as module
from bestrq2.evaluate.benchmark import (
    BENCHMARKS,
    SOUNDWORLD_1,
    Benchmark,
    BenchmarkTask,
    answers_on_grid,
    benchmark_means,
    grid_points,
    nearest_frames,
    run_benchmark,
)
from bestrq2.evaluate.benchmark_result import BenchmarkResult, model_provenance, read_result, result_of, write_result
from bestrq2.evaluate.probe import ProbeRows, embed_split
from bestrq2.evaluate.scores import ProbeScore, balanced_accuracy_with_interval
from bestrq2.evaluate.xares_probe import xares_knn_predict, xares_linear_predict
from bestrq2.inference.cost import cost

SMALL = Benchmark(
    name="soundworld-1",
    tasks=(
        BenchmarkTask("speech/toy", "speech"),
        BenchmarkTask("music/toy", "music"),
        BenchmarkTask("environment/present", "environment", "balanced accuracy"),
    ),
    train=40,
    test=30,
    epochs=2,
    frame_grid_seconds=2 / 16_000,  # toy clips are a few samples long
)


def toy_tasks() -> list[LabelledTask]:
    clips = make_clip_task(width=6, train=40, test=30)
    speech = dataclasses.replace(make_clip_task(1, width=6, train=40, test=30), name="speech/toy", domain="speech")
    return [speech, clips, make_frame_task()]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[LabelledTask]:
    """soundworld-1 on three toy tasks; espeak-ng need not be installed."""
    tasks = toy_tasks()
    monkeypatch.setitem(BENCHMARKS, "soundworld-1", SMALL)
    monkeypatch.setattr(soundworld, "synthesiser", lambda: "espeak")
    monkeypatch.setattr(soundworld, "tasks", lambda *arguments, **options: tasks)
    return tasks


def result(names: tuple[str, ...] = ("mine", "log-mel statistics")) -> BenchmarkResult:
    scores = run_benchmark([WaveformFeatures(6, name) for name in names], SMALL, progress=False)
    return result_of(SMALL, names[0], scores, {"model": "runs/mine", "seed": 3, "data": None})


def test_the_frozen_protocol_is_what_it_was():
    """A change here makes old and new scores incomparable: give it another name instead."""
    protocol = SOUNDWORLD_1.protocol()
    tasks = protocol.pop("tasks")
    assert protocol == {
        "train": 400,
        "test": 200,
        "world_seed": 0,
        "soundworld_version": "2",
        "synthesiser": "espeak",
        "epochs": 100,
        "batch_clips": 32,
        "lr": 0.001,
        "seed": 42,
        "knn_k": 10,
        "knn_temperature": 0.07,
        "frame_grid_seconds": 0.04,
    }
    assert [task["name"] for task in tasks] == [
        "speech/language",
        "speech/voice",
        "speech/word",
        "speech/speakers",
        "music/instrument",
        "music/chord",
        "music/key",
        "music/tempo",
        "music/melody",
        "environment/event",
        "environment/count",
        "environment/rhythm",
        "environment/distance",
        "environment/presence",
    ]
    assert json.loads(json.dumps(SOUNDWORLD_1.protocol())) == SOUNDWORLD_1.protocol()


def test_the_frozen_tasks_are_soundworlds():
    for task in SOUNDWORLD_1.tasks:
        spec = soundworld.TASKS[task.name]
        assert task.domain == spec.domain == task.name.split("/")[0]
        assert task.metric == ("balanced accuracy" if spec.kind == "frame" else "accuracy")


def test_the_benchmark_asks_for_the_frozen_audio(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def tasks(names, train, test, seed, progress):
        asked.append((names, train, test, seed))
        return []

    monkeypatch.setattr(soundworld, "synthesiser", lambda: "espeak")
    monkeypatch.setattr(soundworld, "tasks", tasks)
    assert run_benchmark([WaveformFeatures(6)]) == []
    assert asked == [([task.name for task in SOUNDWORLD_1.tasks], 400, 200, 0)]


def test_scores_are_those_of_the_probe_on_clip_tasks(small):
    scores = run_benchmark([WaveformFeatures(6)], SMALL, progress=False)
    assert [(score.task, score.method) for score in scores] == [
        (task.name, method) for task in SMALL.tasks for method in ("linear", "knn")
    ]
    train, test = (embed_split(WaveformFeatures(6), small[1], split) for split in ("train", "test"))
    linear = xares_linear_predict(train.features, train.labels, test.features, epochs=2, batch=32, lr=1e-3, seed=42)
    nearest = xares_knn_predict(train.features, train.labels, test.features)
    assert [score.score for score in scores[2:4]] == [(linear == test.labels).mean(), (nearest == test.labels).mean()]
    assert {score.n_test for score in scores} == {30}
    assert [score.metric for score in scores[3:5]] == ["accuracy", "balanced accuracy"]
    assert scores[4].chance == 0.5


def test_domains_count_the_same_in_the_mean(small):
    means = benchmark_means(run_benchmark([WaveformFeatures(6)], SMALL, progress=False))
    linear = means["waveform"]["linear"]
    assert list(linear) == ["speech", "music", "environment", "mean"]
    assert linear["mean"] == pytest.approx((linear["speech"] + linear["music"] + linear["environment"]) / 3)


def test_the_same_features_get_the_same_scores_again(small):
    first = run_benchmark([WaveformFeatures(6)], SMALL, progress=False)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert run_benchmark([WaveformFeatures(6)], SMALL, progress=False) == first


def test_grid_points_are_the_centres_of_40_ms():
    clips = LabelledClips([np.zeros(size, np.float32) for size in (80_000, 1919, 1920, 100)], [None] * 4, 16_000)
    points = grid_points(clips, 0.04)
    assert [len(one) for one in points] == [125, 2, 3, 1]
    np.testing.assert_allclose(points[0][[0, 1, -1]], [0.02, 0.06, 4.98])
    np.testing.assert_allclose(points[3], [0.02])
    with pytest.raises(DataError, match="needs waveforms"):
        grid_points(LabelledClips([Path("a.wav")], [None]), 0.04)


def test_each_point_takes_the_nearest_frame_and_the_earlier_of_two():
    frames = (np.arange(3) + 0.5) * 0.08  # 0.04, 0.12, 0.20
    points = (np.arange(8) + 0.5) * 0.04  # 0.02, 0.06, 0.10, ...
    assert nearest_frames(frames, points).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    fine = (np.arange(16) + 0.5) * 0.02  # 0.01, 0.03: every point lies between two
    assert nearest_frames(fine, points).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def test_frame_answers_are_judged_on_the_grid():
    """Clips of 0.4 s, 10 moments each, and a hop of 0.16 s: the frames answer for 4, 4 and 2 of them."""
    waves = [np.zeros(6400, np.float32)] * 3
    events = [np.array([[0.1, 0.25]]), np.array([[0.0, 0.1]]), np.zeros((0, 2))]
    clips = LabelledClips(waves, events, 16_000)
    task = LabelledTask("environment/presence", "environment", "frame", ("absent", "present"), clips, clips)
    rows = ProbeRows(
        features=np.zeros((5, 1)),
        labels=np.zeros(5, np.int64),
        clip=np.array([0, 0, 0, 2, 2]),  # clip 1 has no frames
        seconds=np.array([0.08, 0.24, 0.40, 0.08, 0.24]),
        skipped=(),
    )
    truth, answers, clip = answers_on_grid(task, rows, np.array([0, 1, 0, 1, 0]), 0.04)
    assert clip.tolist() == [0] * 10 + [2] * 10
    # moments 0.02, 0.06, 0.10 | 0.14 .. 0.22 | 0.26 ..; the event is from 0.10 to 0.25
    assert truth.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, *[0] * 10]
    assert answers.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, *[1] * 4, *[0] * 6]
    score = balanced_accuracy_with_interval(truth, answers, clip)[0]
    assert score == pytest.approx((2 / 4 + (2 + 2 + 6) / 16) / 2)


def test_encoders_of_any_hop_are_judged_on_the_same_moments(small, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def record(name, task, method, labels, truth, answers, clip, **options):
        seen.append((truth, clip))
        return ProbeScore(name, task.name, task.domain, method, "balanced accuracy", 0.5, 0.4, 0.6, 0.5, 30)

    monkeypatch.setattr(soundworld, "tasks", lambda *arguments, **options: [small[2]])
    monkeypatch.setattr(module, "score_answers", record)
    run_benchmark([WaveformFeatures(6, "coarse"), WaveformFeatures(2, "fine")], SMALL, progress=False)
    for coarse, fine in zip(seen[0], seen[2], strict=True):
        np.testing.assert_array_equal(coarse, fine)


def test_another_soundworld_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soundworld, "VERSION", "3")
    with pytest.raises(DataError, match=r"soundworld-1 is frozen at version 2 of SoundWorld, but this is version 3"):
        run_benchmark([WaveformFeatures(6)])


def test_other_voices_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soundworld, "synthesiser", lambda: "formant")
    with pytest.raises(DataError, match=r"needs the espeak synthesiser.*pip install 'bestrq2\[demo\]'"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-1")


def test_two_features_of_one_name_are_refused(small):
    with pytest.raises(DataError, match="a name of its own"):
        run_benchmark([WaveformFeatures(6), WaveformFeatures(6)], SMALL)


def test_an_encoder_that_rejects_clips_is_refused(small):
    audio = [*small[0].test.audio]
    audio[4] = np.full_like(audio[4], np.nan)
    small[0] = dataclasses.replace(small[0], test=dataclasses.replace(small[0].test, audio=audio))
    with pytest.raises(DataError, match=r"counts every clip: it rejects 1 of speech/toy, the first: test clip 4"):
        run_benchmark([WaveformFeatures(6)], SMALL, progress=False)


def test_a_result_comes_back_from_its_file(small, tmp_path: Path):
    written = result()
    write_result(tmp_path / "soundworld-1.json", written)
    assert read_result(tmp_path / "soundworld-1.json") == written
    content = json.loads((tmp_path / "soundworld-1.json").read_text())
    assert list(content) == ["format", "benchmark", "protocol", "provenance", "features", "scores", "means"]
    assert (content["format"], content["benchmark"], content["features"]) == (1, "soundworld-1", "mine")
    assert content["protocol"]["epochs"] == 2
    assert content["means"] == written.means
    assert list(content["means"]["mine"]["knn"]) == ["speech", "music", "environment", "mean"]
    assert [path.name for path in tmp_path.iterdir()] == ["soundworld-1.json"], "no temporary file is left"


def test_a_row_with_the_linear_probe_only_is_a_result(small, tmp_path: Path):
    whole = result()
    linear = tuple(score for score in whole.scores if score.method == "linear")
    write_result(tmp_path / "a.json", dataclasses.replace(whole, scores=linear))
    assert list(read_result(tmp_path / "a.json").means["mine"]) == ["linear"]


def edit_score(content: dict, **changes) -> None:
    content["scores"][0] |= changes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.update(format=2), "no benchmark's result of format 1"),
        (lambda content: content.update(benchmark="soundworld-9"), "no benchmark 'soundworld-9'.*are: soundworld-1"),
        (lambda content: content.pop("provenance"), "misses the field 'provenance'"),
        (lambda content: content.update(scores={}), "something else than expected in the field 'scores'"),
        (lambda content: content["scores"][0].pop("low"), r"missing fields \['low'\]"),
        (lambda content: content["scores"].append("x"), "Not a probe score|object has no attribute|not iterable"),
        (lambda content: edit_score(content, metric="f1"), "speech/toy has the metric 'f1', but .* scores accuracy"),
        (lambda content: edit_score(content, metric="balanced accuracy"), "metric 'balanced accuracy', but"),
        (lambda content: edit_score(content, method="svm"), "the method 'svm'"),
        (lambda content: edit_score(content, domain="music"), "counts for 'music', but in soundworld-1 for 'speech'"),
        (lambda content: edit_score(content, n_test=29), "made on 29 clips, but soundworld-1 has 30"),
        (lambda content: edit_score(content, score=1.5), "no share inside an interval"),
        (lambda content: edit_score(content, score=float("nan")), "no share inside an interval"),
        (lambda content: edit_score(content, task="speech/other"), "misses speech/toy and has foreign speech/other"),
        (lambda content: content["scores"].pop(3), r"tasks of mine \(knn\) are not .*: it misses music/toy"),
        (lambda content: content["scores"].append(content["scores"][0]), "repeats speech/toy"),
        (lambda content: content.update(scores=[]), "there are no scores"),
        (lambda content: content.update(features="other"), "no score is of 'other'"),
        (lambda content: content["protocol"].update(epochs=3), "has epochs 3, but soundworld-1 has 2"),
        (lambda content: content["protocol"].pop("lr"), "misses 'lr'"),
        (lambda content: content["protocol"]["tasks"].pop(), "lists other tasks"),
        (lambda content: content["means"]["mine"]["knn"].update(mean=0.99), "means are not those of its scores"),
        (lambda content: content["means"].pop("mine"), "means are not those of its scores"),
    ],
)
def test_bad_results_are_refused_by_name(small, tmp_path: Path, edit, message):
    path = tmp_path / "result.json"
    write_result(path, result())
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_result(path)
    assert str(caught.value).startswith(str(path))
    assert "write it anew with `bestrq2 probe MODEL BENCHMARK`" in str(caught.value)


def test_files_that_are_no_results_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"missing\.json cannot be read"):
        read_result(tmp_path / "missing.json")
    for text in (
        "{",
        "[]",
        "\ud800".encode("utf-16-le", "surrogatepass").decode("latin-1"),
        '{"format": 1, "scores": []}',
    ):
        (tmp_path / "bad.json").write_text(text, encoding="latin-1")
        with pytest.raises(DataError, match=r"bad\.json (cannot|is no|misses)"):
            read_result(tmp_path / "bad.json")


def test_results_that_could_not_be_read_are_not_written(small, tmp_path: Path):
    broken = dataclasses.replace(result(), features="other")
    with pytest.raises(DataError, match="no score is of 'other'"):
        write_result(tmp_path / "a.json", broken)
    assert not (tmp_path / "a.json").exists()


def make_run(folder: Path, config: bestrq2.BestRQ2Config, steps: list[int] | None = None) -> Path:
    """A folder as a run leaves it, of 40 steps."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    bestrq2.BestRQ2ForPreTraining(config).save_pretrained(folder / "model")
    settings = {
        "recipe": "best-rq-2-tiny", "data": "soundworld:4000", "seed": 7, "trainer": {"max_steps": 40},
        "loader": {"batch_size": 16},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if steps is not None:
        (folder / "metrics.csv").write_text("step,train/loss\n" + "".join(f"{step},1.0\n" for step in steps))
    return folder


def use_toy_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy clips are a few samples long: describe them by their samples in place of an encoder."""
    from bestrq2.evaluate.baselines import LogMelStatistics
    from bestrq2.inference.embedder import Embedder

    for kind in (Embedder, LogMelStatistics):
        monkeypatch.setattr(kind, "embed", lambda self, audio, rate=None: WaveformFeatures(6).embed(audio, rate))


def test_a_run_folder_gets_its_result(small, tmp_path: Path, tiny_config, monkeypatch, capsys):
    use_toy_features(monkeypatch)
    folder = make_run(tmp_path / "first run", tiny_config(), [20, 40])
    assert run(["probe", str(folder), "soundworld-1", "--output", str(tmp_path / "copy.json")]) == 0
    table = capsys.readouterr().out
    assert table.startswith("linear probe")
    assert "Chance: always the most frequent training class." in table
    read = read_result(folder / "soundworld-1.json")
    assert read_result(tmp_path / "copy.json") == read
    assert read.features == "first run"
    assert list(read.means) == ["first run", "random encoder", "log-mel statistics"]
    numbers = cost(tiny_config())
    created = datetime.fromisoformat(read.provenance.pop("created"))
    assert created.utcoffset().total_seconds() == 0
    assert read.provenance == {
        "model": str(folder),
        "recipe": "best-rq-2-tiny",
        "data": "soundworld:4000",
        "seed": 7,
        "steps": 40,
        "batch_size": 16,
        "training_gflops": numbers.training_gflops * 16 * 40,
        "step": 40,
        "finished": True,
        "encoder_parameters": numbers.encoder_parameters,
        "objective": "two_step",
        "bestrq2": bestrq2.__version__,
        "torch": torch.__version__,
        "synthesiser": "espeak",
        "soundworld": soundworld.VERSION,
    }


def test_a_model_that_is_no_run_is_written_where_told_only(small, tmp_path: Path, tiny_config, monkeypatch):
    use_toy_features(monkeypatch)
    folder = make_run(tmp_path / "run", tiny_config()) / "model"
    before = sorted(path.name for path in folder.iterdir())
    scores = bestrq2.probe(folder, "soundworld-1", baselines=False)
    assert {score.features for score in scores} == {"model"}
    assert sorted(path.name for path in folder.iterdir()) == before
    bestrq2.probe(folder, "soundworld-1", baselines=False, output=tmp_path / "out.json")
    read = read_result(tmp_path / "out.json")
    assert read.scores == tuple(scores)
    assert read.provenance["training_gflops"] is read.provenance["step"] is read.provenance["recipe"] is None


def test_a_run_is_called_by_its_folder_however_it_is_given(small, tmp_path: Path, tiny_config, monkeypatch):
    use_toy_features(monkeypatch)
    monkeypatch.chdir(make_run(tmp_path / "mine", tiny_config()))
    assert bestrq2.probe(".", "soundworld-1", baselines=False)[0].features == "mine"
    assert read_result(tmp_path / "mine" / "soundworld-1.json").features == "mine"


def test_a_run_that_is_not_finished_says_so(tmp_path: Path, tiny_config):
    stopped = model_provenance(make_run(tmp_path / "a", tiny_config(), [10, 20]), tiny_config())
    assert (stopped["step"], stopped["finished"], stopped["steps"]) == (20, False, 40)
    unknown = model_provenance(make_run(tmp_path / "b", tiny_config()), tiny_config())
    assert (unknown["step"], unknown["finished"]) == (None, False)


def test_run_folders_with_broken_files_are_refused(tmp_path: Path, tiny_config):
    folder = make_run(tmp_path / "a", tiny_config())
    (folder / "metrics.csv").write_text("loss\n1.0\n")
    with pytest.raises(CheckpointError, match=r"metrics\.csv: holds no metrics of a run"):
        model_provenance(folder, tiny_config())
    (folder / "config.yaml").write_text("recipe: a\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml: holds no settings of a run"):
        model_provenance(folder, tiny_config())


@pytest.mark.parametrize("name", ["random encoder", "log-mel statistics", "supervised"])
def test_a_run_named_like_a_baseline_is_refused(small, tmp_path: Path, tiny_config, name):
    folder = make_run(tmp_path / name, tiny_config())
    with pytest.raises(DataError, match=f"'{name}' is what results call other features than this model's; rename"):
        bestrq2.probe(folder, "soundworld-1")
    assert not (folder / "soundworld-1.json").exists()


@pytest.mark.parametrize("name", ["soundworld-2", "soundworld-9", "soundworld-x"])
def test_unknown_benchmarks_are_refused_by_listing_the_known(name, capsys):
    with pytest.raises(DataError, match=f"no benchmark '{name}'; the benchmarks are: soundworld-1"):
        bestrq2.probe("best-rq-2-tiny", name)
    assert run(["probe", "best-rq-2-tiny", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_soundworld_and_folders_keep_their_meaning(tmp_path: Path, monkeypatch):
    asked = []

    def load_labelled(source, seed):
        asked.append(source)
        raise DataError("enough")

    monkeypatch.setattr("bestrq2.evaluate.command.load_labelled", load_labelled)
    (tmp_path / "soundworld-2").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("soundworld", "soundworld:40", "soundworld-2"):
        with pytest.raises(DataError, match="enough"):
            bestrq2.probe("best-rq-2-tiny", source)
    assert asked == ["soundworld", "soundworld:40", "soundworld-2"]


def test_seeds_of_a_benchmark_are_not_for_the_user():
    with pytest.raises(ConfigError, match="seed is 3, but soundworld-1 is frozen with seeds of its own"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-1", seed=3)


def test_outputs_that_cannot_be_written_are_refused_first(small, tmp_path: Path):
    with pytest.raises(BestRQ2Error, match="does not exist"):
        bestrq2.probe("best-rq-2-tiny", "soundworld-1", output=tmp_path / "no" / "a.json")
