"""The encoder that the harness of X-ARES is given."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

import bestrq2
from bestrq2 import BestRQ2Config, BestRQ2Model, Embedder
from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.evaluate.provenance import digest
from bestrq2.evaluate.xares.encoder import (
    Extraction,
    XaresEncoder,
    encoder_class,
    model_identity,
    without_padding,
)

RATE = 16_000


@pytest.fixture(scope="module")
def embedder(tiny_encoder) -> Embedder:
    return Embedder(tiny_encoder(), "cpu")


def sounds(*seconds: float, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    tones = [np.sin(np.arange(round(length * RATE)) * rng.uniform(0.05, 0.5)) for length in seconds]
    return [(0.3 * tone + 0.05 * rng.normal(size=len(tone)) + 1e-6).astype(np.float32) for tone in tones]


def padded(clips: list[np.ndarray]) -> torch.Tensor:
    """A batch as the harness makes it."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)


@pytest.mark.parametrize("phases", [1, 4])
@pytest.mark.parametrize("frame_level", [False, True])
def test_it_keeps_the_harness_contract(embedder, phases, frame_level):
    encoder = encoder_class("0123abcd")(embedder.model, phases, frame_level)
    assert type(encoder).__name__ == "BestRQ2_0123abcd_Encoder"
    assert isinstance(encoder, torch.nn.Module)
    frames = encoder(torch.randn(2, 50_000))
    assert frames.dtype == torch.float32
    assert frames.ndim == 3
    assert (frames.shape[0], frames.shape[2]) == (2, encoder.output_dim)
    assert encoder.sampling_rate == RATE
    assert encoder.hop_size_in_ms == pytest.approx(625 / phases)


