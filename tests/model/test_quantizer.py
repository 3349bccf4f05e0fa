"""The targets: a fixed function of patch and seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestrq2 import BestRQ2Config, BestRQ2ForPreTraining
from bestrq2.model.log_mel import LogMel
from bestrq2.model.patches import patchify
from bestrq2.model.quantizer import RandomProjectionQuantizer, code_usage, count_codes
from example_sounds import scenes


@pytest.fixture(scope="module")
def patches() -> torch.Tensor:
    """Patches of four scenes in dB, [4, 64, 256]."""
    log_mel, _ = LogMel(BestRQ2Config())(scenes(4, 80_000))
    return patchify(log_mel[..., :128], (16, 16))


@pytest.fixture(scope="module")
def quantizer(tiny_config):
    """Makes quantizers of 64 codes; keyword arguments change the configuration."""
    return lambda **changes: RandomProjectionQuantizer(tiny_config(**changes))


def code_by_hand(patch: np.ndarray, projection: np.ndarray, codebook: np.ndarray) -> int:
    """Largest cosine between the projected patch and a code, in float64."""
    projected = [sum(patch[i] * projection[i, j] for i in range(len(patch))) for j in range(projection.shape[1])]
    length = math.sqrt(sum(value**2 for value in projected))
    cosines = [sum(p / length * c for p, c in zip(projected, code, strict=True)) for code in codebook]
    return int(np.argmax(cosines))


def test_codes_have_the_largest_cosine(quantizer, patches):
    module = quantizer(quantizer_normalization="layernorm")
    codes = module(patches)
    assert (codes.shape, codes.dtype) == ((4, 64), torch.int64)
    projection, codebook = module.projection[0].double().numpy(), module.codebook[0].double().numpy()
    for clip, place in ((0, 0), (0, 63), (1, 17), (2, 40), (3, 5), (3, 33)):
        patch = patches[clip, place].double().numpy()
        patch = (patch - patch.mean()) / math.sqrt(patch.var() + 1e-5)
        assert codes[clip, place] == code_by_hand(patch, projection, codebook)
    assert len(codes.unique()) > 20


def test_codes_of_raw_decibels_have_the_largest_cosine(quantizer, patches):
    module = quantizer()
    codes = module(patches)
    projection, codebook = module.projection[0].double().numpy(), module.codebook[0].double().numpy()
    for place in (0, 13, 30, 63):
        assert codes[1, place] == code_by_hand(patches[1, place].double().numpy(), projection, codebook)


def test_projection_is_xavier_uniform_and_codes_have_length_one(quantizer):
    module = quantizer(codebook_size=4096, codebook_dim=16)
    limit = math.sqrt(6 / (256 + 16))
    assert module.projection.abs().max() <= limit
    assert module.projection.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    torch.testing.assert_close(module.codebook.norm(dim=-1), torch.ones(1, 4096))
    assert module.codebook.mean(dim=1).abs().max() < 0.02  # directions point everywhere


def test_scaling_a_patch_does_not_change_its_code(quantizer, patches):
    module = quantizer()
    for factor in (1e-3, 0.5, 40.0):
        assert torch.equal(module(patches * factor), module(patches))


def test_layer_normalized_codes_are_invariant_to_scale_and_offset_in_decibels(quantizer, patches):
    normalised, raw = quantizer(quantizer_normalization="layernorm"), quantizer()
    changed = 1.7 * patches + 12.0
    assert (normalised(changed) == normalised(patches)).float().mean() > 0.995
    assert (raw(changed) == raw(patches)).float().mean() < 0.98
    assert len(normalised(patches).unique()) > 2 * len(raw(patches).unique())


def test_the_seed_determines_projection_and_codebook(quantizer):
    torch.manual_seed(1)
    first = quantizer(quantizer_seed=3).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = quantizer(quantizer_seed=3).state_dict()
    other = quantizer(quantizer_seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # and nobody else's random numbers are used up
    for name in ("projection", "codebook"):
        assert torch.equal(first[name], again[name])
        assert abs(np.corrcoef(first[name].flatten(), other[name].flatten())[0, 1]) < 0.15


def test_autocast_does_not_change_a_code(quantizer, patches):
    module = quantizer(quantizer_normalization="layernorm", codebook_size=4096)  # many codes nearly as close
    expected = module(patches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(patches), expected)


def test_nothing_in_a_quantizer_is_trained(quantizer):
    module = quantizer()
    assert list(module.parameters()) == []
    assert sorted(module.state_dict()) == ["codebook", "projection"]


def test_codebooks_are_independent_quantizers(quantizer, patches):
    module = quantizer(num_codebooks=3, quantizer_normalization="layernorm")
    codes = module(patches)
    assert codes.shape == (4, 64, 3)
    single = quantizer(quantizer_normalization="layernorm")
    for book in range(3):
        single.projection.copy_(module.projection[book : book + 1])
        single.codebook.copy_(module.codebook[book : book + 1])
        assert torch.equal(single(patches), codes[..., book])
    assert (codes[..., 0] == codes[..., 1]).float().mean() < 0.3
    first = quantizer(quantizer_normalization="layernorm")
    assert torch.equal(first.projection[0], module.projection[0])


def test_codebooks_of_two_windows_take_turns(quantizer):
    windows = {"num_mel_bands": 24, "patch_size": [24, 4], "hop_length": 160, "short_win_length": 400}
    module = quantizer(num_codebooks=3, quantizer_normalization="layernorm", short_mel_bands=8, **windows)
    patches = scenes(4, 4800).unflatten(1, (50, 96))
    codes = module(patches)
    changed = patches.clone()
    changed[..., 64:] = patches[..., 64:].flip(-1)  # 16 bands of the long window come first
    assert torch.equal(module(changed)[..., ::2], codes[..., ::2])
    assert (module(changed)[..., 1] != codes[..., 1]).float().mean() > 0.5
    louder = torch.cat([2 * patches[..., :64], 3 + patches[..., 64:]], dim=-1)
    assert (module(louder) == codes).float().mean() > 0.99  # each window is normalized by itself


@pytest.mark.parametrize("used", [1, 2, 7, 64])
def test_perplexity_of_uniform_codes_is_their_number(used):
    targets = torch.arange(used).repeat(5)[None]
    usage = code_usage(count_codes(targets, torch.ones_like(targets, dtype=torch.bool), 64))
    assert usage.perplexity.item() == pytest.approx(used, rel=1e-5)
    assert usage.entropy.item() == pytest.approx(math.log(used), abs=1e-6)
    assert usage.coverage.item() == pytest.approx(used / 64)
    assert usage.top_share.item() == pytest.approx(1 / used)


def test_code_usage_matches_values_computed_by_hand():
    usage = code_usage(torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 4.0, 0.0]]))
    first = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert usage.entropy.item() == pytest.approx(first / 2)
    assert usage.perplexity.item() == pytest.approx((math.exp(first) + 1) / 2)
    assert usage.coverage.item() == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert usage.top_share.item() == pytest.approx((0.5 + 1.0) / 2)


def test_code_usage_of_no_targets_is_zero_and_finite():
    usage = code_usage(torch.zeros(1, 8))
    assert (usage.entropy.item(), usage.coverage.item(), usage.top_share.item()) == (0.0, 0.0, 0.0)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    hidden=st.integers(1, 9),
    books=st.integers(1, 3),
    size=st.integers(2, 9),
    seed=st.integers(0),
)
def test_count_codes_equals_a_plain_count(batch, hidden, books, size, seed):
    rng = np.random.default_rng(seed)
    targets = torch.from_numpy(rng.integers(0, size, size=(batch, hidden, books)))
    weights = torch.from_numpy(rng.random((batch, hidden)) < 0.7)
    found = count_codes(targets if books > 1 else targets[..., 0], weights, size)
    for book in range(books):
        expected = np.bincount(targets[..., book].numpy()[weights.numpy()], minlength=size)
        assert found[book].tolist() == expected.tolist()


def test_codes_do_not_change_in_lower_precision(tiny_config, tmp_path):
    model = BestRQ2ForPreTraining(tiny_config(num_codebooks=2)).eval()
    model.bestrq2.set_statistics(torch.linspace(-61.3, -20.7, model.config.num_mel_bands), torch.tensor(17.77))
    model.save_pretrained(tmp_path)
    patches = 20 * torch.randn(2, 50, model.config.patch_values, generator=torch.Generator().manual_seed(0))
    codes = model.quantizer(patches)
    loaded = BestRQ2ForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for narrow in (loaded, model.to(torch.bfloat16)):
        assert narrow.head.weight.dtype == torch.bfloat16
        assert narrow.quantizer.codebook.dtype == torch.float32
        assert torch.equal(narrow.quantizer(patches), codes)
    assert loaded.bestrq2.statistics.mean.dtype == torch.float32
