"""Plain implementation of the two-step objective, the baseline for the speed of the real step.

Softmax attention by its definition, boolean indexing, positions and mask tokens in a complete grid, the spectrogram
computed once for the encoder and once for the targets, logits of the complete grid and a plain AdamW. It takes the
weights of a `BestRQ2ForPreTraining` with the paper's blocks (sine-cosine positions, LayerNorm, GELU, one codebook) and,
given the same masks, has the same loss and gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bestrq2
from bestrq2.model.log_mel import mel_filters
from bestrq2.model.patches import sine_cosine_positions


class PlainBlock(nn.Module):
    """Pre-norm block; stochastic depth drops the branches of single clips."""

    def __init__(self, width: int, heads: int, intermediate: int, eps: float, drop: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, drop
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, intermediate), "fc2": nn.Linear(intermediate, width)})

    def dropped(self, branch: Tensor) -> Tensor:
        if self.drop == 0 or not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop
        return branch * kept / (1 - self.drop)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        qkv = self.attn["qkv"](self.norm1(tokens)).reshape(batch, count, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        scores = queries @ keys.transpose(-2, -1) / (width // self.heads) ** 0.5
        mixed = (scores.softmax(dim=-1) @ values).transpose(1, 2).reshape(batch, count, width)
        tokens = tokens + self.dropped(self.attn["proj"](mixed))
        return tokens + self.dropped(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens)))))


class PlainStack(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, like: nn.Module, eps: float) -> None:
        super().__init__()
        shape = like.shape
        self.blocks = nn.ModuleList(
            PlainBlock(shape.width, shape.heads, shape.intermediate, eps, rate) for rate in like.drop_path_rates
        )
        self.norm = nn.LayerNorm(shape.width, eps)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class PlainModel(nn.Module):
    """Loss of a two-step model, with a copy of its weights."""

    def __init__(self, model: bestrq2.BestRQ2ForPreTraining) -> None:
        super().__init__()
        config = self.config = model.config
        usual = (config.objective, config.position_embedding, config.norm, config.activation, config.num_codebooks)
        if usual != ("two_step", "sincos", "layernorm", "gelu", 1) or config.input_normalization != "none":
            raise ValueError("the plain step knows the blocks and the objective of the recipe best-rq-2 only")
        self.patch_embedding = nn.Linear(config.patch_values, config.hidden_size)
        self.encoder = PlainStack(model.bestrq2.encoder, config.norm_eps)
        self.predictor_input = nn.Linear(config.hidden_size, config.predictor_hidden_size)
        self.predictor = PlainStack(model.predictor, config.norm_eps)
        self.mask_token = nn.Parameter(torch.empty_like(model.mask_token))
        self.head = nn.Linear(config.predictor_hidden_size, config.codebook_size)
        self.register_buffer("projection", model.quantizer.projection[0].clone())
        self.register_buffer("codebook", model.quantizer.codebook[0].clone())
        state = {name.removeprefix("bestrq2."): value for name, value in model.state_dict().items()}
        self.load_state_dict(
            {name: value for name, value in state.items() if not name.startswith(("quantizer.", "statistics."))}
            | {"projection": self.projection, "codebook": self.codebook}
        )

    def spectrogram_patches(self, audio: Tensor) -> Tensor:
        """[B, S] to [B, rows, columns, patch values]."""
        config = self.config
        assert not config.short_mel_bands, "the plain step has one window"
        window = torch.hann_window(config.win_length, device=audio.device)
        spectrum = torch.stft(
            audio, config.n_fft, config.hop_length, config.win_length, window, center=True, return_complex=True
        )
        power = (spectrum / window.square().sum().sqrt()).abs() ** 2
        filters = mel_filters(
            config.n_fft, config.num_mel_bands, config.mel_min_hz, config.mel_max_hz, config.sampling_rate, audio.device
        )
        log_mel = 10 * torch.log10(torch.clamp(filters.T @ power, min=1e-10))
        height, width = config.patch_size
        columns = log_mel.shape[-1] // width
        grid = log_mel[:, :, : columns * width].reshape(len(audio), -1, height, columns, width)
        return grid.permute(0, 1, 3, 2, 4).reshape(len(audio), grid.shape[1], columns, height * width)

    def codes(self, audio: Tensor) -> Tensor:
        """Targets of all patches, [B, N]."""
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            patches = self.spectrogram_patches(audio).flatten(1, 2)
            directions = F.normalize(patches @ self.projection, dim=-1)
            return (directions @ self.codebook.T).argmax(dim=-1)

    def forward(self, audio: Tensor, hidden_mask: Tensor) -> Tensor:
        """Loss of a batch [B, S] with hidden patches bool [B, N], as many for each clip."""
        config, hidden = self.config, hidden_mask.to(audio.device)
        with torch.autocast(audio.device.type, enabled=False):
            patches = self.spectrogram_patches(audio)
            rows, columns = patches.shape[1:3]
            tokens = self.patch_embedding(patches.flatten(1, 2))
        batch, width = len(tokens), tokens.shape[-1]
        tokens = tokens + sine_cosine_positions(rows, columns, width, audio.device)
        context = self.encoder(tokens[~hidden].view(batch, -1, width))

        positions = sine_cosine_positions(rows, columns, config.predictor_hidden_size, audio.device)
        grid = (self.mask_token + positions).repeat(batch, 1, 1)
        known = self.predictor_input(context)
        grid[~hidden] = known.flatten(0, 1).to(grid.dtype)
        logits = self.head(self.predictor(grid))
        return F.cross_entropy(logits[hidden].float(), self.codes(audio)[hidden])
