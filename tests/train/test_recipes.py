"""Every recipe is pretrained, embedded with and resumed by the same commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_run import metrics, recording, write_recordings

import bestrq2
from bestrq2 import cli
from bestrq2.recipe_book import recipes

TINY = [name for name in recipes() if name.endswith("-tiny")]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recipes") / "recordings")


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_is_pretrained_from_the_shell_and_embeds(name: str, recordings: Path, tmp_path: Path):
    run = tmp_path / "run"
    words = (
        f"pretrain --recipe {name} --data {recordings} --output {run} --model.max_seconds 2.5 --loader.batch_seconds 10"
    )
    words += " --loader.num_workers 0 --loader.validation_clips 2 --loader.statistics_clips 4 --trainer.max_steps 2"
    words += " --trainer.report false"
    assert cli.run(words.split()) == 0
    (last,) = [row for row in metrics(run) if row["step"] == "2"]
    assert np.isfinite(float(last["train/loss"]))
    embedder = bestrq2.load(run)
    clips = [recording(number, 1.5 + number) for number in range(3)]
    embeddings = embedder.embed(clips, sampling_rate=16_000)
    assert embeddings.clip.shape == (3, embedder.config.hidden_size)
    assert np.isfinite(embeddings.clip).all()
    np.testing.assert_allclose(embedder.embed(clips[1], sampling_rate=16_000).clip[0], embeddings.clip[1], atol=2e-5)
    hop = embedder.config.frame_hop_samples / 16_000
    np.testing.assert_allclose(np.diff(embeddings.timestamps[0][embeddings.frame_mask[0]]), hop)
