"""The encoder as XARES-LLM uses it, by a stand-in of its training loop that needs no download."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_language_model import IGNORED, AudioLanguageConfig, AudioLanguageModel
from torch import nn

from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.evaluate.xares_llm.encoder import BestRQ2Encoder, check_contract
from bestrq2.inference.embedder import Embedder
from example_sounds import RATE, bursts, padded_batch, scene, scenes, tones


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_encoder) -> Path:
    path = tmp_path_factory.mktemp("xares_llm") / "encoder"
    # Stochastic depth is on, as in the paper: in training mode features would change from call to call.
    tiny_encoder(max_seconds=2.5, drop_path_rate=0.5).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder) -> BestRQ2Encoder:
    return BestRQ2Encoder(folder=str(folder))


@pytest.mark.parametrize("samples", [500, 12_000, 50_000, 30 * RATE])
def test_features_are_those_of_the_embedder_at_the_true_frame_count(encoder, samples):
    audio = scene(samples)
    features, mask = encoder(torch.from_numpy(audio)[None], None)
    expected = Embedder(encoder.model, "cpu").embed(audio, phases=2).frames
    assert features.shape == expected.shape
    assert mask.shape == features.shape[:2]
    assert bool(mask.all())
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-5)


def test_the_contract_of_the_benchmark_is_kept(encoder):
    check_contract(encoder)
    assert encoder.output_dim == encoder.model.config.hidden_size
    assert len(list(encoder.parameters())) > 0
    features, mask = encoder(scenes(3, 50_000), None)
    assert features.shape[0] == 3
    assert features.shape[2] == encoder.output_dim
    assert features.dtype == torch.float32
    assert not mask.is_floating_point()


def test_padding_changes_no_features_whatever_lies_in_it(encoder):
    lengths = [60_000, 9_000, 33_000]
    silent, mask = padded_batch(lengths)
    loud, _ = padded_batch(lengths, behind=0.9, total=70_000)
    wider = torch.nn.functional.pad(mask, (0, 10_000))
    features, frame_mask = encoder(silent, mask)
    again, frame_mask_again = encoder(loud, wider)
    assert torch.equal(frame_mask, frame_mask_again)
    torch.testing.assert_close(again, features, atol=1e-5, rtol=1e-4)
    for clip, length in enumerate(lengths):
        alone, _ = encoder(silent[clip : clip + 1, :length], None)
        kept = features[clip][frame_mask[clip].bool()]
        torch.testing.assert_close(kept, alone[0], atol=1e-4, rtol=1e-3)
    assert float(features[~frame_mask.bool()].abs().max()) == 0.0


def test_broken_samples_count_as_silence(encoder):
    audio = scenes(2, 20_000)
    broken = audio.clone()
    broken[1, 5_000:6_000] = float("nan")
    broken[1, 7_000] = float("inf")
    silenced = broken.nan_to_num(0.0, 0.0, 0.0)
    torch.testing.assert_close(encoder(broken, None)[0], encoder(silenced, None)[0])


def test_a_clip_that_the_mask_hides_wholly_ends_no_training(encoder):
    features, mask = encoder(scenes(2, 20_000), torch.stack([torch.ones(20_000), torch.zeros(20_000)]))
    assert bool(features.isfinite().all())
    assert mask.sum(dim=1).tolist()[1] == 1


def test_no_gradients_and_no_training_mode(encoder):
    model = nn.Sequential(encoder)
    model.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    audio = scenes(2, 20_000).requires_grad_()
    first, _ = encoder(audio, None)
    second, _ = encoder(audio, None)
    assert not first.requires_grad
    assert torch.equal(first, second)


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tones or bursts of unequal length and the word that names them, behind a prompt of two words."""
    random = np.random.default_rng(step)
    lengths = random.integers(12_000, 40_000, size=4)
    audio, mask = torch.zeros(4, int(lengths.max())), torch.zeros(4, int(lengths.max()), dtype=torch.int32)
    words = []
    for clip, length in enumerate(lengths):
        kind = clip % 2
        sound = (
            bursts(int(length), int(random.integers(1000))) if kind else tones(int(length), random.uniform(200, 300))
        )
        audio[clip, :length] = torch.from_numpy(sound).float()
        mask[clip, :length] = 1
        words.append([1, 2, 10 + kind])
    ids = torch.tensor(words)
    labels = torch.where(torch.tensor([False, False, True]), ids, IGNORED)
    return audio, mask, ids, labels


