"""Tars of audio as other tools write them, whole and broken."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
from recordings import noise

from bestrq2.data.shards.index import ShardIndex


def encoded(waveform: np.ndarray, rate: int, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    """A whole audio file of [samples] or [channels, samples]."""
    file = io.BytesIO()
    soundfile.write(file, waveform.T, rate, format=kind, subtype=subtype)
    return file.getvalue()


def clip(seconds: float = 2.0, rate: int = 16_000, seed: int = 0, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    return encoded(noise(seconds, rate, seed), rate, kind, subtype)


def pack(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar as `tarfile` writes it, names and contents given."""
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000
            tar.addfile(info, io.BytesIO(content))
    return path


def shard(path: Path, seeds: Iterable[int], seconds: float = 2.0, kind: str = "WAV") -> Path:
    """A tar of clips named after their seeds, with JSON."""
    members = []
    for seed in seeds:
        members.append((f"{seed:04d}.{kind.lower()}", clip(seconds, seed=seed, kind=kind)))
        members.append((f"{seed:04d}.json", json.dumps({"seed": seed}).encode()))
    return pack(path, members)


def names(index: ShardIndex) -> list[str]:
    """Names of the members that an index lists."""
    return [index.member(i) for i in range(len(index))]
