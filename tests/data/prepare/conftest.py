"""A corpus of everything that people have: formats, rates, channels, and what cannot be used."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))

from recordings import announce, cut, noise, write

from bestrq2.commands.prepare import prepare
from example_sounds import RATE, scene


def at_rate(seconds: float, rate: int, seed: int) -> np.ndarray:
    """A scene heard at another rate, float32 [samples]."""
    return scene(round(seconds * rate), seed)


def write_mixed(folder: Path) -> Path:
    """Thirteen files, five of them unusable."""
    folder.mkdir(parents=True)
    soundfile.write(folder / "a-plain.wav", scene(3 * RATE, 1), RATE)
    write(folder / "b-stereo.flac", np.stack([at_rate(2.5, 44_100, 2), at_rate(2.5, 44_100, 3)]), 44_100)
    write(folder / "c-music.lame.mp3", at_rate(3.0, 44_100, 4), 44_100)
    write(folder / "d-phone.m4a", at_rate(3.0, 44_100, 5), 44_100)
    write(folder / "e-narrow.wav", at_rate(4.2, 8000, 6), 8000)
    write(folder / "f-again.flac", soundfile.read(folder / "a-plain.wav")[0].astype(np.float32), RATE)
    (folder / "g-broken.wav").write_bytes(b"this is no audio" * 100)
    write(folder / "h-silent.wav", 2e-5 * noise(2.0, RATE, 8), RATE)
    soundfile.write(folder / "i-short.wav", scene(4000, 9), RATE)
    cut(folder / "d-phone.m4a").rename(folder / "j-cut.m4a")
    write(folder / "k-early.wav", scene(2 * RATE, 10), RATE)
    announce(folder / "k-early.wav", 3 * RATE)
    loud = 2.5 * scene(2 * RATE, 11)
    soundfile.write(folder / "l-loud.wav", loud / np.abs(loud).max() * 1.5, RATE, subtype="FLOAT")
    pause = np.concatenate([scene(RATE, 12), np.zeros(2 * RATE, np.float32), scene(RATE + 3000, 13)])
    soundfile.write(folder / "m-pause.wav", pause, RATE)
    return folder


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `write_mixed`."""
    return write_mixed(tmp_path_factory.mktemp("mixed") / "corpus")


class Prepared:
    """What lies in a prepared folder, read with nothing but `tarfile`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tars = sorted(folder.glob("*.tar"))
        self.audio: dict[str, bytes] = {}
        self.json: dict[str, dict[str, Any]] = {}
        for path in self.tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    content = tar.extractfile(member).read()
                    if suffix == "json":
                        self.json[key] = json.loads(content)
                    else:
                        self.audio[key] = content
        assert list(self.json) == list(self.audio)

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def rejected(self) -> list[tuple[str, str]]:
        with (self.folder / "rejected.csv").open() as file:
            return [(Path(row["path"]).name, row["reason"]) for row in csv.DictReader(file)]

    @property
    def contents(self) -> dict[str, bytes]:
        """All that must not depend on workers and interruptions: everything but the times in the indices."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self.folder.iterdir())
            if not path.name.endswith(".index.parquet")
        }


@pytest.fixture(scope="session")
def prepared_folder() -> Callable[[Path], Prepared]:
    """Reads a prepared folder."""
    return Prepared


@pytest.fixture(scope="session")
def prepared_mixed(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The mixed corpus in segments of one second, by two workers, in shards of about 0.15 MB."""
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(str(mixed), output, segment_seconds=1.0, shard_size=0.15, num_workers=2)
    return Prepared(output)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sounds."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", scene(RATE, number), RATE)
    return folder


@pytest.fixture(scope="module", params=["wav", pytest.param("flac", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prepare makes of them."""
    output = tmp_path_factory.mktemp("made") / "out"
    prepare(str(source), output, format=request.param, shard_size=0.01, num_workers=2)
    return output


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy to damage; time stamps are not copied, which is no damage."""
    shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copyfile)
    return tmp_path / "copy"
