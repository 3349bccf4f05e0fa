"""Result files: one format for all benchmarks, what is refused, and where runs get theirs."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from toy_benchmark import SMALL
from toy_tasks import WaveformFeatures

import bestrq2
from bestrq2 import soundworld
from bestrq2.cli import run
from bestrq2.errors import CheckpointError, DataError
from bestrq2.evaluate.benchmark import benchmark_result, read_benchmark_result, run_benchmark
from bestrq2.evaluate.provenance import model_provenance
from bestrq2.evaluate.result import Result, TaskScore, read_result, write_result
from bestrq2.evaluate.score_table import all_means
from bestrq2.inference.cost import cost

SCORES = (
    TaskScore("mine", "esc50", "mlp", "accuracy", 0.61, domain="environment", seconds=12.5),
    TaskScore(
        "mine", "esc50", "knn", "accuracy", 0.5, 0.4, 0.6, 0.02, 400, "environment", 2.0, 1.0, ("clip 3: silent",)
    ),
    TaskScore("mine", "tit", "finetune", "recall", math.nan, domain="class"),
)


def benchmark(names: tuple[str, ...] = ("mine", "log-mel statistics")) -> Result:
    scores = run_benchmark([WaveformFeatures(6, name) for name in names], SMALL, progress=False)
    return benchmark_result(SMALL, names[0], scores, {"model": "runs/mine", "seed": 3, "data": None})


def read_small(path: Path) -> Result:
    return read_benchmark_result(path, SMALL)


def test_a_result_of_any_benchmark_comes_back_from_its_file(tmp_path: Path):
    written = Result(
        "x-ares", "mine", SCORES, {"gtzan": "its tars are missing"}, {"created": "2026-01-01", "seed": None}
    )
    write_result(tmp_path / "a.json", written, {"mean": 0.5})
    read = read_result(tmp_path / "a.json", "x-ares")
    assert repr(read) == repr(written)  # NaN is not equal to itself
    assert [score.task for score in read.of_model()] == ["esc50", "esc50", "tit"]
    content = json.loads((tmp_path / "a.json").read_text())
    assert list(content) == ["format", "benchmark", "model", "provenance", "scores", "failures", "means"]
    assert content["scores"][2]["score"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"], "no temporary file is left"


def test_results_of_format_2_are_read_without_the_outcomes_of_clips(small, tmp_path: Path):
    path = tmp_path / "a.json"
    write_result(path, dataclasses.replace(benchmark(), benchmark="probe"))
    content = json.loads(path.read_text())
    for one in content["scores"]:
        del one["clips"], one["half"]
    path.write_text(json.dumps(content | {"format": 2}))
    assert {(score.clips, score.half) for score in read_result(path).scores} == {((), "")}
    path.write_text(json.dumps(content | {"format": 2, "benchmark": "soundworld-1"}))
    with pytest.raises(DataError, match="is a result of soundworld-1, not of soundworld-2; write a new one with"):
        read_small(path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_result(tmp_path / "a.json", Result("probe", "mine", SCORES[:1]))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_result(tmp_path / "a.json", Result("probe", "other", ()))
    assert read_result(tmp_path / "a.json").model == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_benchmark_with_the_linear_probe_only_is_a_result(small, tmp_path: Path):
    whole = benchmark()
    linear = tuple(score for score in whole.scores if score.method == "linear")
    write_result(tmp_path / "a.json", dataclasses.replace(whole, scores=linear))
    assert list(all_means(read_small(tmp_path / "a.json").scores)["mine"]) == ["linear"]


def first_score(content: dict, **changes) -> None:
    content["scores"][0] |= changes


def protocol(content: dict, **changes) -> None:
    content["provenance"]["protocol"] |= changes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.update(format=4), "is a result of format 4, but this version reads 3"),
        (lambda content: content.update(benchmark="probe"), "is a result of probe, not of soundworld-2"),
        (lambda content: content.pop("provenance"), "lacks the field 'provenance'"),
        (lambda content: content.update(points=3), "has the unknown field 'points'"),
        (lambda content: content.update(scores={}), "has dict in the field 'scores'"),
        (lambda content: content["scores"][0].pop("low"), "lacks the field 'low' of score 0"),
        (lambda content: content["scores"].append("x"), "score 18 is not an object"),
        (lambda content: first_score(content, score="high"), "has str in the field 'score' of score 0"),
        (lambda content: first_score(content, metric="f1"), "speech/toy has metric 'f1', where .* has 'accuracy'"),
        (lambda content: first_score(content, method="svm"), "the method 'svm'"),
        (lambda content: first_score(content, domain="music"), "has domain 'music', where soundworld-2 has 'speech'"),
        (lambda content: first_score(content, n_test=29), "has n_test 29, where soundworld-2 has 30"),
        (lambda content: first_score(content, score=1.5), "not inside an interval"),
        (lambda content: first_score(content, score=float("nan")), "not inside an interval"),
        (lambda content: first_score(content, low=None), "has no interval"),
        (lambda content: first_score(content, task="speech/other"), "speech/other: soundworld-2 has no such task"),
        (lambda content: first_score(content, half="choose"), "has half 'choose', where soundworld-2 has 'report'"),
        (lambda content: first_score(content, clips="1 0"), "has outcomes of 2 clips, where soundworld-2 has 30"),
        (lambda content: first_score(content, clips="0 " * 30), "is not the mean of the outcomes of its clips"),
        (lambda content: content["scores"].pop(5), r"mine \(knn\) has no score on music/toy"),
        (lambda content: content["scores"].append(content["scores"][0]), "occurs twice"),
        (lambda content: content.update(scores=[]), "no score is of 'mine', the model itself"),
        (lambda content: content.update(model="other"), "no score is of 'other'"),
        (lambda content: content["failures"].update(esc50=""), "the failure of 'esc50' has no reason"),
        (lambda content: protocol(content, folds=5), "has folds 5, where soundworld-2 has 3"),
        (lambda content: content["provenance"]["protocol"].pop("train"), "has train None, where soundworld-2 has 40"),
        (lambda content: content["provenance"]["protocol"]["tasks"].popitem(), "has other tasks"),
        (lambda content: content["provenance"].pop("protocol"), "has other tasks"),
    ],
)
def test_bad_results_are_refused_by_name(small, tmp_path: Path, edit, message):
    path = tmp_path / "result.json"
    write_result(path, benchmark())
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_small(path)
    assert str(caught.value).startswith(str(path))
    assert "write a new one with `bestrq2 probe MODEL soundworld-2`" in str(caught.value)


def test_outcomes_may_be_rounded_to_the_digits_they_are_stored_with(small, tmp_path: Path):
    path = tmp_path / "result.json"
    write_result(path, benchmark())
    content = json.loads(path.read_text())
    score, clips = content["scores"][0]["score"], content["scores"][0]["clips"].split()
    # All of balanced accuracy's outcomes above 1 are stored with an error of up to 5e-6.
    first_score(content, clips=" ".join([str(float(clips[0]) + 30 * 5e-6), *clips[1:]]))
    path.write_text(json.dumps(content))
    assert read_small(path).scores[0].score == score


@pytest.mark.parametrize("text", ["{", "[]", "\xe9", '{"format": 1, "scores": [7]}', '{"format": 1}', "[" * 100_000])
def test_files_that_are_not_results_are_refused(tmp_path: Path, text: str):
    (tmp_path / "bad.json").write_text(text, encoding="latin-1")
    for path, reason in ((tmp_path / "bad.json", "is "), (tmp_path / "missing.json", "cannot be read")):
        with pytest.raises(DataError, match=rf"{path.name}: {reason}.*write a new one with `bestrq2 xares MODEL`"):
            read_result(path, "x-ares")


def test_results_that_could_not_be_read_are_not_written(tmp_path: Path):
    for broken in (Result("probe", "", SCORES), Result("probe", "mine", (SCORES[0], SCORES[0]))):
        with pytest.raises(DataError):
            write_result(tmp_path / "a.json", broken)
    with pytest.raises(DataError, match="cannot be written as JSON"):
        write_result(tmp_path / "a.json", Result("probe", "mine", SCORES, {}, {"path": tmp_path}))
    assert not (tmp_path / "a.json").exists()


def test_results_of_version_0_1_are_read(tmp_path: Path):
    probe = {"features": "mine", "task": "music/key", "domain": "music", "method": "linear", "metric": "accuracy"}
    probe |= {"score": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1, "n_test": 90, "skipped": ["clip 1"]}
    xares = {"task": "esc50", "method": "mlp", "value": 0.25, "metric": "accuracy", "seconds": None}
    llm = {"task": "esc-50", "score": 0.75, "weight": 2.0}
    old_xares = {
        "benchmark": "x-ares",
        "model": "m",
        "scores": [xares],
        "failures": {"gtzan": "no tars"},
        "averages": {},
    }
    old_llm = {"benchmark": "xares-llm", "model": "m", "scores": [llm], "failures": {}, "missing": ["gtzan"]}
    files: list[tuple[str, dict, tuple]] = [
        ("probe", {"scores": [probe]}, ("mine", "music/key", "linear", 0.5, 90)),
        ("x-ares", old_xares, ("m", "esc50", "mlp", 0.25, 0)),
        ("xares-llm", old_llm, ("m", "esc-50", "xares-llm", 0.75, 0)),
    ]
    for name, content, expected in files:
        (tmp_path / "old.json").write_text(json.dumps({"format": 1, **content}))
        read = read_result(tmp_path / "old.json", name)
        (score,) = read.scores
        assert (score.features, score.task, score.method, score.score, score.n_test) == expected
        assert list(read.failures) == ([] if name == "probe" else ["gtzan"])
    (tmp_path / "old.json").write_text(json.dumps({"format": 1, "metrics": [], "classes": []}))
    with pytest.raises(DataError, match=r"of version 0.1.*write a new one with `bestrq2 finetune"):
        read_result(tmp_path / "old.json", "finetune")


def make_run(folder: Path, config: bestrq2.BestRQ2Config, steps: list[int] | None = None) -> Path:
    """A folder as a run leaves it, of 40 steps."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    bestrq2.BestRQ2ForPreTraining(config).save_pretrained(folder / "model")
    settings = {
        "recipe": "best-rq-2-tiny", "data": "soundworld:4000", "seed": 7, "trainer": {"max_steps": 40},
        "loader": {"batch_seconds": 16 * config.max_seconds},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if steps is not None:
        (folder / "metrics.csv").write_text("step,train/loss\n" + "".join(f"{step},1.0\n" for step in steps))
    return folder


def use_toy_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy clips are a few samples long: describe them by their samples in place of an encoder."""
    from bestrq2.evaluate.probe import LogMelStatistics
    from bestrq2.inference.embedder import Embedder

    for kind in (Embedder, LogMelStatistics):
        monkeypatch.setattr(kind, "embed", lambda self, audio, rate=None: WaveformFeatures(6).embed(audio, rate))


def test_a_run_folder_gets_its_result(small, tmp_path: Path, tiny_config, monkeypatch, capsys):
    use_toy_features(monkeypatch)
    folder = make_run(tmp_path / "first run", tiny_config(), [20, 40])
    assert run(["probe", str(folder), "soundworld-2", "--output", str(tmp_path / "copy.json")]) == 0
    table = capsys.readouterr().out
    assert table.startswith("linear probe")
    assert "Chance: always the most frequent training class." in " ".join(table.split())
    read = read_small(folder / "soundworld-2.json")
    assert repr(read_small(tmp_path / "copy.json")) == repr(read)
    assert read.model == "first run"
    assert list(all_means(read.scores)) == ["first run", "random encoder", "log-mel statistics"]
    numbers = cost(tiny_config())
    created = datetime.fromisoformat(read.provenance.pop("created"))
    assert created.utcoffset().total_seconds() == 0
    assert read.provenance == {
        "protocol": json.loads(json.dumps(SMALL.protocol())),
        "command": f"bestrq2 probe {folder} soundworld-2",
        "model": str(folder),
        "recipe": "best-rq-2-tiny",
        "data": "soundworld:4000",
        "seed": 7,
        "steps": 40,
        "batch_seconds": 16 * tiny_config().max_seconds,
        "training_gflops": numbers.training_gflops * 16 * 40,
        "step": 40,
        "finished": True,
        "readout": {"layers": "output", "frequency": "mean", "pooling": "mean"},
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
    result = bestrq2.probe(folder, "soundworld-2", baselines=False)
    assert {score.features for score in result.scores} == {"model"}
    assert sorted(path.name for path in folder.iterdir()) == before
    bestrq2.probe(folder, "soundworld-2", baselines=False, output=tmp_path / "out.json")
    read = read_small(tmp_path / "out.json")
    assert repr(read.scores) == repr(result.scores)
    assert read.provenance["training_gflops"] is read.provenance["step"] is read.provenance["recipe"] is None


def test_a_run_is_called_by_its_folder_however_it_is_given(small, tmp_path: Path, tiny_config, monkeypatch):
    use_toy_features(monkeypatch)
    monkeypatch.chdir(make_run(tmp_path / "mine", tiny_config()))
    assert bestrq2.probe(".", "soundworld-2", baselines=False).model == "mine"
    assert read_small(tmp_path / "mine" / "soundworld-2.json").model == "mine"


def test_a_run_that_is_not_finished_says_so(tmp_path: Path, tiny_config):
    stopped = model_provenance(make_run(tmp_path / "a", tiny_config(), [10, 20]), tiny_config())
    assert (stopped["step"], stopped["finished"], stopped["steps"]) == (20, False, 40)
    unknown = model_provenance(make_run(tmp_path / "b", tiny_config()), tiny_config())
    assert (unknown["step"], unknown["finished"]) == (None, False)
    assert 2 * stopped["training_gflops"] == pytest.approx(unknown["training_gflops"])  # of 20 steps, and of all 40


def test_run_folders_with_broken_files_are_refused(tmp_path: Path, tiny_config):
    folder = make_run(tmp_path / "a", tiny_config())
    (folder / "metrics.csv").write_text("loss\n1.0\n")
    with pytest.raises(CheckpointError, match=r"metrics\.csv: does not hold the metrics of a run"):
        model_provenance(folder, tiny_config())
    (folder / "config.yaml").write_text("recipe: a\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml: does not hold the settings of a run"):
        model_provenance(folder, tiny_config())


@pytest.mark.parametrize("name", ["random encoder", "log-mel statistics"])
def test_a_run_named_like_a_baseline_is_refused(small, tmp_path: Path, tiny_config, name):
    folder = make_run(tmp_path / name, tiny_config())
    with pytest.raises(DataError, match=f"'{name}' is the name of a baseline in results; rename"):
        bestrq2.probe(folder, "soundworld-2")
    assert not (folder / "soundworld-2.json").exists()
