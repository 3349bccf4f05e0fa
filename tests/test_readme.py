"""The commands and scripts of the README run in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

import bestrq2
from bestrq2 import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `recordings` and `labelled`, as the README supposes, in which its commands were run."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for label, pitch in (("low", 200.0), ("high", 2000.0)):
        (folder / "labelled" / label).mkdir(parents=True)
        for number in range(8):
            time = np.arange(16_000 * (1 + number % 2)) / 16_000
            tone = 0.3 * np.sin(2 * np.pi * pitch * (1 + 0.05 * number) * time) + 0.01 * rng.standard_normal(len(time))
            soundfile.write(folder / "labelled" / label / f"{number}.wav", tone, 16_000)
    (folder / "recordings").mkdir()
    for number in range(8):
        source = folder / "labelled" / ("low", "high")[number % 2] / f"{number}.wav"
        (folder / "recordings" / f"{number:02d}.wav").write_bytes(source.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program, *words in COMMANDS:
            assert program == "bestrq2"
            # Two steps show as well as a thousand that the command works.
            assert cli.run([*("2" if word == "1000" else word for word in words)]) == 0, words
    return folder


def test_commands_write_what_the_readme_says(workplace: Path):
    assert [words[1] for words in COMMANDS] == ["embed", "search", "probe", "pretrain", "probe", "info"]
    assert len(pq.read_table(workplace / "embeddings.parquet")) == 8
    assert {"model", "checkpoints", "metrics.csv", "report.html"} <= {
        path.name for path in (workplace / "run").iterdir()
    }


def test_scripts_print_what_their_comments_say(workplace: Path, run_python):
    embedding, model = (text for kind, text in BLOCKS if kind == "python")
    finished = run_python(["-c", embedding], cwd=workplace)
    assert finished.returncode == 0, finished.stderr
    width = bestrq2.load().config.hidden_size
    assert finished.stdout.startswith(f"(2, {width})\n(2, ")
    assert f"(2, {width})" in embedding
    finished = run_python(["-c", model], cwd=workplace)
    assert finished.returncode == 0, finished.stderr
    assert "torch.Size([2, 4, 192])" in finished.stdout


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
