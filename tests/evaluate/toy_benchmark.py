"""A benchmark like soundworld-1 on three toy tasks."""

from __future__ import annotations

import dataclasses

from toy_tasks import make_clip_task, make_frame_task

from bestrq2.data.labels import LabelledTask
from bestrq2.evaluate.benchmark import Benchmark, BenchmarkTask

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
