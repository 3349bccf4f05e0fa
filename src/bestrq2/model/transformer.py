"""Pre-norm transformer of the encoder and the predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Record, attend, make_attention_mask, run_blocks
from .configuration_bestrq2 import BestRQ2Config
from .kernels import RMSNormalization, SwiGLU, cached, traced
from .patches import rotary_tables, rotate, sine_cosine_positions


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of one stack of blocks: encoder or predictor."""

    width: int
    layers: int
    heads: int
    intermediate: int
    drop_path_rate: float

    @classmethod
    def of_encoder(cls, config: BestRQ2Config) -> TransformerShape:
        """Return the sizes of the encoder."""
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
            config.drop_path_rate,
        )

    @classmethod
    def of_predictor(cls, config: BestRQ2Config) -> TransformerShape:
        """Return the sizes of the predictor, which has no stochastic depth (paper section 3)."""
        return cls(
            config.predictor_hidden_size,
            config.predictor_num_layers,
            config.predictor_num_attention_heads,
            config.predictor_intermediate_size,
            0.0,
        )


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its weight.

    PyTorch's fused kernel needs inputs of the weight's dtype, which queries and keys inside autocast are not.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., D] over the last dimension, in the dtype of the weight."""
        # Other devices have a fused kernel in PyTorch; squares in 16 bits need its wider accumulation.
        wide = self.weight.dtype in (torch.float32, torch.float64)
        if wide and x.device.type == "cpu" and not traced():
            return RMSNormalization.apply(x, self.weight, self.eps)
        return super().forward(x.to(self.weight.dtype))


def make_norm(config: BestRQ2Config, width: int) -> nn.Module:
    """Build the configured norm; a LayerNorm has a bias only if linear layers do."""
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.use_bias)


@cached
def _kept_shares(rates: tuple[float, ...], device: torch.device) -> Tensor:
    """Return 1 - rate of every block, float32 [blocks, 1, 1, 1, 1]."""
    return (1.0 - torch.tensor(rates, device="cpu")).view(-1, 1, 1, 1, 1).to(device)


def branch_scales(rates: tuple[float, ...], clips: int, device: torch.device) -> Tensor:
    """Draw the stochastic depth of a whole stack: the scale of every branch for every clip.

    Args:
        rates: drop probability of a branch, for every block.
        clips: batch size B.
        device: device of the random numbers.

    Returns:
        float32 [blocks, 2, B, 1, 1]: 0 for dropped branches, 1 / (1 - rate) for the others.
    """
    kept = _kept_shares(rates, device)
    return (torch.rand(len(rates), 2, clips, 1, 1, device=device) < kept) / kept


class BlockLinear(nn.Linear):
    """Linear layer of a block, which the models initialize unlike those outside."""


class Attention(nn.Module):
    """Multi-head self-attention by the configured implementation."""

    is_causal = False  # read by the kernels of transformers

    def __init__(self, config: BestRQ2Config, shape: TransformerShape) -> None:
        super().__init__()
        self.config = config
        self.heads = shape.heads
        self.rotary_parts = 2 if config.position_embedding == "rope_2d" else 1
        self.qkv = BlockLinear(shape.width, 3 * shape.width, bias=config.use_bias)
        self.proj = BlockLinear(shape.width, shape.width, bias=config.use_bias)
        head_width = shape.width // shape.heads
        self.q_norm = make_norm(config, head_width) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, head_width) if config.qk_norm else nn.Identity()

    def forward(
        self, tokens: Tensor, rotary: tuple[Tensor, Tensor] | None, attention_mask: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: [B, N, D] to [B, N, D] and the weights of `attend`; the mask is that of `make_attention_mask`."""
        # Split along the width: the backward pass then concatenates the three gradients in a single copy.
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1)
        )
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        if rotary is not None:
            queries = rotate(queries, rotary, self.rotary_parts)
            keys = rotate(keys, rotary, self.rotary_parts)
        mixed, weights = attend(self, queries, keys, values, attention_mask)
        return self.proj(mixed), weights


class FeedForward(nn.Module):
    """Feed-forward layers with GELU, or SwiGLU with the gate in the first half of `fc1`."""

    def __init__(self, config: BestRQ2Config, shape: TransformerShape) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        inner = shape.intermediate * (2 if self.gated else 1)
        self.fc1 = BlockLinear(shape.width, inner, bias=config.use_bias)
        self.fc2 = BlockLinear(shape.intermediate, shape.width, bias=config.use_bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        inner = self.fc1(tokens)
        if self.gated and not traced():
            return self.fc2(SwiGLU.apply(inner))
        if self.gated:
            gate, values = inner.chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * values)
        return self.fc2(F.gelu(inner))


