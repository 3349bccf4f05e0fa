"""A benchmark like soundworld-2 on three toy tasks."""

from __future__ import annotations

import dataclasses

from toy_tasks import make_clip_task

from bestrq2.data.labels import LabelledTask
from bestrq2.evaluate.benchmark import SoundWorldBenchmark

SMALL = SoundWorldBenchmark(
    "soundworld-2", {"speech/toy": "report", "music/toy": "report", "environment/toy": "choose"}, train=40, test=30
)


def toy_tasks() -> list[LabelledTask]:
    return [
        dataclasses.replace(make_clip_task(seed, width=6, train=40, test=30), name=f"{domain}/toy", domain=domain)
        for seed, domain in enumerate(("speech", "music", "environment"))
    ]
