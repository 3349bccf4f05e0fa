"""A run does what its folder says, and a resumed one ends where an uninterrupted one does."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from small_run import LOADER, MODEL, metrics, recording, same_weights, small_pretrain, weights, write_recordings

import bestrq2
from bestrq2.data.sources import ArraySource
from bestrq2.errors import CheckpointError, ConfigError, DataError
from bestrq2.train.settings import resolve


def test_a_run_leaves_the_files_it_promises(finished_run: Path):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {"config.yaml", "model", "checkpoints", "metrics.csv", "environment.json", "report.html"}
    checkpoints = finished_run / "checkpoints"
    states = {path.name for path in checkpoints.glob("*.ckpt")}
    best = (checkpoints / "best.ckpt").resolve().name
    assert states == {"step-00000004.ckpt", "step-00000006.ckpt", best, "last.ckpt", "best.ckpt"}
    assert (checkpoints / "last.ckpt").resolve().name == "step-00000006.ckpt"
    assert (
        subprocess.run("sha256sum --check --quiet *.sha256", shell=True, cwd=checkpoints, check=False).returncode == 0
    )
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (environment["recordings"], environment["held_out"]) == (12, 1)
    assert not [path for path in finished_run.rglob("*") if path.name.startswith(".")]


def test_the_written_configuration_is_the_run_s(finished_run: Path, recordings: Path):
    settings = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert settings["model"]["hidden_size"] == MODEL["hidden_size"]
    assert settings["data"] == str(recordings)
    assert resolve(settings).to_dict() == settings


def test_metrics_hold_loss_and_code_usage_at_the_logged_steps(finished_run: Path):
    rows = {int(row["step"]): row for row in metrics(finished_run)}
    assert sorted(rows) == [2, 3, 4, 6]
    for step in (2, 4, 6):
        row = {key: float(value) for key, value in rows[step].items() if value}
        assert row["train/excess_loss"] == pytest.approx(row["train/loss"] - row["train/target_entropy"], abs=1e-5)
        assert np.log(row["train/code_perplexity"]) == pytest.approx(row["train/target_entropy"], abs=1e-5)
        assert 0 < row["train/code_coverage"] <= 1
        assert 0 < row["train/top_code_share"] <= 1
    assert float(rows[3]["validation/loss"]) > 0
    assert rows[2]["validation/loss"] == ""
    # one entropy for both, over all targets so far
    entropy = float(rows[6]["validation/loss"]) - float(rows[6]["validation/excess_loss"])
    assert entropy == pytest.approx(float(rows[6]["train/target_entropy"]), abs=1e-5)
    used = [float(rows[step]["train/code_coverage"]) for step in (2, 4, 6)]
    assert used == sorted(used)
    assert used[0] < used[2]


def test_training_learns_more_than_how_frequent_each_code_is(tmp_path: Path, recordings: Path):
    trainer = {"max_steps": 100, "val_every_n_steps": 50, "log_every_n_steps": 50, "checkpoint_every_n_steps": 100}
    run = small_pretrain(recordings, tmp_path / "run", trainer=trainer, model={"quantizer_normalization": "none"})
    first, last = (row for row in metrics(run))
    assert float(last["train/loss"]) < float(first["train/loss"]) - 0.1
    assert float(last["train/excess_loss"]) < 0


def test_workers_and_intervals_of_logging_do_not_change_what_is_learned(
    tmp_path: Path, recordings: Path, undisturbed: Callable[..., Path]
):
    workers = small_pretrain(recordings, tmp_path / "workers", loader={"num_workers": 2})
    rarely = small_pretrain(recordings, tmp_path / "rarely", trainer={"log_every_n_steps": 5, "val_every_n_steps": 0})
    assert same_weights(undisturbed(), workers)
    assert same_weights(undisturbed(), rarely)


def test_the_seed_decides_everything(tmp_path: Path, recordings: Path, undisturbed: Callable[..., Path]):
    again = small_pretrain(recordings, tmp_path / "again")
    other = small_pretrain(recordings, tmp_path / "other", seed=2)
    assert same_weights(undisturbed(), again)
    assert not same_weights(undisturbed(), other)


def test_dataset_statistics_are_those_of_the_recordings(tmp_path: Path):
    loud = [10 ** (level / 20) * recording(number, 2.5) for number, level in enumerate((0, 0, 0, 0))]
    quiet = [0.1 * clip for clip in loud]
    means = {}
    for name, clips in (("loud", loud), ("quiet", quiet)):
        loader = {"validation_clips": 0, "statistics_clips": 4}
        run = small_pretrain(ArraySource(clips, 16_000, name), tmp_path / name, loader=loader)
        means[name] = weights(run)["bestrq2.statistics.mean"]
    assert torch.allclose(means["loud"] - means["quiet"], torch.full((128,), 20.0), atol=0.01)


def test_frozen_parts_stay_and_all_others_move(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"max_steps": 1}, seed=5)
    before = small_pretrain(recordings, tmp_path / "before", trainer={"max_steps": 1}, seed=5, optimizer={"lr": 1e-12})
    moved, start = weights(run), weights(before)
    for key, value in moved.items():
        frozen = key.startswith("quantizer.") or ".statistics." in key
        assert torch.equal(value, start[key]) == frozen, key


def test_bad_files_are_listed_and_training_goes_on(tmp_path: Path):
    folder = write_recordings(tmp_path / "audio", 6)
    (folder / "text.wav").write_text("not audio at all")
    (folder / "empty.flac").touch()
    soundfile.write(folder / "silent.wav", np.zeros(32_000, np.float32), 16_000)
    run = small_pretrain(folder, tmp_path / "run", loader={"validation_clips": 0})
    with (run / "rejected.csv").open(newline="") as file:
        rejected = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert set(rejected) == {"text.wav", "empty.flac", "silent.wav"}
    assert "silent" in rejected["silent.wav"]
    assert len(metrics(run)) == 4 - 1  # no validation rows


def test_rejections_are_told_whenever_their_number_has_doubled(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = write_recordings(tmp_path / "audio", 6)
    for number in range(12):
        soundfile.write(folder / f"silent{number}.wav", np.zeros(32_000, np.float32), 16_000)
    with caplog.at_level(logging.INFO):
        run = small_pretrain(folder, tmp_path / "run", loader={"validation_clips": 0}, trainer={"max_steps": 8})
    assert len((run / "rejected.csv").read_text().splitlines()) == 1 + 12
    counts = [int(text.split()[0]) for text in caplog.messages if "rejected so far" in text]
    assert len(counts) > 1
    assert all(old.bit_length() < new.bit_length() for old, new in pairwise(counts))


def test_everything_rejected_stops_the_run_with_the_reason(tmp_path: Path):
    folder = tmp_path / "audio"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.wav").write_text("not audio at all")
    for workers in (0, 1):
        with pytest.raises(DataError, match="all 3 recordings were rejected"):
            small_pretrain(folder, tmp_path / f"run{workers}", loader={"validation_clips": 0, "num_workers": workers})


def test_an_existing_run_is_only_touched_with_resume(finished_run: Path, recordings: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--resume"):
        small_pretrain(recordings, finished_run)
    before = (finished_run / "metrics.csv").read_bytes()
    small_pretrain(recordings, finished_run, resume=True, trainer={"report": True})
    assert (finished_run / "metrics.csv").read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_text("precious")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        small_pretrain(recordings, other)


def test_resume_starts_a_run_that_is_not_there(tmp_path: Path, recordings: Path):
    run = small_pretrain(recordings, tmp_path / "run", resume=True, trainer={"max_steps": 2})
    assert (run / "model" / "model.safetensors").is_file()


def test_the_exported_model_with_averaging_is_the_average(
    tmp_path: Path, recordings: Path, undisturbed: Callable[..., Path]
):
    plain = weights(undisturbed())
    averaged = weights(small_pretrain(recordings, tmp_path / "averaged", trainer={"ema": True}))
    key = "bestrq2.encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(plain[key], averaged[key])
    assert torch.equal(plain["quantizer.codebook"], averaged["quantizer.codebook"])


@pytest.mark.parametrize("ema", [False, True])
def test_a_kept_checkpoint_loads_as_the_model_of_its_step(tmp_path: Path, recordings: Path, ema: bool):
    run = small_pretrain(recordings, tmp_path / "run", trainer={"ema": ema, "keep_every_n_steps": 1})
    *_, earlier, last = sorted((run / "checkpoints").glob("step-*.ckpt"))
    expected = bestrq2.load(run).model.state_dict()
    found = bestrq2.load(last).model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(bestrq2.load(earlier).model.encoder.norm.weight, expected["encoder.norm.weight"])
    (run / "checkpoints" / "step-00000009.ckpt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        bestrq2.load(run / "checkpoints" / "step-00000009.ckpt")


def test_gradient_checkpointing_changes_nothing_but_memory(
    tmp_path: Path, recordings: Path, undisturbed: Callable[..., Path]
):
    plain = weights(undisturbed())
    saving = weights(small_pretrain(recordings, tmp_path / "saving", trainer={"gradient_checkpointing": True}))
    assert all(torch.allclose(plain[key], saving[key], atol=1e-6) for key in plain)


def test_clips_of_very_different_length_train_together(tmp_path: Path):
    clips = [recording(0, 0.05), recording(1, 0.2), recording(2, 9.0), recording(3, 2.5)]
    run = small_pretrain(ArraySource(clips, 16_000, "mixed"), tmp_path / "run", loader=LOADER | {"validation_clips": 0})
    assert all(np.isfinite(float(row["train/loss"])) for row in metrics(run))
