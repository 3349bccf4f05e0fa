"""A run tells how much audio it hears: beforehand, on the way, and of each folder in the end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import soundfile
import torch
from small_run import CONFORMER, LOADER, MODEL, RATE, killed_copy, metrics, recording, same_runs, small_pretrain

from bestrq2 import BestRQ2ForAudioClassification, cli
from bestrq2.data.batch import RowWriter
from bestrq2.data.labels import load_task
from bestrq2.data.loader import training_batches
from bestrq2.data.rejections import RejectionLog
from bestrq2.data.sources import common_folder, top_folder
from bestrq2.train import finetuning, loop
from bestrq2.train.objective import MaskDrawer, PretrainingTask, build_model
from bestrq2.train.settings import FinetuneConfig, resolve


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recording of 20 s, ten of 1 s, and one that is in no folder: 30.5 s."""
    root = tmp_path_factory.mktemp("uneven")
    soundfile.write(root / "alone.wav", recording(0, 0.5), RATE)
    for folder, durations in (("music", [20.0]), ("speech/a", [1.0] * 4), ("speech/b", [1.0] * 6)):
        (root / folder).mkdir(parents=True)
        for number, seconds in enumerate(durations):
            soundfile.write(root / folder / f"{number}.wav", recording(number, seconds), RATE)
    return root


