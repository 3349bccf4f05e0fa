"""The script for a few minutes on a GPU: what it packs, how it deals with failures, and what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bestrq2.data.open_source import open_source
from bestrq2.data.shards.writer import ShardWriter
from example_sounds import scenes


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


def test_small_groups_are_packed_whole_and_large_ones_get_equal_time():
    from recordings_pack import chosen_clips, fair_shares

    assert fair_shares({"large": 100.0, "small": 2.0, "larger": 200.0}, 42.0) == {"small": 2, "large": 20, "larger": 20}
    groups = ["small"] * 2 + ["large"] * 50 + ["larger"] * 100
    parts = chosen_clips(groups, np.full(len(groups), 2.0), 44.0, 2)
    assert not set(parts[0]) & set(parts[1])
    for part in parts:
        assert sorted(groups[clip] for clip in part) == ["large"] * 5 + ["larger"] * 5 + ["small"]


def test_unpacked_clips_have_the_length_and_place_of_packed_ones(tmp_path):
    pytest.importorskip("av")
    import io

    import soundfile
    from recordings_pack import excerpt, unpack, write_part

    (tmp_path / "shards").mkdir()
    writer = ShardWriter(tmp_path / "shards" / "000.tar")
    for number, clip in enumerate(scenes(3, 40_000).numpy()):
        file = io.BytesIO()
        soundfile.write(file, clip[: 40_000 - 7_001 * number], 16_000, format="WAV", subtype="PCM_16")
        writer.add(f"{number}", file.getvalue(), "wav", {})
    writer.close({})
    source = open_source(tmp_path / "shards")
    clips = [2, 0, 1]
    assert write_part(tmp_path / "part-0", source, clips, ["a/b"] * 3, kbit=32, longest=2.0) * 16_000 == 89_998
    unpack(tmp_path / "part-0", tmp_path / "again", processes=1)
    again = open_source(tmp_path / "again")
    for number, clip in enumerate(clips):
        expected = excerpt(source, clip, 2.0).astype(float)
        with again.opened(number) as decoder:
            found = decoder.read(0, None)
        assert len(found) == len(expected)
        assert np.corrcoef(found, expected)[0, 1] > 0.8, "shifted, or another clip"


def test_failures_are_told_and_do_not_stop_other_stages_and_done_ones_are_skipped(tmp_path, monkeypatch, capsys):
    import on_a_gpu

    for name, code in (
        ("good.py", "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{\"hours\": 2.0}')"),
        ("bad.py", "raise ValueError('no')"),
        ("slow.py", "import time; time.sleep(60)"),
    ):
        (tmp_path / name).write_text(code)
    stages = [
        on_a_gpu.Stage("bad", 50, {"bad": ["bad.py"]}),
        on_a_gpu.Stage("slow", 50, {"slow": ["slow.py"]}, background=True),
        on_a_gpu.Stage("part-0", 50, {"part-0": ["good.py"]}),
    ]
    monkeypatch.setattr(on_a_gpu, "HERE", tmp_path)
    monkeypatch.setattr(on_a_gpu, "LEAST", 0.1)
    monkeypatch.setattr(on_a_gpu, "stages", lambda options: stages)
    arguments = ["on_a_gpu.py", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*arguments, "--seconds", str(on_a_gpu.GRACE + 3)])
        on_a_gpu.main()
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {name: stage["outcome"] for name, stage in found.items()} == {
        "bad": "failed with exit code 1", "part-0": "done", "slow": "out of time",
    }  # fmt: skip
    assert found["part-0"]["figures"] == {"part-0": {"hours": 2.0}}
    printed = capsys.readouterr().out
    assert "part-0: done before" in printed
    assert "recordings  2.00 hours" in printed
    assert "ValueError: no" in (tmp_path / "results" / "log.txt").read_text()