class Block(GradientCheckpointingLayer):
    """Pre-norm block: attention and feed-forward, each a residual branch with stochastic depth."""

    def __init__(self, config: BestRQ2Config, shape: TransformerShape) -> None:
        super().__init__()
        self.norm1 = make_norm(config, shape.width)
        self.attn = Attention(config, shape)
        self.norm2 = make_norm(config, shape.width)
        self.mlp = FeedForward(config, shape)

    def forward(
        self,
        tokens: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attention_mask: Any,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [B, N, D] to [B, N, D] and the attention weights, if the implementation gives them.

        `scales` [2, B, 1, 1] of the branches are those of `branch_scales`, None for ones.
        """
        branch, weights = self.attn(self.norm1(tokens), rotary, attention_mask)
        tokens = tokens + branch if scales is None else torch.addcmul(tokens, branch, scales[0])
        branch = self.mlp(self.norm2(tokens))
        return tokens + branch if scales is None else torch.addcmul(tokens, branch, scales[1]), weights


class Transformer(nn.Module):
    """Stack of blocks with a final norm, and its position embeddings.

    Positions follow the place of a token in the grid of patches, not in the sequence, so any subset of the patches can
    be passed, in any order.
    """

    def __init__(self, config: BestRQ2Config, shape: TransformerShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        last = max(1, shape.layers - 1)
        self.drop_path_rates = tuple(shape.drop_path_rate * index / last for index in range(shape.layers))
        self.blocks = nn.ModuleList(Block(config, shape) for _ in range(shape.layers))
        self.norm = make_norm(config, shape.width)
        if config.position_embedding == "learned":
            self.positions = nn.Parameter(torch.zeros(config.patch_rows, config.max_columns, shape.width))

    def added_positions(self, columns: int, device: torch.device) -> Tensor | None:
        """Return the added position embeddings of a grid, float32 [rows * columns, D]; None for rotary ones.

        Raises:
            ValueError: for more columns than there are learned positions.
        """
        rows = self.config.patch_rows
        if self.config.position_embedding == "sincos":
            return sine_cosine_positions(rows, columns, self.shape.width, device)
        if self.config.position_embedding == "learned":
            if columns > self.config.max_columns:
                raise ValueError(
                    f"{columns} patch columns, but positions were learned for {self.config.max_columns} (max_columns)"
                )
            return self.positions[:, :columns].flatten(0, 1)
        return None

    def forward(
        self,
        tokens: Tensor,
        columns: int,
        places: Tensor | None,
        valid: Tensor | None,
        record: Record | None = None,
    ) -> Tensor:
        """Run the blocks and the final norm.

        Args:
            tokens: [B, N, D], with added positions, if any.
            columns: number of columns of the grid.
            places: int64 [B, N], place of each token in the grid, that of its clip in a packed row; None for the whole
                grid in order.
            valid: tokens to attend to, bool [B, N], or int64 [B, N], number of the clip of each token in a packed row,
                as in `make_attention_mask`; None for all.
            record: where the outputs of the blocks are kept, before the final norm; None to keep none.

        Returns:
            [B, N, D]. Values at invalid tokens are undefined.
        """
        rotary = self._rotary(columns, places, tokens.device)
        attention_mask = make_attention_mask(self.config, tokens, valid)
        scales = None
        if self.training and any(self.drop_path_rates):
            scales = self._branch_scales(tokens, columns, valid).to(tokens.dtype).unbind(0)
        return self.norm(run_blocks(self.blocks, record, tokens, rotary, attention_mask, own=scales))

    def _branch_scales(self, tokens: Tensor, columns: int, valid: Tensor | None) -> Tensor:
        """Draw the scale of every branch, [blocks, 2, B, 1, 1], or [blocks, 2, B, N, 1] for packed rows."""
        batch = len(tokens)
        if valid is None or valid.dtype == torch.bool:
            return branch_scales(self.drop_path_rates, batch, tokens.device)
        numbers = columns + 1  # a clip has at least one column, and 0 stands for empty ones
        by_clip = branch_scales(self.drop_path_rates, batch * numbers, tokens.device).view(-1, 2, batch, numbers)
        return by_clip.gather(3, valid.expand(*by_clip.shape[:2], -1, -1))[..., None]

    def _rotary(self, columns: int, places: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if not self.config.position_embedding.startswith("rope"):
            return None
        head_width = self.shape.width // self.shape.heads
        two_dimensional = self.config.position_embedding == "rope_2d"
        cosine, sine = rotary_tables(self.config.patch_rows, columns, head_width, two_dimensional, device)
        if places is None:
            return cosine[None, None], sine[None, None]
        return cosine[places][:, None], sine[places][:, None]
