"""Conformer encoder of the original BEST-RQ (arXiv 2202.01855): strided convolutions, then Conformer blocks.

Blocks follow arXiv 2005.08100 with the relative positions of Transformer-XL (arXiv 1901.02860). Batch norm is replaced
by a norm per token, so that no clip depends on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Record, attend, make_attention_mask, run_blocks
from .configuration_bestrq2 import BestRQ2Config
from .kernels import cached
from .patches import unpatchify

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class XavierLinear(nn.Linear):
    """Linear layer with Xavier normal weights, as all matrices of SpeechBrain's Conformer."""

    def reset_parameters(self) -> None:
        """Draw weights and bias."""
        super().reset_parameters()
        nn.init.xavier_normal_(self.weight)


class XavierConv1d(nn.Conv1d):
    """Convolution with Xavier normal weights."""

    def reset_parameters(self) -> None:
        """Draw weights and bias."""
        super().reset_parameters()
        nn.init.xavier_normal_(self.weight)


class StridedConvolution(nn.Module):
    """Convolution that halves time and frequency, followed by LayerNorm per time step, LeakyReLU and dropout."""

    def __init__(self, config: BestRQ2Config, inputs: int, channels: int, bands: int) -> None:
        super().__init__()
        self.bands = (bands + 1) // 2
        self.conv = nn.Conv2d(inputs, channels, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(channels * self.bands, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.conformer_dropout)

    def forward(self, image: Tensor) -> Tensor:
        """Map [B, inputs, T, bands] to [B, channels, ceil(T / 2), ceil(bands / 2)].

        Channels-last memory makes the convolution faster and a time step contiguous.
        """
        steps = self.conv(image.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1).flatten(2)
        steps = self.dropout(F.leaky_relu(self.norm(steps)))
        return steps.unflatten(2, (self.bands, -1)).permute(0, 3, 1, 2)


class ConvolutionalEmbedding(nn.Module):
    """Token embedding by two strided convolutions over the spectrogram, one token per strip of four frames.

    Token i reads frames 4i - 3 to 4i + 3 and none after its own strip, so padding after the end of a clip never reaches
    a valid token.
    """

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        self.patch_size = (config.patch_size[0], config.patch_size[1])
        outer, inner = config.conformer_channels
        first = StridedConvolution(config, 1, outer, config.num_mel_bands)
        second = StridedConvolution(config, outer, inner, first.bands)
        self.convolutions = nn.Sequential(first, second)
        self.proj = XavierLinear(inner * second.bands, config.hidden_size)
        self.dropout = nn.Dropout(config.conformer_dropout)

    def forward(self, patches: Tensor) -> Tensor:
        """Map the strips of whole clips in order, [B, N, bands * 4], to tokens [B, N, D]."""
        image = unpatchify(patches, self.patch_size, rows=1).transpose(1, 2)[:, None]
        return self.dropout(self.proj(self.convolutions(image).permute(0, 2, 3, 1).flatten(2)))


@cached
def relative_positions(count: int, width: int, device: torch.device) -> Tensor:
    """Sine-cosine embeddings of the offsets count - 1 down to -(count - 1), float32 [2 * count - 1, width].

    An offset is the query's place minus the key's place. Sines (even) and cosines (odd) alternate, with
    temperature 10000.
    """
    offsets = torch.arange(count - 1, -count, -1, dtype=torch.float64, device="cpu")
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    angles = offsets[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(device=device, dtype=torch.float32)


def relative_shift(scores: Tensor) -> Tensor:
    """Turn scores by offset [..., N, 2N - 1], ordered as `relative_positions`, into scores by key [..., N, N].

    Query i finds key j in column N - 1 - i + j: each row starts one column before the row above it, so in the
    flattened scores the wanted rows start 2N - 2 values apart.
    """
    count = scores.shape[-2]
    if count == 1:
        return scores
    return scores.flatten(-2)[..., count - 1 : -1].unflatten(-1, (count, 2 * count - 2))[..., :count]


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions (Transformer-XL), a bias of the scores."""

    is_causal = False  # read by the kernels of transformers

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        width = config.hidden_size
        self.qkv = XavierLinear(width, 3 * width)
        self.position = XavierLinear(width, width, bias=False)
        # u and v of the paper: biases of the queries against keys and against positions.
        self.content_bias = nn.Parameter(torch.empty(self.heads, width // self.heads))
        self.position_bias = nn.Parameter(torch.empty(self.heads, width // self.heads))
        self.proj = XavierLinear(width, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both biases."""
        nn.init.xavier_normal_(self.content_bias)
        nn.init.xavier_normal_(self.position_bias)

    def forward(self, tokens: Tensor, positions: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend: [B, N, D] to [B, N, D] and the weights of `attend`.

        `positions` [2N - 1, D] are those of `relative_positions`, the mask is that of `make_attention_mask`.
        """
        queries, keys, values = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        offsets = self.position(positions.to(tokens.dtype)).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)
        to_keys = queries + self.content_bias[:, None].to(queries.dtype)
        to_offsets = queries + self.position_bias[:, None].to(queries.dtype)
        bias = relative_shift(to_offsets @ offsets) * queries.shape[-1] ** -0.5
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask, float("-inf"))
        mixed, weights = attend(self, to_keys, keys, values, bias, self.config.conformer_dropout)
        return self.proj(mixed), weights


class HalfFeedForward(nn.Module):
    """Feed-forward branch, scaled by one half; a block has one at either end."""

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.fc1 = XavierLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = XavierLinear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.conformer_dropout)
        self.activation = ACTIVATIONS[config.conformer_activation]

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        inner = self.dropout(self.activation(self.fc1(self.norm(tokens))))
        return 0.5 * self.dropout(self.fc2(inner))


class ConvolutionModule(nn.Module):
    """Convolution branch: gated pointwise layer, depthwise convolution over time, pointwise layer."""

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.conformer_kernel_size
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pointwise1 = XavierLinear(width, 2 * width)
        self.depthwise = XavierConv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.depthwise_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pointwise2 = XavierLinear(width, width)
        self.dropout = nn.Dropout(config.conformer_dropout)
        self.activation = ACTIVATIONS[config.conformer_activation]

    def forward(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """Map [B, N, D] to [B, N, D]; tokens outside `valid`, bool [B, N], are zeroed before the convolution."""
        gated = F.glu(self.pointwise1(self.norm(tokens)), dim=-1)
        if valid is not None:
            gated = gated.masked_fill(~valid[..., None], 0.0)
        mixed = self.depthwise(gated.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.pointwise2(self.activation(self.depthwise_norm(mixed))))


class ConformerBlock(GradientCheckpointingLayer):
    """Conformer block: attention and convolution between two half feed-forward branches, and a final norm."""

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        self.mlp1 = HalfFeedForward(config)
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = RelativeAttention(config)
        self.conv = ConvolutionModule(config)
        self.mlp2 = HalfFeedForward(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self, tokens: Tensor, positions: Tensor, valid: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Map [B, N, D] to [B, N, D] and the attention weights, if the implementation gives them.

        `positions` [2N - 1, D] are those of `relative_positions`, `valid` is bool [B, N], and the mask is made of it.
        """
        tokens = tokens + self.mlp1(tokens)
        branch, weights = self.attn(self.attn_norm(tokens), positions, attention_mask)
        tokens = tokens + branch
        tokens = tokens + self.conv(tokens, valid)
        tokens = tokens + self.mlp2(tokens)
        return self.norm(tokens), weights


class Conformer(nn.Module):
    """Stack of Conformer blocks with the interface of `Transformer`, for tokens of the whole grid in order."""

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_hidden_layers))

    def added_positions(self, columns: int, device: torch.device) -> None:
        """Return None: attention uses relative positions, none are added to the tokens."""
        return None

    def forward(
        self,
        tokens: Tensor,
        columns: int,
        places: Tensor | None,
        valid: Tensor | None,
        record: Record | None = None,
    ) -> Tensor:
        """Run the blocks.

        Args:
            tokens: [B, N, D].
            columns: number of columns of the grid, N.
            places: ignored; the convolutions need every token next to its neighbours, so tokens are the whole grid.
            valid: bool [B, N], True for tokens inside their clip; None for all.
            record: where the outputs of the blocks are kept; None to keep none.

        Returns:
            [B, N, D]. Values at invalid tokens are undefined.
        """
        positions = relative_positions(tokens.shape[1], tokens.shape[2], tokens.device)
        attention_mask = make_attention_mask(self.config, tokens, valid)
        return run_blocks(self.blocks, record, tokens, positions, valid, attention_mask)
