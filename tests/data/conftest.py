"""Servers, corpora and folders for the tests of data."""

from __future__ import annotations

import numpy as np
import pytest
from recordings import noise
from shard_crops import RATE
from tars import encoded, pack

from bestrq2.data.open_source import open_source
from shard_server import serving, shards


@pytest.fixture
def server():
    """Nine shards of unequal length, 57 clips."""
    with serving(shards(9, 5, 1, 12, 4, 8, 7, 6, 5)) as running:
        yield running


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same eight clips, one of them short, as a folder of FLAC, two FLAC shards and two PCM shards."""
    root = tmp_path_factory.mktemp("corpora")
    (root / "folder").mkdir()
    waveforms = [np.int16(32767 * noise(0.6 if seed == 3 else 3, RATE, seed)) for seed in range(8)]
    for kind in ("wav", "flac"):
        (root / kind).mkdir()
        for part in range(2):
            members = [
                (f"{seed}.{kind}", encoded(waveforms[seed], RATE, kind.upper()))
                for seed in range(4 * part, 4 * part + 4)
            ]
            pack(root / kind / f"{part}.tar", members)
    for seed, waveform in enumerate(waveforms):
        (root / "folder" / f"{seed}.flac").write_bytes(encoded(waveform, RATE, "FLAC"))
    return {name: open_source(root / name) for name in ("folder", "flac", "wav")}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "cache"))
