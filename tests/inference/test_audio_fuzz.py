"""Damaged and foreign audio by the hundred: each file embeds or refused in one sentence, soon and in little memory.

`mutated_audio.py` runs the cases in processes of its own, so that a decoder that crashes or hangs fails one case.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import mutated_audio
import pytest

GROUPS = {
    "samples": ["wav", "stereo wav", "6 channels", "8 bits", "adpcm", "rf64", "w64", "aiff", "au", "no audio"],
    "libsndfile": ["caf", "flac", "stereo flac", "ogg", "opus"],
    "FFmpeg": ["mp3", "lame", "m4a", "aac", "webm", "mkv"],
}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_mutated_files_are_embedded_or_refused_in_one_sentence(tmp_path: Path, group: str):
    names = GROUPS[group]
    command = [sys.executable, mutated_audio.__file__, str(tmp_path), *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"{lines[-1:]}\n{result.stderr[-3000:]}"
    assert result.stderr == ""  # where decoders grumble
    assert len(lines) == mutated_audio.CASES * len(names)
    complaints = [line for line in lines if not {"embedded", "refused"}.issuperset(line[2:])]
    assert not complaints
    outcomes = Counter((name, outcome) for name, _, *outcomes in lines for outcome in outcomes)
    for name in names:
        if name == "no audio":
            assert outcomes[name, "embedded"] == 0
        else:
            assert min(outcomes[name, "embedded"], outcomes[name, "refused"]) >= 10, name


def test_every_start_file_is_in_a_group_and_there_are_a_thousand_cases():
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted([*mutated_audio.STARTS, "no audio"])
    assert mutated_audio.CASES * len(names) >= 1_000
