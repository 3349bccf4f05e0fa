"""The online probe: where its curves appear, that it changes nothing else, what it costs, and what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from small_run import at_step, die, metrics, recording, same_runs, same_weights, small_pretrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.report.runs import read_curves
from bestrq2.soundworld import write_corpus
from bestrq2.train import online_probing
from bestrq2.train.online_probing import spacing


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Recordings at two levels."""
    for label, level in (("loud", 1.0), ("quiet", 0.05)):
        (tmp_path / "labelled" / label).mkdir(parents=True)
        for number in range(8):
            clip = level * recording(number, 1.0)
            soundfile.write(tmp_path / "labelled" / label / f"{number}.wav", clip, 16_000)
    return tmp_path / "labelled"


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a probe and a step take."""
    cost = {"probe": 0.0, "step": 1.0}
    run = online_probing.OnlineProbing._run

    def costly(self: Any, *args: Any) -> float:
        run(self, *args)
        return cost["probe"]

    monkeypatch.setattr(online_probing.OnlineProbing, "_run", costly)
    monkeypatch.setattr(online_probing.Timing, "seconds_per_step", lambda *_: cost["step"])
    return cost


def probed_steps(run: Path) -> list[int]:
    return [int(row["step"]) for row in metrics(run) if row.get("probe/mean")]


def test_curves_are_in_metrics_tensorboard_and_the_report(tmp_path: Path, recordings: Path, labelled: Path):
    probe = {"data": str(labelled), "every_n_steps": 2, "max_share": 1.0}
    run = small_pretrain(recordings, tmp_path / "run", probe=probe)
    assert probed_steps(run) == [0, 2, 4, 6]
    scores = {int(row["step"]): float(row["probe/mean"]) for row in metrics(run) if row["probe/mean"]}
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("probe/mean")} == pytest.approx(scores)
    assert read_curves(run).curves["probe/mean"][0].tolist() == [0, 2, 4, 6]
    page = (run / "report.html").read_text()
    assert "Probes during training" in page
    assert "Labelled" in page


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path: Path, recordings: Path, labelled: Path):
    plain = small_pretrain(recordings, tmp_path / "plain")
    probed = small_pretrain(recordings, tmp_path / "probed", probe={"data": str(labelled), "every_n_steps": 1})
    assert same_weights(plain, probed)
    figures = {row["step"]: row for row in metrics(probed)}
    assert [row.items() <= figures[row["step"]].items() for row in metrics(plain)] == [True] * 4


@pytest.mark.parametrize(
    ("probe_seconds", "max_share", "steps"),
    [
        (0.0, 0.05, 1000),
        (52.0, 0.05, 1000),
        (53.0, 0.05, 2000),
        (500.0, 0.05, 10_000),
        (10_000.0, 1.0, 1000),
    ],
)
def test_probes_stay_below_their_share_of_the_time(probe_seconds: float, max_share: float, steps: int):
    step_seconds = 1.0
    every = spacing(probe_seconds, step_seconds, 1000, max_share)
    assert every == steps
    assert probe_seconds / (probe_seconds + every * step_seconds) <= max_share
    if every > 1000:  # and no rarer than that
        assert probe_seconds / (probe_seconds + (every - 1000) * step_seconds) > max_share


def test_a_dear_probe_comes_at_fewer_steps_and_that_is_said(
    tmp_path: Path, recordings: Path, labelled: Path, seconds: dict[str, float], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    seconds["probe"] = 3.0
    probe = {"data": str(labelled), "every_n_steps": 1, "max_share": 0.5}
    run = small_pretrain(recordings, tmp_path / "run", probe=probe, trainer={"max_steps": 7})
    assert probed_steps(run) == [0, 3, 6, 7]
    kept = json.loads((run / "online_probe.json").read_text())
    assert (kept["seconds"], kept["every_n_steps"]) == (3.0, 3)
    assert "every 3 steps instead of 1 to stay below 50 % of the time (probe.max_share)" in caplog.text


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_resumed_run_probes_at_the_steps_of_an_uninterrupted_one(
    tmp_path: Path,
    recordings: Path,
    labelled: Path,
    seconds: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
):
    seconds["probe"] = 2.0
    probe = {"data": str(labelled), "every_n_steps": 2, "max_share": 0.25}
    whole = small_pretrain(recordings, tmp_path / "whole", probe=probe, trainer={"max_steps": 8})
    assert probed_steps(whole) == [0, 6, 8]
    with monkeypatch.context() as patch:
        at_step(patch, killed_at, die)
        with pytest.raises(RuntimeError, match="killed"):
            small_pretrain(recordings, tmp_path / "killed", probe=probe, trainer={"max_steps": 8})
    if killed_at > 2:
        seconds |= {"probe": 0.1, "step": 9.0}  # a faster machine changes nothing that was settled
    killed = small_pretrain(recordings, tmp_path / "killed", probe=probe, trainer={"max_steps": 8}, resume=True)
    assert same_runs(whole, killed)


def test_a_probe_that_is_added_to_a_run_is_measured_where_it_goes_on(tmp_path: Path, recordings: Path, labelled: Path):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 2})
    probe = {"data": str(labelled), "every_n_steps": 3, "max_share": 1.0}
    small_pretrain(recordings, run, probe=probe, resume=True)
    assert probed_steps(run) == [2, 3, 6]


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

    refused(DataError, r"probe\.data: .*nowhere does not exist; give a labelled folder", data=str(tmp_path / "nowhere"))
    refused(DataError, r"probe\.data: .*holds no subfolders; expected one with audio", data=str(recordings))
    refused(DataError, r"no task 'labeled'; did you mean 'labelled'", data=str(labelled), tasks=["labeled"])
    refused(ConfigError, r"probe\.max_share must lie in \(0, 1\], got 0\.0", data=str(labelled), max_share=0.0)
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
