"""Models on disk: what comes back is what was saved, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bestrq2 import BestRQ2FeatureExtractor, BestRQ2ForPreTraining, BestRQ2Model
from example_sounds import scene, scenes

VARIANTS = [
    {"quantizer_seed": 7},
    {"objective": "one_stage", "position_embedding": "learned", "num_codebooks": 2},
    {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "use_bias": False, "position_embedding": "rope_2d"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_pretraining_model_round_trips_exactly(tiny_pretraining, tmp_path, changes):
    model = tiny_pretraining(**changes)
    model.bestrq2.set_statistics(torch.linspace(-30, -60, 128), torch.linspace(8, 20, 128))
    model.quantizer.codebook[0, 3] *= -1  # what is stored counts, not what the seed would give
    model.save_pretrained(tmp_path)
    loaded, report = BestRQ2ForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert {"quantizer.projection", "quantizer.codebook", "bestrq2.statistics.mean"} < before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
        assert after[name].dtype == value.dtype
    hidden = torch.arange(64) % 2 == 0
    clips = scenes(2, 80_000)
    assert torch.equal(loaded(clips, hidden_mask=hidden).logits, model(clips, hidden_mask=hidden).logits)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_encoder_loads_from_a_pretraining_model(tiny_pretraining, tmp_path, changes):
    model = tiny_pretraining(**changes)
    model.bestrq2.set_statistics(torch.linspace(-30, -60, 128), torch.linspace(8, 20, 128))
    model.save_pretrained(tmp_path)
    encoder, report = BestRQ2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name, value in model.base_model.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value), name
    assert not any(name.startswith(("quantizer", "head", "predictor")) for name in encoder.state_dict())


def test_an_encoder_round_trips_exactly(tiny_encoder, tmp_path):
    model = tiny_encoder()
    model.save_pretrained(tmp_path)
    loaded = BestRQ2Model.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_pretraining_can_start_from_a_stored_encoder(tiny_encoder, tmp_path):
    encoder = tiny_encoder()
    encoder.save_pretrained(tmp_path)
    model, report = BestRQ2ForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {
        "predictor",
        "predictor_input",
        "mask_token",
        "head",
        "quantizer",
    }
    assert torch.equal(model.base_model.patch_embedding.weight, encoder.patch_embedding.weight)
    fresh = BestRQ2ForPreTraining(model.config)
    assert torch.equal(model.quantizer.codebook, fresh.quantizer.codebook)
    assert model.mask_token.std() > 0.005


def test_the_base_model_of_pretraining_is_the_encoder(tiny_pretraining):
    model = tiny_pretraining()
    assert isinstance(model.base_model, BestRQ2Model)
    assert model.base_model is model.bestrq2


@torch.no_grad()
def test_the_feature_extractor_pads_and_the_model_ignores_the_padding(tiny_encoder, tmp_path):
    BestRQ2FeatureExtractor().save_pretrained(tmp_path)
    extractor = BestRQ2FeatureExtractor.from_pretrained(tmp_path)
    clips = [scene(30_000, 1), scene(50_000, 2)]
    batch = extractor(clips, sampling_rate=16_000, return_tensors="pt")
    assert batch["input_values"].shape == batch["attention_mask"].shape == (2, 50_000)
    assert batch["input_values"].dtype == torch.float32
    assert batch["attention_mask"].sum(dim=1).tolist() == [30_000, 50_000]
    model = tiny_encoder()
    together = model(**batch).pooler_output
    for index, clip in enumerate(clips):
        alone = model(torch.from_numpy(clip)[None]).pooler_output[0]
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=0)


def test_the_feature_extractor_accepts_one_clip_as_list_or_array():
    extractor = BestRQ2FeatureExtractor()
    clip = scene(1000)
    from_array, from_list = (extractor(one, return_tensors="np")["input_values"] for one in (clip, clip.tolist()))
    assert from_array.shape == (1, 1000)
    assert np.array_equal(from_array, from_list)
    cut = extractor([clip, clip[:300]], padding="max_length", max_length=500, truncation=True, return_tensors="np")
    assert cut["input_values"].shape == (2, 500)
    assert cut["attention_mask"].sum(axis=1).tolist() == [500, 300]


CLIP = np.round(scene(1_000) * 100) / 128


@pytest.mark.parametrize(
    "samples",
    [
        (CLIP * 2**15).astype(np.int16),
        (CLIP * 2**15).astype(">i2"),
        (CLIP * 2**31).astype(np.int32),
        (CLIP * 128).astype(np.int8)[::-1][::-1],
        (CLIP * 128 + 128).astype(np.uint8),
        list((CLIP * 2**15).astype(np.int16)),
        memoryview((CLIP * 2**15).astype(np.int16)),
        CLIP.astype(np.float64),
        torch.from_numpy(CLIP).bfloat16().requires_grad_(),
        torch.from_numpy(CLIP).half(),
        (torch.from_numpy(CLIP) * 2**15).short(),
    ],
    ids=lambda samples: f"{type(samples).__name__} {getattr(samples, 'dtype', '')}",
)
def test_the_feature_extractor_scales_samples_as_the_embedder_does(samples):
    extractor = BestRQ2FeatureExtractor()
    for several in (samples, [samples, samples]):
        found = extractor(several, return_attention_mask=False, return_tensors="pt")
        assert list(found) == ["input_values"]
        assert found["input_values"].dtype == torch.float32
        np.testing.assert_allclose(found["input_values"][-1], CLIP, atol=1e-7)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (
            [scene(1_000).reshape(2, 500)],
            r"raw_speech\[0\]: every clip must be mono.*got shape \(2, 500\)",
        ),
        (scene(1_000).reshape(500, 2), r"shape \(500, 2\) has more clips than samples"),
        ([scene(100), scene(0)], r"raw_speech\[1\]: holds no samples"),
        ([], "the list is empty"),
        (np.array([0.1, np.nan]), "holds NaN or infinite samples"),
        (torch.tensor([0.1, torch.inf]), "holds NaN or infinite samples"),
        (100 * scene(1_000), r"holds samples of \d+.*, far outside \[-1, 1\]; divide them by"),
        ([0, 120, -7], "int64 have no defined full scale"),
        ({"array": scene(100), "sampling_rate": 16_000}, "a dict is not audio"),
        ("clip.wav", "a str is not audio"),
        (scene(100) > 0, "values of type bool"),
    ],
)
def test_the_feature_extractor_refuses_what_is_no_clip(audio, message):
    with pytest.raises(ValueError, match=message):
        BestRQ2FeatureExtractor()(audio)


def test_the_feature_extractor_refuses_other_rates():
    with pytest.raises(ValueError, match=r"expects 16000 Hz, got 44100 Hz: resample.*bestrq2\.load"):
        BestRQ2FeatureExtractor()(scene(1000), sampling_rate=44_100)
