"""The rules of the HEAR 2021 API (https://hearbenchmark.com/hear-api.html), each checked by itself."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import torch

from bestrq2.errors import AudioError, CheckpointError, ConfigError
from bestrq2.evaluate import hear
from bestrq2.inference.embedder import Embedder
from example_sounds import RATE, scene, scenes

HOP_MS = 50.0
LENGTHS = [1.07, 1.98, 4.0, 0.02, 7.3]


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny_encoder) -> str:
    folder = tmp_path_factory.mktemp("hear") / "model"
    tiny_encoder(max_seconds=2.5, drop_path_rate=0.5).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(path) -> hear.HearModel:
    return hear.load_model(path)


def test_the_module_has_the_three_functions_with_their_arguments():
    module = importlib.import_module("bestrq2.evaluate.hear")
    assert next(iter(inspect.signature(module.load_model).parameters)) == "model_file_path"
    for name in ("get_scene_embeddings", "get_timestamp_embeddings"):
        assert list(inspect.signature(getattr(module, name)).parameters) == ["audio", "model"]


def test_the_model_is_a_torch_module_with_the_three_attributes(model):
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in (16_000, 22_050, 32_000, 44_100, 48_000)
    assert type(model.scene_embedding_size) is int
    assert type(model.timestamp_embedding_size) is int
    assert model.sample_rate == RATE
    assert len(list(model.parameters())) > 0


@pytest.mark.parametrize("seconds", LENGTHS)
def test_scene_embeddings_are_one_vector_a_sound(model, seconds):
    audio = scenes(3, int(seconds * RATE))
    embeddings = hear.get_scene_embeddings(audio, model)
    assert embeddings.shape == (3, model.scene_embedding_size)
    assert embeddings.dtype == torch.float32
    expected = Embedder(model.model, "cpu").embed(list(audio)).clip
    np.testing.assert_allclose(embeddings.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("seconds", LENGTHS)
def test_timestamps_are_regular_from_the_start_to_the_end(model, seconds):
    audio = scenes(2, int(seconds * RATE))
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.dtype == timestamps.dtype == torch.float32
    assert embeddings.shape == (*timestamps.shape, model.timestamp_embedding_size)
    assert timestamps.shape[0] == 2
    assert torch.equal(timestamps[0], timestamps[1])
    milliseconds = 1000 * audio.shape[1] / RATE
    assert float(timestamps.min()) == 0.0
    assert milliseconds - HOP_MS < float(timestamps.max()) <= milliseconds
    if timestamps.shape[1] > 1:
        steps = timestamps[0].diff()
        assert float(steps.max()) <= HOP_MS
        assert float((steps - steps.mean()).abs().max()) < 1.0


def test_timestamps_of_long_audio_do_not_drift(model):
    """A rounded hop of 1/16000 s would be off by seconds after twenty minutes; a frame stays where it should be."""
    audio = torch.from_numpy(np.tile(scene(RATE), 120))[None]
    _, timestamps = hear.get_timestamp_embeddings(audio, model)
    hop = 1000 * model.frame_seconds / model.phases
    expected = hop * torch.arange(timestamps.shape[1], dtype=torch.float64)
    assert float((timestamps[0].double() - expected).abs().max()) < 0.1


def test_embeddings_are_centred_on_their_timestamps(model):
    """A click changes most the embedding whose timestamp it lies at, near the ends too."""
    quiet = 1e-3 * scenes(1, 4 * RATE)
    for moment in (0.05, 1.3, 2.617, 3.95):
        clicked = quiet.clone()
        clicked[0, int(moment * RATE) : int(moment * RATE) + 160] += 0.8 * scenes(1, 160)[0]
        before, timestamps = hear.get_timestamp_embeddings(quiet, model)
        after, _ = hear.get_timestamp_embeddings(clicked, model)
        change = (after - before).norm(dim=-1)[0].double()
        centre = float((change**4 * timestamps[0]).sum() / (change**4).sum())
        assert abs(centre - 1000 * moment) < 1000 * model.frame_seconds / 2, moment


def test_results_are_the_same_every_time_and_for_every_batch(model):
    audio = scenes(3, 30_000)
    model.train()  # a harness may do so; stochastic depth stays off
    first, again = (hear.get_timestamp_embeddings(audio, model)[0] for _ in range(2))
    assert torch.equal(first, again)
    alone, _ = hear.get_timestamp_embeddings(audio[1:2], model)
    torch.testing.assert_close(alone[0], first[1], atol=1e-4, rtol=1e-3)
    scene_first, scene_again = (hear.get_scene_embeddings(audio, model) for _ in range(2))
    assert torch.equal(scene_first, scene_again)


def test_embeddings_have_no_gradients_and_leave_the_audio_as_it_was(model):
    audio = scenes(2, 20_000)
    kept = audio.clone()
    tracked = audio.clone().requires_grad_()
    assert not hear.get_scene_embeddings(tracked, model).requires_grad
    assert not hear.get_timestamp_embeddings(tracked, model)[0].requires_grad
    hear.get_timestamp_embeddings(audio, model)
    assert torch.equal(audio, kept)


def test_audio_of_another_float_type_gives_float32(model):
    audio = scenes(2, 20_000)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio.double(), model)
    assert embeddings.dtype == timestamps.dtype == torch.float32
    torch.testing.assert_close(embeddings, hear.get_timestamp_embeddings(audio, model)[0])
    assert hear.get_scene_embeddings(audio.double(), model).dtype == torch.float32


@pytest.mark.parametrize(("hop", "most"), [(50.0, 50.0), (200.0, 200.0), (5000.0, 700.0), (39.0625, 39.1)])
def test_the_hop_can_be_chosen(path, hop, most):
    model = hear.load_model(path, hop_ms=hop)
    _, timestamps = hear.get_timestamp_embeddings(scenes(1, 30_000), model)
    assert float(timestamps[0].diff().max()) <= most


def test_environment_variables_name_model_and_hop(path, monkeypatch):
    monkeypatch.setenv("BESTRQ2_HEAR_MODEL", path)
    monkeypatch.setenv("BESTRQ2_HEAR_HOP_MS", "320")
    model = hear.load_model()
    assert model.phases == 2
    monkeypatch.setenv("BESTRQ2_HEAR_HOP_MS", "often")
    with pytest.raises(ConfigError, match="BESTRQ2_HEAR_HOP_MS"):
        hear.load_model()


def test_a_model_of_another_rate_takes_audio_of_a_rate_that_hear_has(tiny_encoder):
    model = hear.HearModel(tiny_encoder(max_seconds=2.5, sampling_rate=24_000))
    assert model.sample_rate == 32_000
    audio = scenes(2, 48_000)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.shape[:2] == timestamps.shape
    assert 1450 < float(timestamps.max()) <= 1500


@pytest.mark.parametrize(
    "audio", [torch.zeros(16_000), torch.zeros(1, 2, 16_000), torch.zeros(2, 0), torch.zeros(2, 9, dtype=torch.int16)]
)
def test_audio_of_another_form_is_refused(model, audio):
    for embed in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
        with pytest.raises(AudioError, match="n_sounds, n_samples"):
            embed(audio, model)


def test_a_broken_sound_is_named(model):
    audio = scenes(2, 20_000)
    audio[1, 10] = float("nan")
    with pytest.raises(AudioError, match=r"audio\[1\]"):
        hear.get_scene_embeddings(audio, model)


def test_a_missing_model_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("BESTRQ2_HEAR_MODEL", raising=False)
    with pytest.raises(ConfigError, match="BESTRQ2_HEAR_MODEL"):
        hear.load_model()
    with pytest.raises(CheckpointError, match="nowhere"):
        hear.load_model("nowhere")


@pytest.mark.parametrize("hop", [0.0, -1.0, 5.0, float("nan"), float("inf")])
def test_a_hop_finer_than_the_spectrogram_is_refused(path, hop):
    with pytest.raises(ConfigError, match="hop_ms must be at least"):
        hear.load_model(path, hop_ms=hop)
