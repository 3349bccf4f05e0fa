"""The demo shows the encoder of the package at once, then compares two objectives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

import bestrq2
from bestrq2.commands import demo as command
from bestrq2.convert.shipped import ENCODERS
from bestrq2.errors import DataError


def sections(page: Path) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page.read_text(encoding="utf-8"))


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_compare_objectives", lambda *_: ([], ""))


def write_tones(folder: Path, pitches: dict[str, float], count: int) -> Path:
    """Folders of noisy tones of half a second to a second and a half, of about one pitch each, and a broken file."""
    rng = np.random.default_rng(0)
    for name, pitch in pitches.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            time = np.arange(8_000 * (1 + number % 3)) / 16_000
            tone = 0.3 * np.sin(2 * np.pi * pitch * (1 + 0.02 * number) * time) + 0.01 * rng.standard_normal(len(time))
            soundfile.write(folder / name / f"{name} {number}.wav", tone, 16_000)
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


@pytest.mark.usefixtures("without_training")
def test_folders_of_own_recordings_are_told_apart_and_heard(tmp_path: Path):
    recordings = write_tones(tmp_path / "sounds", {"low": 200.0, "middle": 900.0, "high": 3000.0}, 12)
    result = bestrq2.demo(tmp_path / "demo", data=recordings)
    scores = {(one.features, one.method): one for one in result.encoder_scores}
    assert scores[ENCODERS[0], "statistics"].score >= 0.8  # chance is a third
    assert 6 <= scores[ENCODERS[0], "linear"].n_test <= 9  # a fifth of every folder
    page = result.encoder_report.read_text(encoding="utf-8")
    assert sections(result.encoder_report) == ["probes", "map", "neighbours", "about", "notes"]
    assert "coloured by folder" in page
    assert len(re.findall("data:audio/", page)) == 36  # each recording once
    with pytest.raises(DataError, match="nowhere"):
        bestrq2.demo(tmp_path / "demo", data=tmp_path / "nowhere")
    assert result.encoder_report.is_file()  # a mistyped folder costs nothing


@pytest.mark.usefixtures("without_training")
def test_recordings_without_folders_are_shown_without_probes(tmp_path: Path):
    recordings = write_tones(tmp_path / "sounds", {"low": 200.0}, 6)
    result = bestrq2.demo(tmp_path / "demo", data=recordings)
    assert result.encoder_scores == []
    assert sections(result.encoder_report) == ["map", "neighbours", "about", "notes"]


@pytest.mark.slow
def test_demo_on_generated_sound_writes_both_pages(tmp_path: Path):
    result = bestrq2.demo(tmp_path / "demo", steps=2, clips=40, train=24, test=12)
    assert sections(result.encoder_report) == ["probes", "map", "neighbours", "about", "notes"]
    assert {score.domain for score in result.encoder_scores} == {"speech", "music", "environment"}
    assert sections(result.report) == ["training", "masks", "probes", "map", "neighbours", "about", "notes"]
    means = json.loads((tmp_path / "demo" / "probes.json").read_text())["means"]
    assert list(means) == ["two-step", "one-stage", "random encoder", "log-mel statistics"]
