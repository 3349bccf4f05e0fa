"""SoundWorld as files: labelled folders, or tars and task files for the harness of X-ARES."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from string import Template

import numpy as np
import soundfile

from bestrq2.errors import DataError
from bestrq2.files import disk_errors, write_bytes
from bestrq2.soundworld import speech
from bestrq2.soundworld.acoustics import SAMPLE_RATE
from bestrq2.soundworld.clips import TASKS, TaskSpec, label_of, presence_events
from bestrq2.soundworld.corpus import VERSION, Series, run_parallel, to_int16
from bestrq2.text import csv_line

MARKER = "soundworld.json"
FORMATS = ("folder", "xares")
UNLABELLED_SECONDS = 10.0

_CONTENT = ("unlabelled", "tasks", "env")  # all that a corpus consists of, besides the marker
_TRAIN_SHARE = 0.75
# As many updates on 400 clips as the harness's 10 epochs make on 4000.
_EPOCHS = 100
# Calls cover about a fifth of the presence task: frames with one count four times as much.
_POSITIVE_WEIGHT = 4.0


def write_corpus(output: Path, clips: int, format: str = "folder", seed: int = 0, progress: bool = True) -> None:
    """Write SoundWorld as 16-bit WAV files at 16 kHz.

    "folder": `unlabelled/*.wav`, and per task `tasks/<domain>/<task>/{train,test}/<class>/NNNN.wav`; frame-level tasks
    have no class folders but an `events.csv` (path, split, onset, offset in seconds; empty where a clip has none).
    "xares": `env/<domain>-<task>/{train,test}-000000.tar` with a wav and a json member per clip, and the harness's task
    files `tasks/soundworld_<domain>_<task>_task.py`; `bestrq2 xares MODEL --data OUTPUT` runs them.

    Every file is whole or absent; the same call completes an interrupted one.

    Args:
        output: new or empty folder, or one that this function made.
        clips: labelled clips per task (three quarters for training), and unlabelled clips; at least 2.
        format: "folder" or "xares".
        seed: random seed of the world.
        progress: show progress.

    Raises:
        DataError: `output` holds something else, or an argument is out of range.
        ConfigError: `output` cannot be written.
        BestRQ2Error: the disk is full.
    """
    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}; SoundWorld writes {' or '.join(FORMATS)}")
    if clips < 2:
        raise DataError(f"clips is {clips}; at least 2 are needed, for training and for test")
    output = Path(output)
    with disk_errors(output):
        arguments = {
            "generator": "bestrq2 soundworld", "version": VERSION, "speech": speech.synthesiser(),
            "format": format, "clips": clips, "seed": seed,
        }  # fmt: skip
        _claim(output, arguments)
        if format == "xares":
            _write_xares(output, clips, seed, progress)
        else:
            jobs = _folder_jobs(output, clips, seed)
            run_parallel(_write_clips, jobs, sum(len(files) for _, files in jobs), None, progress)
            _write_events(output, clips, seed)


def _claim(output: Path, arguments: dict[str, object]) -> None:
    """Prepare the folder: refuse other content, keep what equal arguments made, remove what others made."""
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; SoundWorld writes a folder, give the path of a new one")
    marker = output / MARKER
    if output.is_dir() and any(output.iterdir()):
        try:
            made = json.loads(marker.read_text())
        except (OSError, ValueError):
            made = None
        if not isinstance(made, dict) or made.get("generator") != arguments["generator"]:
            raise DataError(f"{output} is not empty and was not made by SoundWorld; give an empty or new folder")
        if made == arguments:
            for part in output.rglob(".*.tmp"):
                part.unlink()
            return
        for name in _CONTENT:
            shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(marker, json.dumps(arguments, indent=2).encode())


def _series(clips: int, seed: int) -> list[tuple[TaskSpec, Series, int]]:
    """Every split of every task, with its number of clips."""
    train = min(max(round(_TRAIN_SHARE * clips), 1), clips - 1)
    return [
        (spec, Series(seed, spec.seconds, spec.name, split), count)
        for spec in TASKS.values()
        for split, count in (("train", train), ("test", clips - train))
    ]


def _wav(wave: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, to_int16(wave), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


# Folders


def _folder_jobs(output: Path, clips: int, seed: int) -> list[tuple[Series, list[tuple[int, str]]]]:
    """Numbers and paths of the clips of each series, eight per job."""
    unlabelled = output / "unlabelled"
    unlabelled.mkdir(parents=True, exist_ok=True)
    wanted = [(Series(seed, UNLABELLED_SECONDS), [(at, str(unlabelled / f"{at:06d}.wav")) for at in range(clips)])]
    for spec, series, count in _series(clips, seed):
        root = output / "tasks" / spec.name / series.split
        files = []
        for index in range(count):
            folder = root / spec.classes[label_of(spec, index)] if spec.kind == "clip" else root
            folder.mkdir(parents=True, exist_ok=True)
            files.append((index, str(folder / f"{index:04d}.wav")))
        wanted.append((series, files))
    return [(series, files[at : at + 8]) for series, files in wanted for at in range(0, len(files), 8)]


def _write_clips(series: Series, files: list[tuple[int, str]]) -> int:
    for index, name in files:
        path = Path(name)
        if not path.exists():  # clips of an interrupted run are kept
            write_bytes(path, _wav(series.clip(index)))
    return len(files)


def _write_events(output: Path, clips: int, seed: int) -> None:
    """Write events.csv of every frame task: one row per event, an empty one for a clip without events."""
    rows: dict[str, list[tuple[str, str, str, str]]] = {}
    for spec, series, count in _series(clips, seed):
        for index in range(count if spec.kind == "frame" else 0):
            path = f"{series.split}/{index:04d}.wav"
            events = presence_events(seed, series.split, index, spec.seconds)
            timed = [(path, series.split, f"{on:.4f}", f"{off:.4f}") for on, off in events]
            rows.setdefault(spec.name, []).extend(timed or [(path, series.split, "", "")])
    for name, lines in rows.items():
        text = "".join(map(csv_line, [("path", "split", "onset", "offset"), *lines]))
        write_bytes(output / "tasks" / name / "events.csv", text.encode())


# Tars and task files of X-ARES


def _write_xares(output: Path, clips: int, seed: int, progress: bool) -> None:
    jobs = []
    for spec, series, count in _series(clips, seed):
        folder = output / "env" / _folder_name(spec)
        folder.mkdir(parents=True, exist_ok=True)
        jobs.append((series, count, str(folder / f"{series.split}-000000.tar")))
    run_parallel(_write_tar, jobs, sum(count for _, count, _ in jobs), None, progress)
    for folder in (output / "env").iterdir():
        (folder / ".audio_tar_ready").touch()
    (output / "tasks").mkdir(exist_ok=True)
    for spec in TASKS.values():
        write_bytes(output / "tasks" / f"{_function_name(spec)}_task.py", _task_file(spec).encode())


def _write_tar(series: Series, count: int, name: str) -> int:
    path = Path(name)
    if path.exists():
        return count
    spec = TASKS[series.task]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in range(count):
            key = f"{_folder_name(spec)}-{series.split}-{index:06d}"
            label = json.dumps(_label(spec, series, index)).encode()
            for member, content in ((f"{key}.wav", _wav(series.clip(index))), (f"{key}.json", label)):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    write_bytes(path, buffer.getvalue())
    return count


def _label(spec: TaskSpec, series: Series, index: int) -> dict[str, object]:
    """The label of a clip, ready for JSON."""
    if spec.kind == "frame":
        events = presence_events(series.seed, series.split, index, spec.seconds)
        return {"events": [{"label": "present", "onset": float(on), "offset": float(off)} for on, off in events]}
    label = label_of(spec, index)
    return {"label": spec.classes[label], "label_index": label}


def _folder_name(spec: TaskSpec) -> str:
    """Name of a task in the harness, which is also that of the folder of its tars."""
    return spec.name.replace("/", "-")


def _function_name(spec: TaskSpec) -> str:
    return f"soundworld_{spec.name.replace('/', '_')}"


def _task_file(spec: TaskSpec) -> str:
    """Source of a task file, which stands on its own.

    Clip tasks are scored by accuracy, MLP and k-NN; frame tasks by the average precision of frames whose centre is in
    an event.
    """
    template = _CLIP_TASK if spec.kind == "clip" else _FRAME_TASK
    return template.substitute(
        task=spec.name,
        description=spec.description,
        name=_folder_name(spec),
        function=_function_name(spec),
        classes=len(spec.classes),
        seconds=spec.seconds,
        epochs=_EPOCHS,
        weight=_POSITIVE_WEIGHT,
    )


_HEAD = '''\
"""SoundWorld, $task: $description

Written by `bestrq2 soundworld --format xares` for the harness of X-ARES.
"""

'''

_CLIP_TASK = Template(
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

_FRAME_TASK = Template(
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
