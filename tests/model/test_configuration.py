"""The configuration: says what is wrong, in words that name the field, and costs what the paper says."""

from __future__ import annotations

import json
from typing import Literal, get_args, get_origin

import pytest

from bestrq2 import BestRQ2Config
from bestrq2.model.configuration_bestrq2 import field_names
from bestrq2.model.fields import FIELD_TYPES

CHOICES = {name: get_args(hint) for name, hint in FIELD_TYPES.items() if get_origin(hint) is Literal}

REFUSED = [
    ({"hidden_size": 100}, r"hidden_size \(100\) must be a multiple of num_attention_heads \(12\)"),
    ({"hidden_size": 6, "num_attention_heads": 3}, r"hidden_size \(6\) must be a multiple of 4 for sincos"),
    (
        {"hidden_size": 24, "num_attention_heads": 4, "position_embedding": "rope_2d"},
        r"hidden_size / num_attention_heads = 6\) must be a multiple of 4 for rope_2d",
    ),
    (
        {"hidden_size": 60, "num_attention_heads": 12, "position_embedding": "rope_time"},
        r"hidden_size / num_attention_heads = 5\) must be a multiple of 2 for rope_time",
    ),
    (
        {"predictor_hidden_size": 50},
        r"predictor_hidden_size \(50\) must be a multiple of predictor_num_attention_heads",
    ),
    ({"hidden_size": 0}, "hidden_size must be a whole number above 0, got 0"),
    ({"n_fft": 10**9}, "n_fft must be at most 16777216, got 1000000000"),
    ({"sampling_rate": 10**400}, r"sampling_rate must be at most 16777216, got 10+\.\.\.0+"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers must be at most 1000, got 1000000"),
    ({"max_seconds": 1e12}, r"max_seconds must be at most 86400, got 1000000000000\.0"),
    ({"patch_size": [10**9, 16]}, r"patch_size\[0\] must be at most 16777216"),
    ({"n_fft": 2**20, "num_mel_bands": 4096}, "give 2147487744 weights of mel filters; at most 134217728 are allowed"),
    ({"num_labels": 10**9}, "num_labels must be at most 65536, got 1000000000"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a whole number above 0, got 2.0"),
    ({"num_codebooks": True}, "num_codebooks must be a whole number above 0, got True"),
    ({"sampling_rate": 0}, "sampling_rate must be a whole number above 0, got 0"),
    ({"hop_length": -625}, "hop_length must be a whole number above 0"),
    ({"codebook_size": 1}, "codebook_size must be above 1, got 1"),
    ({"codebook_size": 2.5}, "codebook_size must be a whole number above 0, got 2.5"),
    ({"codebook_size": "many"}, "codebook_size must be a whole number above 0, got 'many'"),
    ({"quantizer_seed": -1}, "quantizer_seed must be a whole number of at least 0, got -1"),
    ({"quantizer_seed": 0.5}, "quantizer_seed must be a whole number of at least 0, got 0.5"),
    ({"patch_size": 16}, "patch_size must be a pair of numbers, got 16"),
    ({"patch_size": "16x16"}, "patch_size must be a pair of numbers, got '16x16'"),
    ({"patch_size": [16, 16, 16]}, "patch_size must be a pair"),
    ({"patch_size": [16, "a"]}, r"patch_size\[1\] must be a whole number above 0, got 'a'"),
    ({"patch_size": [48, 16]}, r"num_mel_bands \(128\) must be a multiple of the patch height \(48\)"),
    ({"mask_ratio": [0.0, 0.5]}, "mask_ratio must satisfy 0 < lowest <= highest < 1"),
    ({"mask_ratio": [0.6, 0.4]}, r"mask_ratio must satisfy .* got \[0.6, 0.4\]"),
    ({"mask_ratio": [0.5, 1.0]}, "mask_ratio must satisfy"),
    ({"mask_ratio": 0.5}, "mask_ratio must be a pair of numbers"),
    ({"mask_ratio": ["low", "high"]}, r"mask_ratio\[0\] must be a number, got 'low'"),
    ({"mask_ratio": [0.5, float("nan")]}, r"mask_ratio\[1\] must be a number, got nan"),
    ({"short_win_length": 400}, r"must both be 0 or both be above 0, got 400 and 0"),
    (
        {"short_win_length": 2048, "short_mel_bands": 64},
        r"short_win_length \(2048\) must be from 2 to below win_length",
    ),
    ({"short_win_length": 400, "short_mel_bands": 128}, r"short_mel_bands \(128\) must be fewer than num_mel_bands"),
    ({"short_win_length": 400, "short_mel_bands": 56}, r"the 72 bands of the long window must be a multiple"),
    (
        {"short_win_length": 400, "short_mel_bands": 56, "patch_size": [128, 4]},
        r"num_codebooks \(1\) must be at least 2",
    ),
    ({"win_length": 4096}, r"win_length \(4096\) must not exceed n_fft \(2048\)"),
    ({"n_fft": 2049}, "n_fft must be even, got 2049"),
    ({"mel_max_hz": 9000.0}, r"mel_max_hz \(9000\) must satisfy .* sampling_rate / 2 = 8000"),
    ({"mel_min_hz": 500.0, "mel_max_hz": 400.0}, r"mel_min_hz \(500\) and mel_max_hz \(400\)"),
    ({"mel_max_hz": None}, "mel_max_hz must be a number, got None"),
    ({"max_seconds": 0.3}, r"max_seconds \(0.3\) is shorter than one patch \(0.585938 s\)"),
    ({"max_seconds": 0.7, "patch_size": [128, 16]}, r"max_seconds \(0.7\) has 1 patch; at least 2 are needed"),
    ({"max_seconds": 0}, "max_seconds must be above 0, got 0"),
    ({"max_seconds": "long"}, "max_seconds must be a number, got 'long'"),
    ({"max_seconds": float("inf")}, "max_seconds must be a number, got inf"),
    (
        {"position_embedding": "learned", "max_seconds": 20.0},
        r"max_columns \(16\) must not be below the 32 patch columns of a clip of max_seconds \(20 s\)",
    ),
    ({"norm_eps": 0.0}, "norm_eps must be above 0"),
    ({"initializer_range": -0.02}, "initializer_range must be above 0"),
    ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
    ({"drop_path_rate": "little"}, "drop_path_rate must be a number, got 'little'"),
    ({"use_bias": "no"}, "use_bias must be true or false, got 'no'"),
    ({"qk_norm": 1}, "qk_norm must be true or false, got 1"),
    ({"hiden_size": 64}, "has no field 'hiden_size'; did you mean 'hidden_size'"),
    ({"mask_rate": [0.4, 0.6]}, "has no field 'mask_rate'; did you mean 'mask_ratio'"),
    ({"colour": "red"}, r"has no field 'colour'$"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_invalid_values_are_refused_with_the_name_of_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        BestRQ2Config(**changes)


@pytest.mark.parametrize("field", CHOICES)
def test_unknown_choices_are_refused_with_the_list_of_choices(field):
    with pytest.raises(ValueError, match=f"{field} must be one of {', '.join(CHOICES[field])}, got 'other'"):
        BestRQ2Config(**{field: "other"})


def test_defaults_are_those_of_the_paper():
    config = BestRQ2Config()
    assert (config.patch_rows, config.columns(config.max_samples), config.patch_values) == (8, 16, 256)
    assert config.frame_hop_samples / config.sampling_rate == 0.625
    assert not config.uses_dataset_statistics
    assert BestRQ2Config(quantizer_normalization="dataset").uses_dataset_statistics


@pytest.mark.parametrize(("samples", "columns"), [(1, 1), (9_374, 1), (19_374, 1), (19_375, 2), (160_000, 16)])
def test_columns_are_whole_patches_and_at_least_one(samples, columns):
    assert BestRQ2Config().columns(samples) == columns


def test_one_stage_ignores_predictor_fields():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "predictor_hidden_size": 50}
    assert BestRQ2Config(objective="one_stage", **sizes).predictor_hidden_size == 50
    with pytest.raises(ValueError, match="predictor"):
        BestRQ2Config(objective="two_step", **sizes)


def test_a_stored_conformer_of_an_earlier_version_keeps_its_activation():
    stored = {
        "encoder_type": "conformer", "position_embedding": "relative", "objective": "one_stage", "mask_fill": "noise",
        "num_mel_bands": 80, "patch_size": [80, 4], "n_fft": 400, "win_length": 400, "hop_length": 160,
        "activation": "gelu", "input_normalization": "clip", "quantizer_normalization": "layernorm",
        "mask_shape": "span", "mask_block_size": [1, 4], "mask_span_probability": 0.15, "model_type": "bestrq2",
    }  # fmt: skip
    config = BestRQ2Config.from_dict(stored)
    assert config.conformer_activation == "silu"
    assert not config.to_dict().keys() & {"mask_shape", "mask_block_size", "mask_span_probability"}


def test_a_configuration_round_trips_through_json(tmp_path):
    config = BestRQ2Config(patch_size=(128, 4), mask_ratio=(0.8, 0.8), position_embedding="rope_time", qk_norm=True)
    config.save_pretrained(tmp_path)
    loaded = BestRQ2Config.from_pretrained(tmp_path)
    for field in field_names():
        assert getattr(loaded, field) == getattr(config, field)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bestrq2"
    assert BestRQ2Config.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_stored_configuration_with_an_unknown_key_is_refused(tmp_path):
    BestRQ2Config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "codebok_size": 4}))
    with pytest.raises(ValueError, match="did you mean 'codebook_size'"):
        BestRQ2Config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "foreign", [{"tie_word_embeddings": False}, {"batch_norm_eps": 1.0}, {"top_p": 0.7}, {"is_decoder": False}], ids=str
)
def test_fields_of_other_releases_of_transformers_are_ignored(foreign):
    config = BestRQ2Config.from_dict({**BestRQ2Config(hidden_size=48).to_dict(), **foreign})
    assert [getattr(config, field) for field in field_names()] == [
        getattr(BestRQ2Config(hidden_size=48), field) for field in field_names()
    ]


def test_fields_can_be_changed_while_loading(tmp_path):
    BestRQ2Config().save_pretrained(tmp_path)
    assert BestRQ2Config.from_pretrained(tmp_path, drop_path_rate=0.0).drop_path_rate == 0.0
    with pytest.raises(ValueError, match="drop_path_rate"):
        BestRQ2Config.from_pretrained(tmp_path, drop_path_rate=2.0)
