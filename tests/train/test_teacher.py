"""A second round learns the clustered states of a trained encoder beside random codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import at_step, die, recording, same_runs, small_pretrain, weights

import bestrq2
from bestrq2.commands.pretrain import pretrain
from bestrq2.convert.loading import load_encoder
from bestrq2.data.batch import fixed_batches
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.evaluate.provenance import run_provenance
from bestrq2.inference.cost import cost
from bestrq2.inference.embedder import weights_hash
from bestrq2.inference.info import model_info
from bestrq2.report.model_card import origin_of
from bestrq2.report.runs import read_training
from bestrq2.train.settings import resolve
from bestrq2.train.teacher import Clusters, Teacher, layer_states, teaching_encoder


def second_round(teacher: Path, data: Path, output: Path, steps: int = 4, **changes: Any) -> Path:
    """A small run of two codebooks, one of them the teacher's."""
    model = {"num_codebooks": 2, "num_hidden_layers": 3, **changes.pop("model", {})}
    return small_pretrain(data, output, teacher=teacher, model=model, trainer={"max_steps": steps}, **changes)


def test_clusters_are_found_whatever_the_scale_of_their_directions():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 16, generator=generator)
    kinds = torch.randint(8, (2000,), generator=generator)
    states = 100 * (centres[kinds] + 0.01 * torch.randn(2000, 16, generator=generator))
    clusters = Clusters.fit(states, codes=8, seed=1)
    codes = clusters.codes(states)
    assert [len(codes[kinds == kind].unique()) for kind in range(8)] == [1] * 8
    assert len(codes.unique()) == 8
    normed = torch.nn.functional.layer_norm(states, (16,))
    distances = torch.cdist((normed - clusters.mean) @ clusters.projection, clusters.centroids)
    assert torch.equal(codes, distances.argmin(dim=1))
    again = Clusters.fit(states, codes=8, seed=1)
    assert all(
        torch.equal(one, other) for one, other in zip(vars(clusters).values(), vars(again).values(), strict=True)
    )


def test_the_codes_of_the_teacher_replace_those_of_the_last_codebooks(tiny_pretraining: Callable[..., object]):
    audio = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
    for books, taught in ((2, 1), (3, 1), (4, 2)):
        model = tiny_pretraining(num_codebooks=books, max_seconds=2.5).eval()
        patches = model.bestrq2.patches(audio).encoder_input.shape[1]
        mask = (torch.arange(patches) % 2 == 0).expand(2, -1)
        codes = torch.arange(patches)[None, :, None].expand(2, -1, taught) % model.config.codebook_size
        own = model(audio, hidden_mask=mask).targets.reshape(2, -1, books)
        mixed = model(audio, hidden_mask=mask, teacher_codes=codes).targets.reshape(2, -1, books)
        assert torch.equal(mixed[..., : books - taught], own[..., : books - taught])
        assert torch.equal(mixed[..., books - taught :], codes[:, ::2])


def test_a_second_round_has_the_middle_layer_of_the_first_as_targets(
    undisturbed: Callable[..., Path], recordings: Path, tmp_path: Path
):
    first = undisturbed()
    run = second_round(first, recordings, tmp_path / "run")
    teacher, encoder = Teacher.load(run / "teacher"), load_encoder(first)
    assert list(teacher.clusters) == [1]
    assert encoder.config.num_hidden_layers == 2
    clips = [recording(number, 2.5) for number in range(4)]
    (batch,) = fixed_batches(clips, encoder.config, 4)
    rows = batch.to("cpu").input_values
    states = layer_states(encoder.eval(), rows, batch.packing)[1]
    codes = teacher.codes(rows, batch.packing)
    assert torch.equal(codes[..., 0], teacher.clusters[1].codes(states))
    assert len(codes.unique()) > 8

    gflops = cost(teacher.encoder.config).inference_gflops
    assert read_training(run).cost.training_gflops == pytest.approx(
        cost(read_training(run).model).training_gflops + gflops
    )
    assert run_provenance(run)["teacher_gflops"] == pytest.approx(gflops)
    assert f"{first} (sha256 {weights_hash(encoder)})" in model_info(run)["second round after"]
    assert "sha256" in origin_of(str(run)).training["second round after"]
    assert bestrq2.load(run).embed(clips[0], 16_000).clip.shape == (1, 32)


def test_a_killed_second_round_resumes_exactly_without_its_teacher(
    undisturbed: Callable[..., Path], recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "first"
    shutil.copytree(undisturbed(), source)
    whole = second_round(source, recordings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 3, die)
        with pytest.raises(RuntimeError, match="killed"):
            second_round(source, recordings, tmp_path / "run")
    source.rename(tmp_path / "gone")
    resumed = pretrain(output=tmp_path / "run", resume=True)
    assert same_runs(whole, resumed)
    assert json.loads((resumed / "environment.json").read_text())["teacher"]["model"] == str(source)
    with pytest.raises(ConfigError, match=r"teacher was .*first' and is now"):
        pretrain(output=tmp_path / "run", resume=True, teacher=tmp_path / "gone")
    (resumed / "teacher" / "clusters.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"clusters\.safetensors: missing or damaged"):
        pretrain(output=tmp_path / "run", resume=True, trainer={"max_steps": 8})


def test_without_a_teacher_nothing_changes_and_with_one_the_weights_do(
    undisturbed: Callable[..., Path], recordings: Path, tmp_path: Path
):
    settings = yaml.safe_load((undisturbed() / "config.yaml").read_text())
    assert "teacher" not in settings
    assert resolve(settings).teacher is None
    one, other = (second_round(undisturbed(), recordings, tmp_path / str(seed), 2, seed=seed) for seed in (0, 1))
    assert not torch.equal(weights(one)["head.weight"], weights(other)["head.weight"])


def test_an_encoder_that_cannot_teach_is_refused(
    undisturbed: Callable[..., Path], recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a folder "demo", as `make demo` leaves it, would be taken for the model
    first = undisturbed()
    with pytest.raises(ConfigError, match="demo: a recipe has no trained weights"):
        teaching_encoder("demo", resolve({"recipe": "demo", "data": "x", "output": "y"}).model)
    with pytest.raises(
        ConfigError, match=r"cuts audio into other patches: hop_length is 625 there, 320 in the settings"
    ):
        second_round(first, recordings, tmp_path / "run", model={"hop_length": 320})
    with pytest.raises(ConfigError, match=r"has 2 layers, of which half of model\.num_codebooks \(6\) needs one each"):
        second_round(first, recordings, tmp_path / "run", model={"num_codebooks": 6})
    with pytest.raises(ConfigError, match=r"set model\.num_codebooks to 2 or more"):
        second_round(first, recordings, tmp_path / "run", model={"num_codebooks": 1})
    with pytest.raises(CheckpointError, match="does not exist"):
        second_round(tmp_path / "nothing", recordings, tmp_path / "run")
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "config.yaml").exists()
