"""The online probe: where its curves appear, that it changes nothing else, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from small_run import at_step, die, metrics, recording, same_runs, same_weights, small_pretrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bestrq2
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.report.runs import read_curves
from bestrq2.soundworld import write_corpus


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Recordings at two levels."""
    for label, level in (("loud", 1.0), ("quiet", 0.05)):
        (tmp_path / "labelled" / label).mkdir(parents=True)
        for number in range(8):
            clip = level * recording(number, 1.0)
            soundfile.write(tmp_path / "labelled" / label / f"{number}.wav", clip, 16_000)
    return tmp_path / "labelled"


def probed_steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in metrics(run) if row.get("probe/mean")]


def test_curves_are_in_metrics_tensorboard_and_the_report(tmp_path: Path, recordings: Path, labelled: Path):
    probe = {"data": str(labelled), "every_n_steps": 2}
    run = small_pretrain(recordings, tmp_path / "run", probe=probe, trainer={"report": True})
    assert probed_steps(run) == [0, 2, 4, 6]
    scores = {int(row["step"]): float(row["probe/mean"]) for row in metrics(run) if row["probe/mean"]}
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("probe/mean")} == pytest.approx(scores)
    assert read_curves(run).curves["probe/mean"][0].tolist() == [0, 2, 4, 6]
    page = (run / "report.html").read_text()
    assert "Probes during training" in page or "labelled (constant)" in page  # as the weights fall out


def test_the_report_of_a_run_shows_a_probe_made_after_it(tmp_path: Path, recordings: Path, labelled: Path):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"report": True})
    before = (run / "report.html").read_text()
    assert 'href="#probes"' not in before
    for _ in range(2):  # a second probe replaces the first
        result = bestrq2.probe(run, labelled, baselines=False)
    after = (run / "report.html").read_text()
    assert after.count('<section id="probes">') == after.count('href="#probes"') == 1
    for score in result.scores:
        assert f"{100 * score.score:.1f}" in after
    start, end = before.index("<!-- scores -->"), before.index("<!-- end of scores -->")
    assert before[end:] in after
    assert before[start - 2000 : start] in after


def test_training_is_the_same_to_the_bit_with_and_without(
    tmp_path: Path, recordings: Path, labelled: Path, undisturbed: Callable[..., Path]
):
    plain = undisturbed()
    probed = small_pretrain(recordings, tmp_path / "probed", probe={"data": str(labelled), "every_n_steps": 1})
    assert same_weights(plain, probed)
    figures = {row["step"]: row for row in metrics(probed)}
    assert [row.items() <= figures[row["step"]].items() for row in metrics(plain)] == [True] * 4


@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_resumed_run_probes_at_the_steps_of_an_uninterrupted_one(
    tmp_path: Path, recordings: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
):
    probe = {"data": str(labelled), "every_n_steps": 4}
    whole = small_pretrain(recordings, tmp_path / "whole", probe=probe)
    assert probed_steps(whole) == [0, 4, 6]
    with monkeypatch.context() as patch:
        at_step(patch, killed_at, die)
        with pytest.raises(RuntimeError, match="killed"):
            small_pretrain(recordings, tmp_path / "killed", probe=probe)
    assert same_runs(whole, small_pretrain(recordings, tmp_path / "killed", probe=probe, resume=True))


def test_tasks_in_tars_of_x_ares_can_be_probed(tmp_path: Path, recordings: Path):
    write_corpus(tmp_path / "sw", clips=8, format="xares", progress=False)
    probe = {"data": str(tmp_path / "sw" / "env"), "tasks": ["music/instrument", "environment/presence"]}
    run = small_pretrain(recordings, tmp_path / "run", probe=probe, trainer={"max_steps": 1})
    last = metrics(run)[-1]
    assert {name for name in last if name.startswith("probe/")} == {
        *("probe/music/instrument", "probe/environment/presence", "probe/music", "probe/environment", "probe/mean")
    }
    assert 0.0 <= float(last["probe/mean"]) <= 1.0


def test_what_cannot_be_probed_is_said_before_training_begins(tmp_path: Path, recordings: Path, labelled: Path):
    def refused(error: type[BestRQ2Error], reason: str, **probe: Any) -> None:
        with pytest.raises(error, match=reason):
            small_pretrain(recordings, tmp_path / "run", probe=probe)
        assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()

    refused(DataError, r"probe\.data: .*nowhere does not exist; give a folder", data=str(tmp_path / "nowhere"))
    refused(DataError, r"probe\.data: .*holds no subfolders; expected one with audio", data=str(recordings))
    refused(DataError, r"no task 'labeled'; did you mean 'labelled'", data=str(labelled), tasks=["labeled"])
    refused(ConfigError, r"probe\.clips must be at least 2, got 1", data=str(labelled), clips=1)
    env = tmp_path / "env"
    (env / "esc50").mkdir(parents=True)
    (env / "esc50" / ".audio_tar_ready").touch()
    refused(DataError, r"probe\.data: .*esc50 holds no tars", data=str(env))
    for file in labelled.rglob("*.wav"):
        file.write_bytes(b"no audio")
    refused(DataError, r"train split of labelled has no usable clip out of 12", data=str(labelled))


def test_a_probe_that_fails_later_is_a_warning(
    tmp_path: Path, recordings: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def lose() -> None:
        for file in labelled.rglob("*.wav"):
            file.unlink()

    at_step(monkeypatch, 1, lose)
    run = small_pretrain(recordings, tmp_path / "run", probe={"data": str(labelled)}, trainer={"max_steps": 3})
    assert np.isnan(float(metrics(run)[-1]["probe/mean"]))
    assert "online probe: The train split of labelled has no usable clip" in caplog.text