@pytest.fixture(scope="module")
def run(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of one step each: eight rows of 2.5 s of music, and three rows of short clips."""
    every = {"log_every_n_steps": 1, "checkpoint_every_n_steps": 1, "val_every_n_steps": 0, "report": True}
    return small_pretrain(
        uneven,
        tmp_path_factory.mktemp("heard") / "run",
        loader={"batch_seconds": 27.5, "validation_clips": 0},
        trainer={"max_steps": 2, **every},
    )


def test_an_epoch_hears_every_second_once(run: Path):
    assert [float(row["audio_seconds"]) for row in metrics(run)] == [30.5, 61.0]
    with (run / "heard.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["folder", "seconds"], ["music", "40.0"], ["speech", "20.0"], [".", "1.0"]]


def test_report_and_info_tell_what_was_heard(run: Path, uneven: Path, capsys: pytest.CaptureFixture[str]):
    facts = {
        "heard": "0.02 h: music 0.01, speech 0.01, . 0.00",
        "corpus": "12 recordings, 0.01 h",
        "segments": "19 segments of up to 2.5 s, in 11 rows, 97.7% of them audio",
        "step": "30 s of audio in 11 rows per step",
        "epoch": "1.0 steps per epoch",
    }
    report = (run / "report.html").read_text()
    assert cli.run(["info", str(run)]) == 0
    printed = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    found = {name: value.strip() for name, value in printed}
    for name, value in facts.items():
        assert found[name] == value
        assert f"<dt>{name}</dt><dd>{value}</dd>" in report


def test_info_tells_what_a_run_of_a_recipe_would_hear(uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: demo\nmodel: {max_seconds: 2.5}\nloader: {batch_seconds: 27.5, validation_clips: 0}\n")
    assert cli.run(["info", str(recipe), "--data", str(uneven), "--no-cost"]) == 0
    printed = capsys.readouterr().out
    assert "12 recordings, 0.01 h\n" in printed
    assert "1.0 steps per epoch\n" in printed
    assert cli.run(["info", str(uneven), "--data", str(uneven)]) == 2
    assert "--data belongs to a recipe" in capsys.readouterr().err


def test_a_run_tells_what_it_hears_and_how_long_it_takes(
    uneven: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    caplog.set_level("INFO")
    monkeypatch.setattr(loop, "_PACE_SECONDS", 0.0)
    small_pretrain(uneven, tmp_path / "run", loader={"validation_clips": 0}, trainer={"max_steps": 4})
    assert "pretrain: the other 2 steps take about 00:" in caplog.text
    segments = "19 segments of up to 2.5 s, in 11 rows, 97.7% of them audio; 11 s of audio in 4 rows per step"
    assert f"training on 12 recordings, 0.01 h; {segments}; 2.8 steps per epoch" in caplog.text
    line = capsys.readouterr().err.splitlines()[-1]
    assert "0.01 h heard, " in line
    assert "% of the batch audio, " in line
    assert " x real time, " in line


def test_what_was_heard_is_exact_over_a_resume(uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = small_pretrain(uneven, tmp_path / "whole")
    resumed = small_pretrain(uneven, killed_copy(tmp_path, uneven, monkeypatch), resume=True)
    assert same_runs(whole, resumed)
    assert (whole / "heard.csv").read_bytes() == (resumed / "heard.csv").read_bytes()


@pytest.mark.parametrize(
    ("name", "root", "expected"),
    [
        ("/data/music/a/b.wav", "/data/", "music"),
        ("/data/a.wav", "/data/", ""),
        ("/data/shards/0001.tar/key", "/data/shards/", ""),
        ("soundworld clip 7", "", ""),
    ],
)
def test_the_top_folder_of_a_recording_is_below_what_all_have_in_common(name: str, root: str, expected: str):
    assert top_folder(name, root) == expected


def test_the_folder_in_common_is_found_from_the_names():
    def folder_of(*names: str) -> str:
        return common_folder(names)

    assert folder_of("/a/b/c/1.wav", "/a/b/d/2.wav") == "/a/b/"
    assert folder_of("/a/b/1.wav", "/a/bc/2.wav") == "/a/"
    assert folder_of("/a/b/1.wav") == "/a/b/"
    assert folder_of("1.wav", "b/2.wav") == ""


@pytest.mark.parametrize("clips", [0, 1])
@pytest.mark.parametrize("kind", ["vit", "conformer"])
def test_a_row_without_any_usable_clip_changes_nothing(kind: str, clips: int):
    still = {"drop_path_rate": 0.0, "conformer_dropout": 0.0}
    model = {**MODEL, **(CONFORMER if kind == "conformer" else {}), **still}
    config = resolve({"recipe": "demo", "data": "x", "output": "y", "model": model, "loader": LOADER})
    task = PretrainingTask(build_model(config), 0).eval()
    draw = MaskDrawer(task.model.config, 0, 1, 2)

    def gradients(rows: int) -> tuple[float, list[torch.Tensor]]:
        writer = RowWriter(config.model, rows, config.model.columns(40_000), 42_048)
        for _ in range(clips):
            writer.add(0, recording(1, 1.2))
        batch = writer.batch(0, range(rows))
        batch.hidden_mask = draw(batch.packing.segments, 0, batch.places)
        sums = task(task.inputs(batch, torch.device("cpu")))
        assert float(sums["terms"]) == task.terms(batch)
        task.zero_grad()
        sums["loss"].backward()
        return float(sums["loss"].detach()), [p.grad.clone() for p in task.parameters() if p.grad is not None]

    loss, found = gradients(2)
    if clips:
        alone, expected = gradients(1)
        assert loss == pytest.approx(alone, rel=1e-5)
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, expected, strict=True))
    else:
        assert loss == 0
        assert all(float(one.abs().sum()) == 0 for one in found)


def test_segments_carry_the_label_of_their_recording(tmp_path: Path, tiny_config):
    for label, seconds in (("long", 6.0), ("short", 0.8)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(10):
            soundfile.write(tmp_path / "data" / label / f"{number}.wav", recording(number, seconds), RATE)
    data = load_task(str(tmp_path / "data"), 0)
    config = FinetuneConfig("m", str(tmp_path / "data"), tmp_path / "out", batch_size=8)
    model = BestRQ2ForAudioClassification(tiny_config(max_seconds=2.5, num_labels=2))
    task = finetuning.ClassificationTask(model, config, data, RejectionLog(tmp_path / "rejected.csv"))
    batches = training_batches(task.source, task.rows, model.config, seed=0, batch_rows=len(task.rows), max_steps=1)
    (batch,) = list(batches)
    labels = task.inputs(batch, torch.device("cpu")).labels
    names = [data.classes[int(label)] for label in labels]
    assert names == [Path(recorded).parent.name for recorded in batch.recordings]
    assert names.count("long") == 3 * len({recorded for recorded in batch.recordings if "long" in recorded}) > 0
    assert task.terms(batch) == len(names) > len(task.rows)
    assert abs(task.batch_rows * len(names) / len(task.rows) - 8) < 1
