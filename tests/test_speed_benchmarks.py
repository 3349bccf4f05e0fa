"""The benchmarks of speed measure what they say."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}

    def loaded(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield loaded
    for name in names & sys.modules.keys():
        del sys.modules[name]


def test_every_instant_is_attributed_to_the_innermost_part(load, monkeypatch: pytest.MonkeyPatch):
    stopwatch = load("stopwatch")
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = stopwatch.Stopwatch(["inner"], "rest")

    class Work:
        def outer(self) -> None:
            now[0] += 3
            self.inner()
            now[0] += 4

        def inner(self) -> None:
            now[0] += 10

    plain = Work.outer
    with watch.watching([(Work, "outer", "outer"), (Work, "inner", "inner"), (Work, "missing", "none")]):
        Work().outer()  # before the start: not counted
        watch.start(torch.device("cpu"))
        now[0] += 1
        Work().outer()
        watch.stop()
    assert watch.host_seconds() == {"rest": 1.0, "outer": 7.0, "inner": 10.0}
    assert watch.seconds == 18.0
    assert Work.outer is plain


@pytest.mark.parametrize("workers", [0, 1])
def test_the_rows_of_a_run_add_up_to_its_time(load, tmp_path: Path, workers: int):
    pytest.importorskip("webdataset")
    end_to_end = load("end_to_end")
    arguments = argparse.Namespace(
        batch=2, accelerator="cpu", precision="32-true", compile=False, log_every=1, warm_up=1, seconds=0.0,
        lengths="varied",
    )  # fmt: skip
    shards = end_to_end.write_shards(tmp_path, 4, varied=True)
    run = end_to_end.measure("demo", shards, arguments, workers)
    assert (run["steps"], run["clips"]) == (1, 2)
    assert sum(run["host_ms_per_clip"].values()) == pytest.approx(1000 * run["seconds"] / run["clips"], rel=1e-6)
    for name in (end_to_end.SPECTROGRAM, end_to_end.FORWARD, end_to_end.BACKWARD, end_to_end.OPTIMISER):
        assert run["host_ms_per_clip"][name] > 0
    assert 0 <= run["device_waits"] < 1
    loading = run["workers_ms_per_clip" if workers else "host_ms_per_clip"]
    # A worker may have read all that was counted before the count began.
    assert workers or {end_to_end.CLIP, end_to_end.READ, end_to_end.MASKS} <= loading.keys()


def test_the_expected_line_is_exact_at_the_reference_and_includes_attention(load):
    pytest.importorskip("matplotlib")
    scaling, figures = load("scaling"), load("scaling_figures")
    point = {
        "batch": 16, "clip_seconds": 10.0, "gflops": 2.0, "parameters": 4_000_000, "front_end": 48.0, "network": 320.0,
        "optimiser": 7.0,
    }  # fmt: skip
    law = figures.Law(point)
    assert law.clip(point) == pytest.approx(figures.measured_clip(point))
    assert law.clip({**point, "batch": 32}) == pytest.approx((48 + 320) / 16 + 7 / 32)
    short, long = (
        scaling.cost(scaling.configuration("best-rq-2-tiny", max_seconds=seconds)).training_gflops
        - scaling.linear_gflops("best-rq-2-tiny", seconds)
        for seconds in (10.0, 60.0)
    )
    assert long / short == pytest.approx(36, rel=0.05)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("scaling*.json")), ids=lambda path: path.name)
def test_plots_of_saved_results_can_be_redrawn(load, tmp_path: Path, file: Path):
    pytest.importorskip("matplotlib")
    figures = load("scaling_figures")
    figures.write(json.loads(file.read_text()), tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {f"scaling-{name}.png" for name in figures.PLOTS}
    assert max(sizes.values()) < 100_000