def _model(folder: Path) -> AudioLanguageModel:
    torch.manual_seed(0)
    return AudioLanguageModel(AudioLanguageConfig(encoder_kwargs={"folder": str(folder), "phases": 2}))


def _train(model: AudioLanguageModel, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(*_batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_projector_and_a_language_model_learn_from_the_features(folder):
    model = _model(folder)
    before = {name: tensor.clone() for name, tensor in model.audio_encoder.state_dict().items()}
    losses = _train(model, 20)
    assert losses[0] > 3.0  # of 40 words, none is known yet
    assert np.mean(losses[-3:]) < 0.35  # without the audio, two equally likely words leave ln 2 = 0.69
    for name, tensor in model.audio_encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.audio_encoder.parameters())


def test_training_works_without_a_mask_and_with_features_of_one_length(folder):
    model = _model(folder)
    ids = torch.tensor([[1, 2, 10], [1, 2, 11]])
    loss = model(scenes(2, 20_000), None, ids, ids)
    loss.backward()
    assert float(model.projector.weight.grad.abs().max()) > 0


def test_the_benchmarks_own_checkpoint_brings_the_encoder_back(folder, tmp_path):
    """The benchmark reloads by from_pretrained, which builds the encoder without values and fills them in."""
    model = _model(folder)
    _train(model, 1)
    with torch.no_grad():  # so that only the checkpoint can be where the values come from
        model.audio_encoder.model.patch_embedding.weight.mul_(1.5)
        model.audio_encoder.model.statistics.mean.sub_(3.0)
    model.save_pretrained(tmp_path / "checkpoint")
    again = AudioLanguageModel.from_pretrained(tmp_path / "checkpoint").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    audio, mask, *_ = _batch(7)
    torch.testing.assert_close(again.audio_encoder(audio, mask)[0], model.audio_encoder(audio, mask)[0])


def test_the_encoder_can_be_built_on_the_meta_device(folder):
    with torch.device("meta"):
        encoder = BestRQ2Encoder(folder=str(folder), phases=2)
    assert {tensor.device.type for tensor in encoder.state_dict().values()} == {"meta"}
    assert encoder.output_dim == encoder.model.config.hidden_size
    filled = BestRQ2Encoder(folder=str(folder), phases=2)
    encoder.load_state_dict(filled.state_dict(), assign=True)
    audio = scenes(1, 20_000)
    assert torch.equal(encoder(audio, None)[0], filled(audio, None)[0])


def test_the_encoder_is_built_from_json(folder):
    kwargs = json.loads(json.dumps({"folder": str(folder), "phases": 3, "layers": 1}))
    coarse, fine = BestRQ2Encoder(str(folder), phases=1), BestRQ2Encoder(**kwargs)
    audio = scenes(1, 50_000)
    assert fine(audio, None)[0].shape[1] in range(3 * coarse(audio, None)[0].shape[1] - 2, 1000)


@pytest.mark.parametrize(
    ("kwargs", "said"), [({"phases": 0}, "phases"), ({"phases": 99}, "phases"), ({"layers": 99}, "layer")]
)
def test_options_out_of_range_are_refused(folder, kwargs, said):
    with pytest.raises(ConfigError, match=said):
        BestRQ2Encoder(str(folder), **kwargs)


def test_a_folder_without_an_encoder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}: holds no encoder"):
        BestRQ2Encoder(str(tmp_path))


def test_features_that_padding_changes_break_the_contract(folder):
    class Changed(BestRQ2Encoder):
        def forward(self, audio, mask=None):
            features, frame_mask = super().forward(audio, mask)
            return features + audio.shape[1], frame_mask

    with pytest.raises(ConfigError, match="padding changes the features"):
        check_contract(Changed(str(folder)))
