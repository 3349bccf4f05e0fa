"""Our models under the reference's names and shapes, written down apart from the converter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bestrq2 import BestRQ2ForPreTraining
from bestrq2.model.log_mel import mel_filters
from bestrq2.model.patches import sine_cosine_positions

CPU = torch.device("cpu")


def reference_state(model: BestRQ2ForPreTraining) -> dict[str, Tensor]:
    """The state dict that the reference module with the same weights would have."""
    config = model.config
    height, width = config.patch_size
    two_step = config.objective == "two_step"
    parts = {"encoder": model.bestrq2.encoder} | ({"predictor": model.predictor} if two_step else {})
    state = {
        "spectrogram.mel_spec.spectrogram.window": torch.hann_window(config.win_length),
        "spectrogram.mel_spec.mel_scale.fb": mel_filters(
            config.n_fft, config.num_mel_bands, config.mel_min_hz, config.mel_max_hz, config.sampling_rate, CPU
        ),
        "patch_embed.patch_embed.proj.weight": model.bestrq2.patch_embedding.weight.view(-1, 1, height, width),
        "patch_embed.patch_embed.proj.bias": model.bestrq2.patch_embedding.bias,
        "mask_token": model.mask_token,
        "quantizer.P": model.quantizer.projection[0],
        "quantizer.CB": model.quantizer.codebook[0],
    }
    for part, transformer in parts.items():
        state |= {f"{part}.{name}": value for name, value in transformer.state_dict().items()}
        shape = transformer.shape
        if config.position_embedding == "sincos":
            columns = config.columns(config.max_samples)
            state[f"{part}.pos_embed"] = sine_cosine_positions(config.patch_rows, columns, shape.width, CPU)[None]
        else:
            half = shape.width // shape.heads // 2
            frequencies = 1.0 / 10_000 ** (torch.arange(0, half, 2).float() / half)
            places = [f"{part}.rope", *(f"{part}.blocks.{i}.attn.rope" for i in range(shape.layers))]
            state |= {f"{place}.inv_freq_{axis}": frequencies for place in places for axis in "hw"}
    if two_step:
        state |= {f"predictor_input_proj.{name}": value for name, value in model.predictor_input.state_dict().items()}
    head = "rq_proj" if two_step else "output_proj"
    state |= {f"{head}.{name}": value for name, value in model.head.state_dict().items()}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def reference_config(model: BestRQ2ForPreTraining) -> dict[str, Any]:
    """The configuration of that module in the reference's words."""
    config = model.config
    milliseconds = 1000 / config.sampling_rate
    columns = config.columns(config.max_samples)
    size = [config.num_mel_bands, columns * config.patch_size[1]]
    positions = {"pos_embed_type": "sincos"} if config.position_embedding == "sincos" else {}

    def transformer(width: int, depth: int, heads: int, intermediate: int, drop: float) -> dict[str, Any]:
        ratio = intermediate / width
        return {
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": ratio,
            "drop_path_rate": drop,
            **positions,
        }

    return {
        "vocab_size": config.codebook_size,
        "codebook_dim": config.codebook_dim,
        "net": {
            "spectrogram": {
                "sample_rate": config.sampling_rate,
                "n_fft": config.n_fft,
                "win_length_ms": config.win_length * milliseconds,
                "hop_length_ms": config.hop_length * milliseconds,
                "n_mels": config.num_mel_bands,
                "f_min": config.mel_min_hz,
                "f_max": config.mel_max_hz,
                "power": 2.0,
            },
            "patch_embed": {"img_size": size, "patch_size": config.patch_size, "embed_dim": config.hidden_size},
            "masking": {"mask_ratio": config.mask_ratio},
            "encoder": transformer(
                config.hidden_size,
                config.num_hidden_layers,
                config.num_attention_heads,
                config.intermediate_size,
                config.drop_path_rate,
            ),
            "predictor": transformer(
                config.predictor_hidden_size,
                config.predictor_num_layers,
                config.predictor_num_attention_heads,
                config.predictor_intermediate_size,
                0.0,
            ),
        },
    }
