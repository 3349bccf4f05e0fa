"""A benchmark of two made-up packages: tones of two pitches by three speakers, and words by two."""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from bestrq2.realworld import Manifest, Recording, TaskRows

RATE = 16_000
TONES = [(label, speaker) for speaker in range(3) for label in range(2) for _ in range(4)]
WORDS = [(word, speaker) for speaker in range(2) for word in range(12)]
SAMPLES = 3
"""Samples of an instrument at the end of one file."""


def tone(seed: int, pitch: float, seconds: float = 0.4) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(len(noise)) / RATE) + 0.05 * noise).astype(np.float32)


def encoded(waveform: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, RATE, format="WAV")
    return buffer.getvalue()


def contents() -> dict[str, dict[str, bytes]]:
    """Files by package and path."""
    tones = {f"tones/{n:02d}.wav": encoded(tone(n, 300 + 500 * label)) for n, (label, _) in enumerate(TONES)}
    words = {f"words/{n:02d}.wav": encoded(tone(50 + n, 200 + 150 * word)) for n, (word, _) in enumerate(WORDS)}
    samples = b"".join((20_000 * tone(90 + n, 440)).astype("<i2").tobytes() for n in range(SAMPLES))
    free = {f"free/{n}.wav": encoded(tone(100 + n, 600)) for n in range(5)}
    return {"tones": tones | {"all.sf2": b"header.." + samples}, "words": words | free}


def write_packages(root: Path) -> None:
    """Unpacked packages, each with a changelog that tells its version."""
    for package, files in contents().items():
        log = root / package / "usr/share/doc" / package / "changelog.Debian.gz"
        log.parent.mkdir(parents=True)
        log.write_bytes(gzip.compress(f"{package} (1.0-1) unstable; urgency=low\n".encode()))
        for path, content in files.items():
            file = root / package / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def made_up_manifest() -> Manifest:
    recordings: list[Recording] = []
    for package, files in contents().items():
        for path, content in files.items():
            parts = [(0, content)]
            if path == "all.sf2":
                size = (len(content) - 8) // SAMPLES
                parts = [(8 + n * size, content[8 + n * size : 8 + (n + 1) * size]) for n in range(SAMPLES)]
            for begin, part in parts:
                digest = hashlib.sha256(part).hexdigest()[:16]
                recordings.append(Recording(package, path, begin, RATE if begin else 0, len(part), 0.4, digest))
    numbers = {recording.path: number for number, recording in enumerate(recordings)}
    tones = np.array([numbers[f"tones/{n:02d}.wav"] for n in range(len(TONES))])
    samples = np.flatnonzero([recording.path == "all.sf2" for recording in recordings])
    words = np.array([numbers[f"words/{n:02d}.wav"] for n in range(len(WORDS))])
    drums = TaskRows(
        np.concatenate([tones, samples]),
        [f"pitch {label}" for label, _ in TONES] + ["pitch 0"] * SAMPLES,
        [f"speaker {speaker}" for _, speaker in TONES] + ["instrument"] * SAMPLES,
        np.array([speaker for _, speaker in TONES] + [2] * SAMPLES),
    )
    prompts = TaskRows(
        words,
        [f"word {word}" for word, _ in WORDS],
        [f"speaker {speaker}" for _, speaker in WORDS],
        np.array([speaker for _, speaker in WORDS]),
    )
    packages = dict.fromkeys(contents(), ("1.0-1", "CC0"))
    tasks = {"speech/prompt": prompts, "music/drum": drums}
    return Manifest(packages, recordings, tasks, "0123456789abcdef")


def write_more(packages: Path, folder: Path) -> list[bytes]:
    """A package for pretraining only, and its tables in `folder`: a file, a member of an archive, a part of a file."""
    contents = [encoded(tone(200 + n, 900)) for n in range(3)]
    root, member = packages / "more", "music/deflated.wav"
    root.mkdir(parents=True)
    (root / "whole.wav").write_bytes(contents[0])
    with zipfile.ZipFile(root / "all.pk3", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, contents[1])
    (root / "all.rcc").write_bytes(b"resources " + contents[2])
    begin = (root / "all.pk3").read_bytes().index(member.encode()) + len(member)
    table = {
        "package": ["more"] * 3,
        "path": ["whole.wav", "all.pk3", "all.rcc"],
        "begin": [0, begin, 10],
        "rate": [0] * 3,
        "bytes": [len(content) for content in contents],
        "seconds": [0.4] * 3,
        "sha256": [hashlib.sha256(content).hexdigest()[:16] for content in contents],
        "name": ["", f"all/{member}", "all/10.wav"],
        "deflated": [False, True, False],
    }
    pq.write_table(pa.table(table), folder / "more_recordings.parquet")
    (folder / "more_packages.csv").write_text("package,version,licence\nmore,1.0-1,CC0\n")
    return contents
