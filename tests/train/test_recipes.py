"""Every recipe is pretrained, embedded with and resumed by the same commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_run import killed_copy, metrics, recording, same_runs, small_pretrain, write_recordings

import bestrq2
from bestrq2 import cli
from bestrq2.recipe_book import recipes

TINY = [name for name in recipes() if name.endswith("-tiny")]
CONFORMER = {
    "encoder_type": "conformer", "position_embedding": "relative", "objective": "one_stage", "mask_fill": "noise",
    "num_mel_bands": 80, "patch_size": [80, 4], "n_fft": 400, "win_length": 400, "hop_length": 160,
    "mask_shape": "span", "mask_block_size": [1, 4], "norm": "layernorm", "activation": "gelu", "use_bias": True,
    "qk_norm": False, "input_normalization": "clip", "conformer_channels": [8, 4], "conformer_kernel_size": 5,
    "conformer_dropout": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recipes") / "recordings")


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_is_pretrained_from_the_shell_and_embeds(name: str, recordings: Path, tmp_path: Path):
    run = tmp_path / "run"
    words = f"pretrain --recipe {name} --data {recordings} --output {run} --model.max_seconds 2.5 --loader.batch_size 4"
    words += " --loader.num_workers 0 --loader.validation_clips 2 --loader.statistics_clips 4 --trainer.max_steps 2"
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


@pytest.mark.parametrize(
    "model", [CONFORMER, {"masks_per_clip": 2, "mask_ratio": [0.5, 0.5]}], ids=["conformer", "masks"]
)
def test_a_killed_run_resumes_to_the_same_weights(
    model: dict[str, object], recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Noise, dropout and masks are functions of seed, step and place."""
    whole = small_pretrain(recordings, tmp_path / "whole", model=model)
    killed = killed_copy(tmp_path, recordings, monkeypatch, model=model)
    assert same_runs(whole, small_pretrain(recordings, killed, model=model, resume=True))
