"""Every command runs to its end on a folder with files that ended or stalled jobs, and lists what it left out."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from recordings import CASES, announce, noise, tone, write

RATE = 16_000
# Runs a command as the console script does, and prints the largest memory of its processes (GB).
RUN = """
import logging, resource, sys
from bestrq2 import cli
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
code = cli.run(sys.argv[1:])
kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print("memory", max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1e6)
sys.exit(code)
"""
PRETRAIN = {
    "seed": 1, "trainer.max_steps": 12, "loader.batch_seconds": 40, "loader.num_workers": 2,
    "trainer.accelerator": "cpu", "trainer.report": "false",
}  # fmt: skip
ODD = {"itself.wav", "gone.mp3", "pipe.wav", "device.flac", "socket.wav", "empty.opus"}
REJECTED = ODD | {"rate.wav", "loud.wav", "source.ts"}


def wav(path: Path, samples: np.ndarray, rate: int, kind: int) -> None:
    """A mono WAV of any type of samples; `kind` is 1 for integers, 3 for floats."""
    content, width = samples.tobytes(), samples.itemsize
    form = struct.pack("<HHIIHH", kind, 1, rate, rate * width, width, 8 * width)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(content)) + content
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Classes of ordinary recordings, of hostile ones and of odd entries; with the cases, where they are at hand."""
    root = tmp_path_factory.mktemp("hostile") / "corpus"
    if CASES.is_dir():
        shutil.copytree(CASES, root)
    for name in ("low", "high", "bad", "odd", "text"):
        (root / name).mkdir(parents=True)
    for number in range(10):
        for name, hz in (("low", 300.0), ("high", 3000.0)):
            sound = tone(2, RATE, hz * (1 + number / 50)) + 0.1 * noise(2, RATE, number)
            write(root / name / f"{number}.wav", sound.astype(np.float32), RATE)
            (root / name / f"{number}.txt").write_text("notes")
    announce(write(root / "low" / "early.wav", noise(1.5, RATE), RATE), 2 * RATE)
    wav(root / "bad" / "rate.wav", np.int16(9999 * noise(1, RATE)), 1, 1)
    wav(root / "bad" / "loud.wav", 12_000 * noise(1, RATE), RATE, 3)
    wav(root / "bad" / "wide.wav", (2.0**62 * noise(1, RATE)).astype(np.int64), RATE, 1)
    (root / "bad" / "source.ts").write_text("export const a = 1;\n" * 50)
    (root / "text" / "readme.md").write_text("notes")
    odd = root / "odd"
    for name, target in {
        "itself.wav": "itself.wav", "itself": "itself", "gone.mp3": "nowhere", "device.flac": "/dev/zero", "loop": root,
    }.items():  # fmt: skip
        (odd / name).symlink_to(target)
    for name in ("pipe.wav", "pipe.tar", "pipe"):
        os.mkfifo(odd / name)
    (odd / "empty.opus").touch()
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(odd / "socket.wav"))
    return root


def first_column(listing: Path) -> set[str]:
    with listing.open() as file:
        return {Path(row["path"]).name for row in csv.DictReader(file)}


@pytest.mark.slow
def test_every_command_runs_to_its_end_and_lists_what_it_left_out(folder, tmp_path, start_python):
    def run(*arguments: object) -> str:
        finished = start_python(["-c", RUN, *map(str, arguments)]).finish(300)
        assert finished.returncode == 0, finished.stderr
        assert "Traceback" not in finished.stderr
        assert re.search(r"corpus: [0-9]+ files skipped by suffix: .*\.tar 1, \.txt 20", finished.stderr)
        assert float(finished.stdout.split("memory ")[1]) < 2
        return str(finished.stderr)

    def check(rejected: set[str], shorter: set[str]) -> None:
        assert rejected >= REJECTED
        assert rejected - REJECTED <= {"rate_1Hz.wav", "unnormalised_float.wav"}
        assert "early.wav" in shorter

    prepared, pretrained, tuned = tmp_path / "prepared", tmp_path / "run", tmp_path / "tuned"
    assert "shorter than announced: " in run("prepare", folder, prepared, "--num-workers", 2)
    with (prepared / "rejected.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if "same content" not in row["reason"]]
    check({Path(row["path"]).name for row in rows}, first_column(prepared / "shorter.csv"))
    dropped = json.loads((prepared / "summary.json").read_text())["dropped"]
    assert dropped["broken"] + dropped["silent"] == len(rows)
    flags = [part for name, value in PRETRAIN.items() for part in (f"--{name}", value)]
    run("pretrain", "--recipe", "demo", "--data", folder, "--output", pretrained, *flags)
    run("embed", pretrained, folder, "--output", tmp_path / "e.parquet", "--num-workers", 2)
    run("finetune", pretrained, folder, "--output", tuned, "--epochs", 1, "--num-workers", 2)
    run("predict", tuned, folder, "--output", tmp_path / "p.csv", "--num-workers", 2)
    for listings in (f"{pretrained}/", f"{tmp_path}/e.parquet.", f"{tuned}/", f"{tmp_path}/p.csv."):
        check(first_column(Path(f"{listings}rejected.csv")), first_column(Path(f"{listings}shorter.csv")))
    assert "text is not used as a class" in run("probe", pretrained, folder, "--output", tmp_path / "probe.json")
    result = json.loads((tmp_path / "probe.json").read_text())
    skipped = {Path(re.search(r"clip [0-9]+: (.*?): ", one)[1]).name for one in result["scores"][0]["skipped"]}
    check(skipped, {Path(one["path"]).name for one in result["provenance"]["shorter_than_announced"]})
