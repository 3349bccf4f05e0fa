"""Result files of soundworld-1: what they hold, which are refused, and where runs get theirs."""

from __future__ import annotations

import dataclasses
import json
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
from bestrq2.evaluate.benchmark import run_benchmark
from bestrq2.evaluate.benchmark_result import BenchmarkResult, model_provenance, read_result, result_of, write_result
from bestrq2.inference.cost import cost


def result(names: tuple[str, ...] = ("mine", "log-mel statistics")) -> BenchmarkResult:
    scores = run_benchmark([WaveformFeatures(6, name) for name in names], SMALL, progress=False)
    return result_of(SMALL, names[0], scores, {"model": "runs/mine", "seed": 3, "data": None})


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
