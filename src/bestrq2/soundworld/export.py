"""SoundWorld as files: labelled folders, or the tars that X-ARES reads."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import soundfile

from bestrq2.errors import DataError
from bestrq2.files import write_bytes
from bestrq2.soundworld import speech
from bestrq2.soundworld.acoustics import SAMPLE_RATE
from bestrq2.soundworld.corpus import VERSION, Series, run_parallel, to_int16
from bestrq2.soundworld.task_specs import TASKS, TaskSpec, label_of, presence_events
from bestrq2.soundworld.xares_tasks import folder_name, task_file, task_file_name

MARKER = "soundworld.json"
FORMATS = ("folder", "xares")
UNLABELLED_SECONDS = 10.0
_OURS = ("unlabelled", "tasks", "env")  # everything a corpus consists of besides the marker


def _wav(wave: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, to_int16(wave), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _write_clips(series: Series, files: list[tuple[int, str]]) -> int:
    for index, name in files:
        path = Path(name)
        if not path.exists():  # what an interrupted run finished is kept
            write_bytes(path, _wav(series.clip(index)))
    return len(files)


def _label(spec: TaskSpec, series: Series, index: int) -> dict[str, object]:
    if spec.kind == "frame":
        events = presence_events(series.seed, series.split, index, spec.seconds)
        return {"events": [{"label": "present", "onset": float(on), "offset": float(off)} for on, off in events]}
    label = label_of(spec, index)
    return {"label": spec.classes[label], "label_index": label}


def _write_tar(series: Series, count: int, name: str) -> int:
    path = Path(name)
    if path.exists():
        return count
    spec = TASKS[series.task]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in range(count):
            key = f"{spec.name.replace('/', '-')}-{series.split}-{index:06d}"
            label = json.dumps(_label(spec, series, index)).encode()
            for member, content in ((f"{key}.wav", _wav(series.clip(index))), (f"{key}.json", label)):
                header = tarfile.TarInfo(member)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    write_bytes(path, buffer.getvalue())
    return count


def _claim(output: Path, arguments: dict[str, object]) -> None:
    """Make `output` ours: refuse a folder of someone else, keep what equal arguments made, clear what others made."""
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
            for part in output.rglob(".*.part"):
                part.unlink()
            return
        for name in _OURS:
            shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(marker, json.dumps(arguments, indent=2).encode())


def _series(clips: int, seed: int) -> list[tuple[TaskSpec, Series, int]]:
    train = min(max(round(0.75 * clips), 1), clips - 1)
    return [
        (spec, Series(seed, spec.seconds, spec.name, split), count)
        for spec in TASKS.values()
        for split, count in (("train", train), ("test", clips - train))
    ]


def _folder_jobs(output: Path, clips: int, seed: int) -> list[tuple[Series, list[tuple[int, str]]]]:
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


def _write_events(output: Path, clips: int, seed: int) -> None:
    """Write events.csv beside the splits of every frame task: one row per event, an empty one where there is none."""
    rows: dict[str, list[tuple[str, str, str, str]]] = {}
    for spec, series, count in _series(clips, seed):
        for index in range(count if spec.kind == "frame" else 0):
            path = f"{series.split}/{index:04d}.wav"
            events = presence_events(seed, series.split, index, spec.seconds)
            timed = [(path, series.split, f"{on:.4f}", f"{off:.4f}") for on, off in events]
            rows.setdefault(spec.name, []).extend(timed or [(path, series.split, "", "")])
    for name, lines in rows.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("path", "split", "onset", "offset"), *lines])
        write_bytes(output / "tasks" / name / "events.csv", text.getvalue().encode())


def _write_xares(output: Path, clips: int, seed: int, progress: bool) -> None:
    jobs = []
    for spec, series, count in _series(clips, seed):
        folder = output / "env" / folder_name(spec)
        folder.mkdir(parents=True, exist_ok=True)
        jobs.append((series, count, str(folder / f"{series.split}-000000.tar")))
    run_parallel(_write_tar, jobs, sum(count for _, count, _ in jobs), None, progress)
    for folder in (output / "env").iterdir():
        (folder / ".audio_tar_ready").touch()
    (output / "tasks").mkdir(exist_ok=True)
    for spec in TASKS.values():
        write_bytes(output / "tasks" / task_file_name(spec), task_file(spec).encode())


def write_corpus(output: Path, clips: int, format: str = "folder", seed: int = 0, progress: bool = True) -> None:
    """Write SoundWorld as files: 16-bit wav at 16 kHz.

    "folder": `unlabelled/*.wav`, and per task `tasks/<domain>/<task>/{train,test}/<class>/NNNN.wav`; frame-level tasks
    have no class folders but an `events.csv` (path, split, onset, offset in seconds; empty where a clip has none).
    "xares": `env/<domain>-<task>/{train,test}-000000.tar` with a wav and a json member per clip, and the harness's task
    files `tasks/soundworld_<domain>_<task>_task.py`; `bestrq2 xares MODEL --data OUTPUT` runs them.

    Every file is whole or absent; the same call again completes an interrupted one.

    Args:
        output: a new or empty folder, or one this function made.
        clips: labelled clips per task (three quarters for training), and unlabelled clips; at least 2.
        format: "folder" or "xares".
        seed: which world.
        progress: show progress.

    Raises:
        DataError: `output` holds something else or cannot be written, or an argument is out of range.
    """
    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}; SoundWorld writes {' or '.join(FORMATS)}")
    if clips < 2:
        raise DataError(f"clips is {clips}; at least 2 are needed, for training and for test")
    output = Path(output)
    try:
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
    except OSError as error:
        raise DataError(f"SoundWorld cannot be written to {output} ({error.strerror or error})") from error
