"""The README's code blocks run, in their order, as a newcomer would run them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from bestrq2 import cli
from bestrq2.recipe_book import recipes

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `recordings` and `labelled`, as the README supposes."""
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
    return folder


def test_code_blocks_run(workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(workplace)
    commands = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    assert [line.split()[1] for line in commands] == [
        "pretrain",
        "prepare",
        "pretrain",
        "embed",
        "info",
        "probe",
        "compare",
    ]
    for line in commands:
        assert cli.run(shlex.split(line)[1:]) == 0, line
    assert len(pq.read_table("embeddings.parquet")) == 8
    assert {path.name for path in Path("comparison").iterdir()} >= {"table.md", "comparison.json", "loss.png"}
    scripts = [text for kind, text in BLOCKS if kind == "python"]
    assert len(scripts) == 3
    for script in scripts:
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
    assert "torch.Size([2, 4, 192])" in result.stdout


def test_the_table_of_recipes_is_complete():
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for name in recipes():
        base, _, size = name.rpartition("-")
        whole = any(f"`{name}`" in row for row in rows)
        assert whole or any(f"`{base}-" in row and f"`-{size}`" in row for row in rows), name
