"""A run that stops because nothing is finite any more leaves what `bestrq2 replay` needs to say why."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from small_run import after_steps, flags, metrics, small_pretrain

from bestrq2 import cli
from bestrq2.errors import BestRQ2Error, CheckpointError, ConfigError
from bestrq2.train import loop
from bestrq2.train.checkpoints import read_state, write_state
from bestrq2.train.guard import gradient_norm
from bestrq2.train.replay import load_failure, replay_step

BROKEN = "bestrq2.encoder.blocks.1.attn.qkv"
SETTINGS = {"log_every_n_steps": 1, "val_every_n_steps": 0, "checkpoint_every_n_steps": 100, "max_steps": 50}


def break_weight(monkeypatch: pytest.MonkeyPatch, after: int, value: float) -> None:
    """Put a value into one weight once so many batches are done."""

    def breaking(run: loop.Run, step: int) -> None:
        if step == after:
            with torch.no_grad():
                run.task.model.get_submodule(BROKEN).weight[3, 5] = value

    after_steps(monkeypatch, breaking)


def failed_run(recordings: Path, output: Path, trainer: dict[str, Any], **changes: Any) -> Path:
    """The failure folder of a run that must stop after two skipped steps in a row."""
    watch = {"max_skipped_in_a_row": 2, **changes.pop("watch", {})}
    with pytest.raises(BestRQ2Error, match="bestrq2 replay") as caught:
        small_pretrain(recordings, output, trainer={**SETTINGS, **trainer}, watch=watch, **changes)
    assert type(caught.value) is BestRQ2Error  # the machine's or the method's fault, not wrong input: exit code 1
    (folder,) = (output / "failures").iterdir()
    assert str(folder) in str(caught.value)
    return folder


@pytest.fixture(scope="module")
def failure(tmp_path_factory: pytest.TempPathFactory, recordings: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        break_weight(patch, 2, float("nan"))
        return failed_run(recordings, tmp_path_factory.mktemp("failed") / "run", {}, watch={"max_skipped_in_a_row": 3})


def test_a_run_stops_after_the_configured_number_of_skipped_steps_in_a_row(failure: Path):
    assert failure.name == "step-00000005"  # good steps 1 and 2, bad ones 3, 4 and 5
    facts = json.loads((failure / "failure.json").read_text())
    assert (facts["step"], facts["skipped_in_a_row"], facts["ranks"]) == (5, 3, 1)
    assert (facts["loss"], facts["gradient_norm"]) == (["nan"], "nan")
    assert (facts["precision"], facts["device"]) == ("32-true", "cpu")
    assert facts["environment"]["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [float(row["train/skipped_steps"]) for row in metrics(failure.parents[1])] == [0, 0, 1, 2, 3]


def test_the_failure_folder_holds_the_batch_and_names_every_clip(failure: Path, recordings: Path):
    ((batch, loss),) = load_failure(failure).ranks[0]
    assert math.isnan(loss)
    assert batch.places.tolist() == [0, 1, 2, 3]
    assert batch.packing.clips().sum() == len(batch.lengths) == len(batch.recordings)
    counts = batch.packing.clips().tolist()
    firsts = [(row, number) for row, count in enumerate(counts) for number in range(1, count + 1)]
    for name, (row, number) in zip(batch.recordings, firsts, strict=True):
        assert Path(name).parent == recordings
        first = int(batch.packing.frames[row][batch.packing.segments[row] == number][0])
        begin = first * 625 + 1024  # after the reflected beginning
        clip = batch.to("cpu").input_values[row, begin : begin + 64]
        original = soundfile.read(name, dtype="float32")[0]
        windows = np.lib.stride_tricks.sliding_window_view(original, 64)
        assert (windows == clip.numpy()).all(axis=1).any()  # cut from the recording that is named
    assert batch.hidden_mask.any(dim=1).all()


def test_the_saved_state_is_a_whole_one(failure: Path):
    state = torch.load(failure / "state.ckpt", weights_only=True)
    assert state["bestrq2"]["guard"] == {"skipped": 3, "in_a_row": 3}
    assert state["bestrq2"]["config"]["watch"]["max_skipped_in_a_row"] == 3
    moments = state["optimizer_states"][0]["state"]
    assert {float(each["step"]) for each in moments.values()} == {2.0}
    assert torch.isnan(state["state_dict"][f"model.{BROKEN}.weight"]).sum() == 1


def test_replay_reproduces_the_step_and_names_where_it_began(failure: Path, capsys: pytest.CaptureFixture[str]):
    result = replay_step(failure)
    assert result.reproduced
    assert (result.step, result.first_weight, result.first_module) == (5, f"{BROKEN}.weight", BROKEN)
    assert result.first_gradient is not None
    ((batch, _),) = load_failure(failure).ranks[0]
    assert len(result.clips) == len(batch.lengths) > 4
    assert all(clip.audio_finite and clip.log_mel_finite for clip in result.clips)
    assert cli.run(["replay", str(failure)]) == 0
    printed = capsys.readouterr().out
    assert "step 5: reproduced" in printed
    assert f"first module whose output is not finite: {BROKEN}\n" in printed
    assert printed.count(".wav") == len(result.clips)


@pytest.mark.parametrize(
    ("trainer", "rounds"),
    [({"accumulate_grad_batches": 2}, 1), ({"precision": "bf16-mixed", "gradient_checkpointing": True}, 2)],
    ids=["accumulated", "second round in bf16"],
)
def test_replay_makes_the_same_loss_to_the_last_bit(
    trainer: dict[str, Any],
    rounds: int,
    tmp_path: Path,
    recordings: Path,
    undisturbed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    norms = []
    changes = {} if rounds == 1 else {"teacher": undisturbed(), "model": {"num_codebooks": 2}}

    def infinite(parameters: Any) -> torch.Tensor:
        norms.append(float(gradient_norm(parameters)))
        return torch.tensor(torch.inf)

    monkeypatch.setattr("bestrq2.train.guard.gradient_norm", infinite)
    folder = failed_run(recordings, tmp_path / "run", {"max_steps": 3, **trainer}, **changes)
    monkeypatch.undo()
    result = replay_step(folder)
    assert all(np.isfinite(loss) for loss in result.losses)
    assert result.losses == result.recorded_losses
    assert result.gradient_norm == norms[-1]
    assert len(result.losses) == trainer.get("accumulate_grad_batches", 1)
    assert not result.reproduced  # the norm was said to be infinite, and is not
    assert (result.first_weight, result.first_module, result.first_gradient) == (None, None, None)
    assert "NOT reproduced" in str(result)


def test_a_clip_that_is_not_finite_is_named(failure: Path, tmp_path: Path):
    copy = shutil.copytree(failure, tmp_path / "copy")
    file = copy / "rank-0.ckpt"
    state = read_state(file)
    waveforms = state["batches"][0]["input_values"].float()
    waveforms[2, 100] = torch.inf
    state["batches"][0]["input_values"] = waveforms
    write_state(file, state)
    clips = replay_step(copy).clips
    assert [clip.place for clip in clips if not clip.audio_finite] == [2]
    assert [clip.place for clip in clips if not clip.log_mel_finite] == [2]
    assert "audio and log-mel NOT FINITE" in str(clips[2])


def test_other_weights_are_not_taken_for_the_recorded_step(failure: Path, tmp_path: Path):
    saved = load_failure(failure)
    saved.state["state_dict"][f"model.{BROKEN}.weight"][3, 5] = 0.01
    copy = shutil.copytree(failure, tmp_path / "copy")
    write_state(copy / "state.ckpt", saved.state)
    result = replay_step(copy)
    assert not result.reproduced
    assert result.first_module is None
    assert np.isfinite(result.losses).all()


def test_a_few_skipped_steps_do_not_stop_a_run(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch):

    def mending(run: loop.Run, step: int) -> None:
        with torch.no_grad():
            run.task.model.get_submodule(BROKEN).weight[3, 5] = torch.nan if step in (2, 3) else 0.01

    after_steps(monkeypatch, mending)
    run = small_pretrain(
        recordings, tmp_path / "run", trainer={**SETTINGS, "max_steps": 6}, watch={"max_skipped_in_a_row": 3}
    )
    assert not (run / "failures").exists()
    assert float(metrics(run)[-1]["train/skipped_steps"]) == 2


def test_bad_input_is_named_in_one_sentence(failure: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(CheckpointError, match=r"failure\.json is missing"):
        replay_step(tmp_path)
    for name, pattern in (
        ("failure.json", r"failure\.json: missing or damaged"),
        ("state.ckpt", r"state\.ckpt: damaged"),
        ("rank-0.ckpt", r"rank-0\.ckpt: damaged"),
    ):
        copy = shutil.copytree(failure, tmp_path / name)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=pattern):
            replay_step(copy)
    with pytest.raises(ConfigError, match="ranks 0 to 0"):
        replay_step(failure, rank=1)
    with pytest.raises(ConfigError, match="device"):
        replay_step(failure, device="abacus")
    assert cli.run(["replay", str(tmp_path / "nowhere")]) == 2
    assert "holds no saved step" in capsys.readouterr().err


def test_the_command_line_ends_with_code_1_and_one_sentence(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    break_weight(monkeypatch, 1, float("inf"))
    words = ["--data", str(recordings), "--output", str(tmp_path / "run"), *flags(steps=20)]
    assert cli.run(["pretrain", *words, "--watch.max_skipped_in_a_row", "2"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bestrq2 pretrain: ")]
    assert line.endswith(f"bestrq2 replay {tmp_path / 'run' / 'failures' / 'step-00000003'}")
