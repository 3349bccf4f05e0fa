"""Task files by which the harness of X-ARES runs SoundWorld's tasks; each stands on its own."""

from __future__ import annotations

from string import Template

from bestrq2.soundworld.task_specs import TaskSpec

# As many updates on 400 clips as the harness's 10 epochs make on 4000.
EPOCHS = 100
# About a fifth of the presence task's time holds a call: frames with one count four times as much.
POSITIVE_WEIGHT = 4.0

_HEAD = '''\
"""SoundWorld, $task: $description

Written by `bestrq2 soundworld --format xares` for the harness of X-ARES.
"""

'''

_CLIP = Template(
    _HEAD
    + """\
from xares.task import TaskConfig


def ${function}_config(encoder):
    return TaskConfig(
        encoder=encoder,
        name="$name",
        formal_name="SoundWorld $task",
        label_processor=lambda sample: sample["label_index"],
        output_dim=$classes,
        epochs=$epochs,
        valid_every=$epochs,  # the last epoch counts, so that none is chosen
        train_split="train",
        valid_split="train",
        test_split="test",
    )
"""
)

_FRAME = Template(
    _HEAD
    + """\
from math import ceil

import torch
from xares.task import TaskConfig

SECONDS = $seconds


def ${function}_config(encoder):
    def present(sample):
        hop = encoder.hop_size_in_ms / 1000
        centres = (torch.arange(ceil(SECONDS / hop)) + 0.5) * hop
        target = torch.zeros(1, len(centres))
        for event in sample["events"]:
            target[0, (centres >= event["onset"]) & (centres <= event["offset"])] = 1.0
        return target

    return TaskConfig(
        encoder=encoder,
        name="$name",
        formal_name="SoundWorld $task",
        task_type="frame",
        label_processor=present,
        output_dim=1,
        criterion=torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor($weight)),
        metric="frame_mAP",
        do_knn=False,
        epochs=$epochs,
        valid_every=$epochs,  # the last epoch counts, so that none is chosen
        train_split="train",
        valid_split="train",
        test_split="test",
    )
"""
)


def folder_name(spec: TaskSpec) -> str:
    """The harness's name of a task, which is that of the folder of its tars."""
    return spec.name.replace("/", "-")


def task_file_name(spec: TaskSpec) -> str:
    """Name of its task file."""
    return f"{_function(spec)}_task.py"


def task_file(spec: TaskSpec) -> str:
    """Source of a task file.

    Clip tasks are scored by accuracy, MLP and k-NN; frame tasks by the average precision of frames whose centre lies in
    an event.
    """
    template = _CLIP if spec.kind == "clip" else _FRAME
    return template.substitute(
        task=spec.name,
        description=spec.description,
        name=folder_name(spec),
        function=_function(spec),
        classes=len(spec.classes),
        seconds=spec.seconds,
        epochs=EPOCHS,
        weight=POSITIVE_WEIGHT,
    )


def _function(spec: TaskSpec) -> str:
    return f"soundworld_{spec.name.replace('/', '_')}"