@pytest.mark.parametrize("phases", [1, 2, 3])
def test_frames_of_a_clip_are_those_of_the_embedder(embedder, phases):
    (clip,) = sounds(7.3)
    expected = embedder.embed(clip, phases=phases).frames[0]
    frames = XaresEncoder(embedder.model, phases)(torch.from_numpy(clip)[None])[0].numpy()
    np.testing.assert_allclose(frames, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("phases", [1, 3])
def test_padding_does_not_change_the_mean_of_the_frames(embedder, phases):
    clips = sounds(1.9, 4.4, 12.0)
    means = XaresEncoder(embedder.model, phases)(padded(clips)).mean(dim=1).numpy()
    np.testing.assert_allclose(means, embedder.embed(clips, phases=phases).clip, rtol=0, atol=1e-5)


def test_another_readout_reaches_the_harness(tiny_encoder):
    model = tiny_encoder()
    model.set_readout(layers="1+2", frequency="concat", pooling="mean+std")
    clips, embedder = sounds(1.9, 7.3), Embedder(model, "cpu")
    encoder = XaresEncoder(model)
    frames = encoder(padded(clips))
    assert frames.shape == (2, 1, encoder.output_dim)
    np.testing.assert_allclose(frames.mean(dim=1), embedder.embed(clips).clip, rtol=0, atol=1e-5)
    on_time = XaresEncoder(model, frame_level=True)
    frames = on_time(torch.from_numpy(clips[1])[None])
    assert frames.shape[2] == on_time.output_dim == 2 * 8 * 32
    with pytest.raises(ConfigError, match="pooling must be mean in chunks"):
        Extraction(phases=1, chunks=True).check(model.config)


def test_a_silent_clip_is_embedded_whole_and_a_click_as_one_patch():
    silent, click = torch.zeros(100), torch.zeros(100)
    click[3] = 1.0
    assert len(without_padding(silent, 10)) == 100
    assert len(without_padding(click, 10)) == 10
    assert len(without_padding(click, 2)) == 4
    assert len(without_padding(click[:6], 10)) == 6


@pytest.mark.parametrize("phases", [1, 3, 5])
def test_frame_i_lies_between_i_and_i_plus_1_hops(embedder, phases):
    (clip,) = sounds(5.0)
    found = embedder.embed(clip, phases=phases)
    encoder = XaresEncoder(embedder.model, phases, frame_level=True)
    frames = encoder(torch.from_numpy(clip)[None])[0].numpy()
    hop = encoder.hop_size_in_ms / 1000
    assert len(frames) == round(5.0 / hop)
    for moment, expected in zip(found.timestamps[0], found.frames[0], strict=True):
        place = int(moment / hop)
        assert moment == pytest.approx((place + 0.5) * hop, abs=1e-3)
        np.testing.assert_allclose(frames[place], expected, rtol=0, atol=1e-5)


def test_frame_level_tasks_keep_the_silence_at_the_end_of_a_clip(embedder):
    (clip,) = sounds(2.5)
    clip = np.concatenate([clip, np.zeros(round(2.5 * RATE), np.float32)])
    assert XaresEncoder(embedder.model, frame_level=True)(torch.from_numpy(clip)[None]).shape[1] == 8
    assert XaresEncoder(embedder.model)(torch.from_numpy(clip)[None]).shape[1] == 4


def test_ten_minutes_pass_in_bounded_memory(embedder):
    encoder = XaresEncoder(embedder.model)
    audio = torch.from_numpy(sounds(600.0)[0])[None]
    tracemalloc.start()
    try:
        frames = encoder(audio)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert frames.shape[1] == 960
    assert bool(frames.isfinite().all())
    # the clip as windows that overlap by half, and their frames
    assert peak < 4 * audio.nbytes


# Chunks are tested against src/xares/encoders/best_rq.py of github.com/LudovicTuncay/xares (f56cf78).


def test_chunks_are_embedded_as_by_the_reference(reference_fixture):
    model = bestrq2.load_reference(
        reference_fixture.with_suffix(".safetensors"), reference_fixture.with_suffix(".json")
    )
    outputs = np.load(reference_fixture.with_suffix(".npz"))
    waves = torch.from_numpy(outputs["waveform"][:, 0] / np.float32(32768))
    encoder = XaresEncoder(model.base_model, chunks=True)
    np.testing.assert_allclose(encoder(waves), outputs["frame_embeddings"], rtol=0, atol=1e-4)
    joined = outputs["frame_embeddings"].reshape(1, 32, -1)
    np.testing.assert_allclose(encoder(waves.reshape(1, -1)), joined, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_padding_counts_in_chunks_and_a_short_last_one_keeps_its_share_of_a_second():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BestRQ2Model(BestRQ2Config(patch_size=[128, 4], **sizes)).eval()
    encoder = XaresEncoder(model, chunks=True)
    short = padded(sounds(9.1, 0.7))
    np.testing.assert_allclose(encoder(short), model(short).last_hidden_state, rtol=0, atol=1e-5)
    long = padded(sounds(10.5, 4.0))
    second = torch.nn.functional.pad(long[:, 10 * RATE :], (0, RATE // 2))
    parts = [model(long[:, : 10 * RATE]).last_hidden_state, model(second).last_hidden_state]
    assert [part.shape[1] for part in parts] == [64, 6]
    np.testing.assert_allclose(encoder(long), torch.cat([parts[0], parts[1][:, :3]], dim=1), rtol=0, atol=1e-5)


def test_nan_from_the_encoder_is_refused_with_its_count(tiny_encoder):
    model = tiny_encoder()
    model.patch_embedding.weight.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN or infinite values for 2 of 2 clips"):
        XaresEncoder(model)(torch.randn(2, 20_000))


def test_it_counts_the_clips_it_has_encoded(embedder):
    counts: list[int] = []
    encoder = XaresEncoder(embedder.model, on_batch=counts.append)
    encoder(torch.randn(3, 20_000))
    encoder(torch.randn(1, 20_000))
    assert counts == [3, 1]


def test_weights_architecture_and_options_make_the_identity(embedder, tiny_encoder, tiny_config, monkeypatch):
    from bestrq2.evaluate.xares import encoder as module

    monkeypatch.setattr(module, "harness_version", lambda: "0.1.3")
    base = model_identity(embedder, Extraction())
    assert digest(base) == digest(model_identity(Embedder(tiny_encoder(), "cpu"), Extraction()))
    other = tiny_encoder()
    other.patch_embedding.bias.data[0] += 1e-6
    shorter = tiny_encoder(max_seconds=2.5)
    shorter.load_state_dict(embedder.model.state_dict())
    deeper = tiny_encoder()
    deeper.set_readout(layers=1)
    others = [
        model_identity(Embedder(other, "cpu"), Extraction()),
        model_identity(Embedder(shorter, "cpu"), Extraction()),
        model_identity(embedder, Extraction(phases=4)),
        model_identity(embedder, Extraction(clip_phases=2)),
        model_identity(Embedder(deeper, "cpu"), Extraction()),
        model_identity(embedder, Extraction(chunks=True)),
    ]
    assert len({digest(one) for one in [base, *others]}) == 7


@pytest.mark.parametrize(
    ("extraction", "sentence"),
    [
        (Extraction(phases=17), "phases must be a whole number from 1 to 16, got 17"),
        (Extraction(clip_phases=0), "clip_phases must be a whole number from 1 to 16, got 0"),
        (Extraction(phases=1, clip_phases=2, chunks=True), "clip_phases is 2, but chunks have one phase"),
    ],
)
def test_impossible_extractions_are_refused(embedder, extraction, sentence):
    with pytest.raises(ConfigError, match=sentence):
        extraction.check(embedder.config)
