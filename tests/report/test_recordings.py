"""A report shows the recordings of a run by their file names, grouped by label or top folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from bestrq2.data.open_source import open_source
from bestrq2.data.sources import FileSource, split_source
from bestrq2.model.fields import ModelFields
from bestrq2.report.recordings import shown_recordings

RATE = 16_000
FILES = ("cats/tom/1.wav", "cats/2.wav", "dogs/3.wav", "dogs/4.wav", "dogs/5.wav", "6.wav")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings whose pitch tells which file they are from."""
    root = tmp_path_factory.mktemp("own recordings")
    for number, name in enumerate(FILES, start=1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.5 * np.sin(2 * np.pi * 100 * number * np.arange(2 * RATE) / RATE), RATE)
    return root


def test_recordings_have_file_names_and_top_folders(folder: Path) -> None:
    training, held_out = split_source(open_source(str(folder)), 2, 0)
    shown = shown_recordings(training, held_out, ModelFields(), seed=0)
    assert (shown.grouped_by, shown.held_out) == ("folder", 1)
    assert held_out is not None
    assert shown.names[0] == Path(held_out.describe(0)).name
    groups = {Path(name).name: name.partition("/")[0] if "/" in name else "" for name in FILES}
    assert dict(zip(shown.names, shown.groups, strict=True)) == groups
    for name, waveform in zip(shown.names, shown.waveforms, strict=True):
        assert waveform.dtype == np.int16
        assert np.argmax(np.abs(np.fft.rfft(waveform[:RATE]))) == 100 * int(name[0])


@pytest.mark.parametrize(
    ("labels", "groups", "grouped_by"),
    [
        (["a", "b", "a", "b", "", "a"], {"a", "b", ""}, "label"),
        (["a", "b", "c", "d", "e", "f"], {"cats", "dogs", ""}, "folder"),  # names of the clips rather than of groups
        (None, {"cats", "dogs", ""}, "folder"),
    ],
)
def test_labels_that_recur_come_before_folders(
    folder: Path, labels: list[str] | None, groups: set[str], grouped_by: str
) -> None:
    source = FileSource("list", [folder / name for name in FILES], labels)
    shown = shown_recordings(source, None, ModelFields(), seed=0)
    assert (set(shown.groups), shown.grouped_by, shown.held_out) == (groups, grouped_by, 0)
    if labels is not None and grouped_by == "label":
        assert dict(zip(shown.names, shown.groups, strict=True)) == {
            Path(name).name: label for name, label in zip(FILES, labels, strict=True)
        }


def test_most_recordings_are_kept_to(folder: Path) -> None:
    shown = shown_recordings(*split_source(open_source(str(folder)), 2, 0), ModelFields(), seed=0, most=3)
    assert (len(shown.names), shown.held_out) == (3, 1)


@dataclass(frozen=True)
class PreparedSource(FileSource):
    """Files with the metadata of a prepared folder."""

    def metadata(self, index: int) -> dict[str, Any]:
        return {"path": f"/field/{'north' if index % 2 else 'south'}/long.wav", "start": 10.0 * index}


def test_clips_of_prepared_folders_have_the_names_of_their_recordings(folder: Path) -> None:
    source = PreparedSource("prepared", [folder / name for name in FILES])
    shown = shown_recordings(source, None, ModelFields(), seed=0)
    assert set(zip(shown.names, shown.groups, strict=True)) == {
        ("long.wav" + (f", from {10 * index} s" if index else ""), "north" if index % 2 else "south")
        for index in range(len(FILES))
    }
