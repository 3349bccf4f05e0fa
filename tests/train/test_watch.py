"""Warnings come when there is something to warn of, once, with advice, and change nothing."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from small_run import LOADER, MODEL, TRAINER, killed_copy, metrics, same_weights, small_pretrain

from bestrq2.train import watch
from bestrq2.train.settings import PretrainConfig, changed_settings, resolve
from bestrq2.train.watch import WarningList, Watch

GOOD = {"train/loss": 4.0, "train/code_perplexity": 14.0, "train/code_coverage": 0.04, "train/top_code_share": 0.3}


class Clock:
    """Says what it is told."""

    elapsed = waited = 0.0


def make_config(recipe: str = "best-rq-2", **groups: Any) -> PretrainConfig:
    return resolve({"recipe": recipe, "data": "x", "output": "y", **groups})


def watching(path: Path, config: PretrainConfig | None = None) -> tuple[Watch, Clock]:
    clock, config = Clock(), config or make_config()
    groups = (config.trainer, config.optimizer, config.watch, config.loader, config.model)
    return Watch(path / "warnings.txt", clock, *groups), clock  # type: ignore[arg-type]


def lines(path: Path) -> list[str]:
    file = path / "warnings.txt"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("name", ["code_perplexity", "code_coverage", "top_code_share"])
def test_collapsing_codes_are_warned_of_by_each_of_their_signs(name: str, tmp_path: Path):
    collapsed = {"code_perplexity": 1.3, "code_coverage": 0.0005, "top_code_share": 0.97}[name]
    watcher, _ = watching(tmp_path)
    watcher.look_at_codes(GOOD, watcher.model, 50)
    assert lines(tmp_path) == []
    watcher.look_at_codes({**GOOD, f"train/{name}": collapsed}, watcher.model, 100)
    (line,) = lines(tmp_path)
    assert line.startswith("step 100: the training targets collapse")
    assert "model.quantizer_normalization layernorm" in line


def test_the_paper_s_own_recipe_gives_no_warning(tmp_path: Path):
    watcher, _ = watching(tmp_path)
    # The least varied use of codes that was measured: raw decibels of SoundWorld's 64 first clips.
    measured = {"train/code_perplexity": 2.75, "train/code_coverage": 0.0144, "train/top_code_share": 0.804}
    watcher.look_at_codes({"train/loss": 1.2, **measured}, watcher.model, 50)
    assert lines(tmp_path) == []


def test_coverage_is_not_judged_by_fewer_targets_than_codes(tmp_path: Path):
    config = make_config(loader={"batch_seconds": 10}, trainer={"log_every_n_steps": 1})
    watcher, _ = watching(tmp_path, config)
    watcher.look_at_codes({**GOOD, "train/code_coverage": 0.003}, watcher.model, 1)
    assert lines(tmp_path) == []


def test_a_window_of_skipped_steps_says_nothing_about_codes(tmp_path: Path):
    watcher, _ = watching(tmp_path)
    empty = {"train/loss": math.nan, "train/code_perplexity": 1.0, "train/code_coverage": 0.0}
    watcher.look_at_codes(empty, watcher.model, 50)
    assert lines(tmp_path) == []


def test_a_kind_is_warned_of_when_it_starts_and_once_more_when_it_came_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    warnings = WarningList(tmp_path / "warnings.txt")
    for step, holds in enumerate([0, 1, 1, 0, 0, 1, 1, 0, 1], 1):
        warnings.judge("codes", step, "codes collapse" if holds else None)
        warnings.judge("stall", step, "loss stalls" if step > 8 else None)
    assert lines(tmp_path) == ["step 2: codes collapse", "step 6: codes collapse", "step 9: loss stalls"]
    assert [record.getMessage() for record in caplog.records] == lines(tmp_path)


def stalled(watcher: Watch, losses: dict[int, float]) -> None:
    for step, excess in losses.items():
        watcher.look_at_loss({"train/excess_loss": excess}, step)


def test_a_loss_that_stays_above_the_entropy_is_warned_of_and_a_falling_one_is_not(tmp_path: Path):
    steps = range(50, 5001, 50)
    config = make_config(trainer={"max_steps": 20_000})  # warm-up: 1000 steps
    cases = {
        "flat": [0.2 + 0.005 * math.sin(step) for step in steps],
        "falling": [3.0 - step / 2000 for step in steps],
        "flat but below": [-1.0 + 0.005 * math.sin(step) for step in steps],
    }
    for name, values in cases.items():
        (tmp_path / name).mkdir()
        watcher, _ = watching(tmp_path / name, config)
        stalled(watcher, dict(zip(steps, values, strict=True)))
    assert lines(tmp_path / "falling") == lines(tmp_path / "flat but below") == []
    (line,) = lines(tmp_path / "flat")
    assert line.startswith("step 3000: the loss has not fallen in 1000 steps")  # two stretches after the warm-up
    assert "optimizer.lr" in line


def test_a_stall_is_found_at_the_same_step_in_a_resumed_run(tmp_path: Path):
    config = make_config(trainer={"max_steps": 20_000})
    first, _ = watching(tmp_path, config)
    stalled(first, dict.fromkeys(range(50, 2501, 50), 0.2))
    second, _ = watching(tmp_path, config)
    second.load_state_dict(first.state_dict())
    stalled(second, dict.fromkeys(range(2550, 5001, 50), 0.2))
    (line,) = lines(tmp_path)
    assert line.startswith("step 3000:")


@pytest.mark.parametrize(("waited", "warned"), [(5.0, False), (7.0, True)])
def test_waiting_for_data_is_judged_over_fifty_steps_and_thirty_seconds(waited: float, warned: bool, tmp_path: Path):
    watcher, clock = watching(tmp_path)
    clock.elapsed, clock.waited = 20.0, 20.0  # the workers start
    watcher.look_at_waiting(1)
    for step, seconds in ((31, 29.0), (50, 29.5), (52, 31.0)):
        clock.elapsed, clock.waited = 20.0 + seconds, 20.0 + waited
        watcher.look_at_waiting(step)
        assert len(lines(tmp_path)) == int(warned and step == 52)
    if warned:
        assert "23 % of the time is spent waiting" in lines(tmp_path)[0]
        assert "bestrq2 prepare" in lines(tmp_path)[0]
    assert "waiting" not in watcher.state_dict()["given"]


def test_skipped_steps_are_warned_of_except_where_float16_needs_them(tmp_path: Path):
    for precision, count in (("32-true", 1), ("16-mixed", 0)):
        (tmp_path / precision).mkdir()
        watcher, _ = watching(tmp_path / precision, make_config(trainer={"precision": precision}))
        for step, skipped in ((50, 0.0), (100, 2.0), (150, 2.0)):
            watcher.look_at_skipped({"train/skipped_steps": skipped}, step)
        assert len(lines(tmp_path / precision)) == count


def test_warnings_change_nothing_and_a_resumed_run_has_the_same_ones(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(watch, "_WINDOW_STEPS", 1)
    monkeypatch.setattr(watch, "_WINDOW_SECONDS", 0.0)
    quiet = small_pretrain(recordings, tmp_path / "quiet", watch={"max_waiting_share": 1.0})
    assert not (quiet / "warnings.txt").exists()
    anxious = {"min_code_perplexity": 60.0, "max_waiting_share": 0.0, "stall_steps": 2}
    whole = small_pretrain(recordings, tmp_path / "whole", watch=anxious)
    kinds = ("codes", "collapse"), ("waiting", "waiting for data")
    found = {kind for kind, word in kinds if any(word in line for line in lines(whole))}
    assert found == {"codes", "waiting"}
    killed_copy(tmp_path, recordings, monkeypatch, watch={"stall_steps": 2})
    killed = small_pretrain(recordings, tmp_path / "killed", watch=anxious, resume=True)  # other thresholds are no bar
    assert same_weights(quiet, whole)
    assert same_weights(quiet, killed)
    assert (quiet / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert (quiet / "metrics.csv").read_bytes() == (killed / "metrics.csv").read_bytes()
    assert not [name for name in metrics(whole)[0] if "wait" in name]
    assert all(record.levelno == logging.WARNING for record in caplog.records if "collapse" in record.getMessage())


def test_lines_of_steps_that_are_made_again_are_dropped(tmp_path: Path):
    warnings = WarningList(tmp_path / "warnings.txt")
    for step in (10, 20, 30):
        warnings.judge(f"kind {step}", step, f"fault: {step}")
    warnings.forget_after(20)
    assert lines(tmp_path) == ["step 10: fault: 10", "step 20: fault: 20"]


def test_watching_and_logging_settings_do_not_make_another_run():
    groups = {"model": MODEL, "loader": LOADER, "trainer": TRAINER}
    old = make_config("demo", **groups).to_dict()
    new = make_config("demo", **groups, watch={"max_skipped_in_a_row": 3}, logging={"wandb": "x"}).to_dict()
    assert changed_settings(old, new) == []
    before = {name: values for name, values in old.items() if name not in ("watch", "logging")}
    assert changed_settings(before, new) == []  # a run of an earlier version
