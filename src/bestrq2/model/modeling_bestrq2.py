"""BEST-RQ-2 models: encoder, pretraining with either objective, audio classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .attention import Record
from .configuration_bestrq2 import BestRQ2Config
from .conformer import Conformer, ConvolutionalEmbedding, RelativeAttention
from .kernels import head_cross_entropy, to_device, traced
from .log_mel import InputStatistics, LogMel
from .masking import Split, draw_hidden_mask, draw_packed_mask, split_by_mask, split_packed
from .outputs import BestRQ2ForPreTrainingOutput, BestRQ2ModelOutput
from .packing import MIN_DEVIATION, Packing, normalize_clips
from .patches import Patches, patch_columns, patch_validity, patchify
from .quantizer import RandomProjectionQuantizer, code_usage, count_codes
from .readout import Layers, Readout, clips_of_rows, pool
from .transformer import BlockLinear, Transformer, TransformerShape

logger = logging.get_logger(__name__)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

# Weights that only pretraining needs; ignored when the encoder is loaded alone. Transformers 5.0 takes lists only.
PRETRAINING_KEYS = [r"^predictor", r"^quantizer\.", r"^head\.", r"^mask_token$"]


class BestRQ2PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization, shared by all models."""

    config_class = BestRQ2Config
    base_model_prefix = "bestrq2"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ("Block", "ConformerBlock")
    # In 16 bits they would shift the input.
    _keep_in_fp32_modules_strict: tuple[str, ...] = ("statistics",)

    def __init__(self, config: BestRQ2Config) -> None:
        if config.encoder_type == "conformer":
            # Its relative positions are a bias for every head, which only "eager" and "sdpa" add to the scores.
            self._supports_flash_attn = self._supports_flex_attn = False
        super().__init__(config)

    def _record(self, output_hidden_states: bool | None, output_attentions: bool | None) -> Record:
        """Return an empty record of what is requested; None stands for the setting of the configuration."""
        config = self.config
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = config.output_attentions if output_attentions is None else output_attentions
        if weights and config._attn_implementation != "eager":
            logger.warning_once(
                f"output_attentions: the attention implementation '{config._attn_implementation}' gives no weights; "
                "call model.set_attn_implementation('eager') first"
            )
            weights = False
        return Record([] if states else None, [] if weights else None)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as the public code does (paper section 3; SpeechBrain's BEST-RQ for a Conformer).

        The linear layers of a transformer's blocks and the mask token are truncated normal, with zero biases; a
        Conformer's blocks are Xavier normal. All other layers keep PyTorch's defaults.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            if isinstance(module, BlockLinear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            else:
                module.reset_parameters()
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, Transformer) and hasattr(module, "positions"):
            nn.init.trunc_normal_(module.positions, std=std)
        elif isinstance(module, BestRQ2ForPreTraining) and hasattr(module, "mask_token"):
            nn.init.trunc_normal_(module.mask_token, std=std)
        elif isinstance(module, RandomProjectionQuantizer | InputStatistics | RelativeAttention):
            tensors = module.state_dict(keep_vars=True).values()
            # Early releases of transformers 5 initialize modules with loaded buffers, too.
            if any(not getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                module.reset_parameters()


class BestRQ2Model(BestRQ2PreTrainedModel):
    """Encoder from waveform to embeddings: log-mel, patches, and a transformer or Conformer over all of them."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [*PRETRAINING_KEYS, r"^classifier\."]
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__(config)
        self.log_mel = LogMel(config)
        self.statistics = InputStatistics(config)
        self.patch_embedding: nn.Module
        self.encoder: Transformer | Conformer
        if config.encoder_type == "conformer":
            self.patch_embedding, self.encoder = ConvolutionalEmbedding(config), Conformer(config)
        else:
            self.patch_embedding = nn.Linear(config.patch_values, config.hidden_size, bias=config.use_bias)
            self.encoder = Transformer(config, TransformerShape.of_encoder(config))
        self.readout = Readout.of(config)
        self.post_init()

    def set_readout(
        self, layers: Layers | None = None, frequency: str | None = None, pooling: str | None = None
    ) -> None:
        """Choose what frames and clips are made of, also once the model is saved; see `Readout`.

        Args:
            layers: layer or layers; None keeps the present ones.
            frequency: "mean" or "concat" of the frequency rows; None keeps the present one.
            pooling: pooling over time; None keeps the present one.

        Raises:
            ValueError: unknown setting, or the encoder has no such layer.
        """
        self.readout = Readout.of(self.config, layers, frequency, pooling)
        if changes := self.readout.changes():
            self.config.readout = changes
        else:
            self.config.__dict__.pop("readout", None)  # the default of the class, which is not saved

    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Store mean and deviation of the corpus per mel band in dB, float [bands] each."""
        self.statistics.mean.copy_(mean)
        self.statistics.deviation.copy_(deviation)

    def patches(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Patches:
        """Cut a batch of waveforms into patches; arguments as in `forward`, or lengths [B] in place of the mask."""
        if input_values.ndim != 2 or not input_values.is_floating_point():
            given = f"{input_values.dtype} of shape {tuple(input_values.shape)}"
            raise ValueError(f"input_values must be floats in [-1, 1], [batch, samples], got {given}")
        if packing is not None:
            return self._packed_patches(input_values, packing)
        if attention_mask is not None:
            lengths = _lengths(attention_mask, input_values)
        log_mel, frames = self.log_mel(input_values, lengths)
        padded = lengths is not None
        # On other devices this would cost a synchronization, and a tracer has no values.
        if padded and frames.device.type == "cpu" and not traced():
            # Clips with equally many patches need no attention mask, which would slow the attention down.
            width = self.config.patch_size[1]
            padded = bool((patch_columns(frames, width) < log_mel.shape[-1] // width).any())
        return self.spectrogram_patches(log_mel, frames, padded)

    def spectrogram_patches(self, log_mel: Tensor, frames: Tensor, padded: bool) -> Patches:
        """Cut a batch of spectrograms into patches.

        Args:
            log_mel: float32 [B, bands, T] in dB.
            frames: int64 [B], number of frames inside each clip.
            padded: whether some clips may have fewer than T frames.
        """
        width = self.config.patch_size[1]
        clip_columns = patch_columns(frames, width)
        columns = max(1, log_mel.shape[-1] // width)
        log_mel = log_mel[..., : columns * width]
        valid = patch_validity(clip_columns, self.config.patch_rows, columns) if padded else None
        values = self._patch_values(partial(self._normalized, log_mel, clip_columns * width))
        return Patches(*values, columns, clip_columns, valid)

    def _packed_patches(self, rows: Tensor, packing: Packing) -> Patches:
        """Cut packed rows into patches; every clip as if it were alone."""
        segments, height = packing.segments, self.config.patch_rows
        if segments.ndim != 2 or len(segments) != len(rows):
            raise ValueError(f"the packing must have {len(rows)} rows of patch columns, got {tuple(segments.shape)}")
        conformer = self.config.encoder_type == "conformer"
        if conformer and segments.device.type == "cpu" and not traced() and bool((segments > 1).any()):
            raise ValueError("a Conformer's convolutions join the clips of a row; give it rows of one clip")
        log_mel = self.log_mel.packed(rows, packing.frames)
        values = self._patch_values(partial(self._normalized_rows, log_mel, segments))
        if segments.device.type == "cpu" and not traced() and bool((segments == 1).all()):
            # One whole clip in every row needs no attention mask, which would slow the attention down.
            return Patches(*values, segments.shape[1], (segments != 0).sum(dim=1), None)
        numbers = packing.patch_segments(height)
        own = (None, None) if conformer else (numbers, packing.patch_positions(height))
        return Patches(*values, segments.shape[1], (segments != 0).sum(dim=1), numbers != 0, *own)

    def _patch_values(self, normalized: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """Cut the log-mel spectrogram, which `normalized` returns by the name of a normalization, into patches.

        Returns:
            The inputs of the encoder and of the quantizer, float32 [B, N, patch values] each.
        """
        own, size = self.config.input_normalization, (self.config.patch_size[0], self.config.patch_size[1])
        # "none" and "layernorm" start from the encoder's own input.
        of_quantizer = {"none": own, "layernorm": own, "decibels": "none"}
        other = of_quantizer.get(self.config.quantizer_normalization, self.config.quantizer_normalization)
        encoder_patches = patchify(normalized(own), size)
        return encoder_patches, encoder_patches if other == own else patchify(normalized(other), size)

    def _normalized(self, log_mel: Tensor, frames: Tensor, normalization: str) -> Tensor:
        """Normalize a batch [B, bands, T] of clips with `frames` [B] frames each."""
        if normalization == "dataset":
            return self.statistics(log_mel)
        if normalization == "none":
            return log_mel
        inside = torch.arange(log_mel.shape[-1], device=log_mel.device) < to_device(frames, log_mel.device)[:, None]
        weights, over = inside[:, None].float(), (2,) if normalization == "clip_band" else (1, 2)
        count = weights.sum(dim=(1, 2), keepdim=True) * (log_mel.shape[1] if 1 in over else 1)
        centred = log_mel - (log_mel * weights).sum(dim=over, keepdim=True) / count
        # Again, because a band that hardly changes is divided by little, and so is the rounding error of its mean.
        centred = centred - (centred * weights).sum(dim=over, keepdim=True) / count
        variance = (centred.square() * weights).sum(dim=over, keepdim=True) / count
        return centred / variance.sqrt().clamp_min(MIN_DEVIATION)

    def _normalized_rows(self, log_mel: Tensor, segments: Tensor, normalization: str) -> Tensor:
        """Normalize packed rows [R, bands, T] with `segments` [R, C], each clip as if it were alone."""
        if normalization in ("none", "dataset"):
            return self._normalized(log_mel, segments, normalization)
        return normalize_clips(log_mel, segments, per_band=normalization == "clip_band")

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        packing: Packing | None = None,
        **unused: Any,
    ) -> BestRQ2ModelOutput:
        """Embed a batch of clips, independently of their padding.

        Args:
            input_values: float [B, S], mono waveform at `config.sampling_rate`, samples in [-1, 1].
            attention_mask: [B, S], 1 for samples of the clip, 0 for padding on the right; None for none.
            output_hidden_states: return the input of the first block and the output of every block; None for the
                configuration's setting.
            output_attentions: return the attention weights of every block, which only the implementation "eager" has;
                None for the configuration's setting.
            packing: clips of packed rows, where `input_values` [R, S] has several clips per row; B is then R.
            unused: ignored; transformers passes further keyword arguments.

        Returns:
            Frames [B, T', D], clips [B, D], patches [B, N, D], the mask of frames [B, T'] and, if requested, the hidden
            states: one more than there are blocks, [B, N, D] each, and the attention weights [B, heads, N, N] of each
            block. A tuple of these with `return_dict=False`.

        Raises:
            ValueError: for inputs of the wrong shape.
        """
        record = self._record(output_hidden_states, output_attentions)
        requested = record.hidden_states is not None
        if self.readout.needs_hidden_states and not requested:
            record.hidden_states = []
        patches = self.patches(input_values, attention_mask, packing=packing)
        tokens = self.embed_patches(patches)
        states = self.encode(tokens, patches, record)
        pooled = self.pooled(states, patches, record.hidden_states, packing)
        if not requested:
            record.hidden_states = None
        return BestRQ2ModelOutput(**pooled, **record.fields())

    def encode(self, tokens: Tensor, patches: Patches, record: Record | None = None) -> Tensor:
        """Run the encoder over the tokens of all patches, with their positions, [B, N, D]."""
        valid = patches.valid if patches.segments is None else patches.segments
        valid = None if valid is None else to_device(valid, tokens.device)
        places = None if patches.positions is None else to_device(patches.positions, tokens.device)
        return self.encoder(tokens, patches.columns, places, valid, record)

    def pooled(
        self,
        states: Tensor,
        patches: Patches,
        hidden_states: Sequence[Tensor] | None = None,
        packing: Packing | None = None,
    ) -> BestRQ2ModelOutput:
        """Read frames and clips out of the encoder output of all patches [B, N, D] and, if needed, the hidden states.

        Clips of packed rows are in the order of the rows.
        """
        frames = self.readout.frames(states, hidden_states, self.config.patch_rows).to(states.dtype)
        if packing is not None:
            frame_mask = to_device(packing.segments != 0, states.device)
        elif patches.valid is not None:
            frame_mask = patch_validity(patches.clip_columns, 1, patches.columns).to(states.device)
        else:
            frame_mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=states.device)
        if packing is not None or patches.valid is not None:
            frames = frames.masked_fill(~frame_mask[..., None], 0.0)
        clips, inside = (frames, frame_mask) if packing is None else clips_of_rows(frames, packing)
        return BestRQ2ModelOutput(
            frames, pool(clips, inside, self.readout.pooling).to(states.dtype), states, frame_mask
        )

    def embed_patches(self, patches: Patches) -> Tensor:
        """Embed all patches and add their positions: [B, N, D]."""
        return self.add_positions(self.embed_values(patches.encoder_input), patches)

    def add_positions(self, tokens: Tensor, patches: Patches) -> Tensor:
        """Add positions, if the encoder has any, to the tokens of all patches, [B, N, D]."""
        positions = self.encoder.added_positions(patches.columns, tokens.device)
        if positions is not None and patches.positions is not None:
            positions = positions[to_device(patches.positions, tokens.device)]
        return tokens if positions is None else tokens + positions.to(tokens.dtype)

    def embed_values(self, values: Tensor) -> Tensor:
        """Embed patches without positions: [B, K, patch values] to [B, K, D].

        Runs in the precision of the weights even inside autocast: bfloat16 cannot resolve 0.1 dB at -60 dB, nor add a
        position to the large tokens that raw decibels give, and it sets the dtype of the residual stream.
        """
        with torch.autocast(values.device.type, enabled=False):
            return self.patch_embedding(values.to(next(self.patch_embedding.parameters()).dtype))


def _lengths(attention_mask: Tensor, input_values: Tensor) -> Tensor:
    """Return the number of samples of each clip, int64 [B], from a mask with padding on the right."""
    if attention_mask.shape != input_values.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_values {tuple(input_values.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    lengths = attention_mask.sum(dim=1, dtype=torch.int64)
    # On other devices the check would cost a synchronization, and a tracer has no values.
    if attention_mask.device.type == "cpu" and not traced():
        if bool((lengths == 0).any()):
            raise ValueError("attention_mask leaves a clip without any sample")
        if bool((attention_mask[:, 1:].to(torch.int8) > attention_mask[:, :-1].to(torch.int8)).any()):
            raise ValueError("attention_mask must pad on the right: ones first, then zeros")
    return lengths


class BestRQ2ForPreTraining(BestRQ2PreTrainedModel):
    """Encoder, predictor, head and quantizer, trained to predict the codes of hidden patches."""

    # In 16 bits it would change the codes.
    _keep_in_fp32_modules_strict = ("quantizer", "statistics")

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__(config)
        self.bestrq2 = BestRQ2Model(config)
        self.quantizer = RandomProjectionQuantizer(config)
        head_input = config.hidden_size
        if config.objective == "two_step":
            head_input = config.predictor_hidden_size
            self.predictor_input = nn.Linear(config.hidden_size, head_input, bias=config.use_bias)
            self.predictor = Transformer(config, TransformerShape.of_predictor(config))
        if config.mask_fill == "token":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, head_input))
        self.head = nn.Linear(head_input, config.num_codebooks * config.codebook_size, bias=config.use_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        lengths: Tensor | None = None,
        output_logits: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        packing: Packing | None = None,
        teacher_codes: Tensor | None = None,
        **unused: Any,
    ) -> BestRQ2ForPreTrainingOutput:
        """Hide patches and predict their codes.

        Args:
            input_values: float [B, S], mono waveform at `config.sampling_rate`.
            attention_mask: [B, S], 1 for samples of the clip, 0 for padding on the right; None for none.
            hidden_mask: bool, True = hidden: [B, N], or [N] for one mask shared by all clips; drawn at random if None.
                Keep it on the CPU: there it costs an accelerator no synchronization.
            generator: CPU generator for drawing the mask; None for torch's global one.
            lengths: int64 [B], samples of each clip, a cheaper alternative to `attention_mask`.
            output_logits: whether to return logits. Training does not: the loss is then computed in chunks, and the
                statistics that follow from `code_counts` (`target_entropy` to `top_code_share`) are left out too.
            output_hidden_states: return the hidden states of the encoder, as `BestRQ2Model` does.
            output_attentions: return the attention weights of the encoder, as `BestRQ2Model` does.
            packing: clips of packed rows, where `input_values` [R, S] has several clips per row; B is then R, and the
                hidden mask is that of `draw_packed_mask`.
            teacher_codes: int64 [B, N, K], codes of all patches that replace those of the last K of several codebooks;
                None for none. A second round has them from the states of an encoder (HuBERT, arXiv 2106.07447).
            unused: ignored; transformers passes further keyword arguments.

        Returns:
            Loss, logits and targets of the hidden patches, and diagnostics; a tuple of these with `return_dict=False`.

        Raises:
            ValueError: for a mask of the wrong shape, or one that hides none or all of a clip's patches.
        """
        record = self._record(output_hidden_states, output_attentions)
        if packing is None:
            patches = self.bestrq2.patches(input_values, attention_mask, lengths)
        else:
            patches = self.bestrq2.patches(input_values, packing=packing)
        if hidden_mask is None:
            seed = int(torch.randint(2**31, (), generator=generator))
            hidden_mask = self._drawn_mask(patches, packing, seed)
        hidden_mask = self._checked_mask(hidden_mask, patches)
        split = self._split(hidden_mask, patches)
        if self.config.objective == "two_step":
            context, predicted = self._two_step(patches, split, record)
        else:
            context, predicted = self._one_stage(patches, split, hidden_mask, record)
        targets = self.quantizer(_take(patches.quantizer_input, split.hidden))
        if teacher_codes is not None:
            taught = _take(teacher_codes, split.hidden)
            targets = torch.cat([targets[..., : -taught.shape[-1]], taught], dim=-1)
        scores = self._scored(predicted, targets, split.hidden_valid, output_logits)
        if patches.segments is not None:
            hidden_mask = hidden_mask & (patches.segments.to(hidden_mask.device) != 0)
        return BestRQ2ForPreTrainingOutput(
            hidden_mask=hidden_mask, context_hidden_state=context, **(scores | record.fields())
        )

    def _drawn_mask(self, patches: Patches, packing: Packing | None, seed: int) -> Tensor:
        """Draw the hidden patches of a batch, bool [B, N]."""
        places = range(len(patches.clip_columns))
        if packing is not None:
            return draw_packed_mask(self.config, packing.segments, seed, 0, places)
        drawn = draw_hidden_mask(self.config, patches.clip_columns.tolist(), seed, 0, places)
        # The grid is wider than the longest clip where the batch is padded further.
        grid = drawn.unflatten(-1, (self.config.patch_rows, -1))
        return F.pad(grid, (0, patches.columns - grid.shape[-1])).flatten(-2)

    def _split(self, hidden_mask: Tensor, patches: Patches) -> Split:
        """Split the grids of a batch into visible and hidden patches."""
        device, of_mask = patches.encoder_input.device, hidden_mask.device
        if patches.segments is None or patches.positions is None:
            valid = None if patches.valid is None else patches.valid.to(of_mask)
            return split_by_mask(hidden_mask, valid, device)
        return split_packed(hidden_mask, patches.segments.to(of_mask), patches.positions.to(of_mask), device)

    def _checked_mask(self, hidden_mask: Tensor, patches: Patches) -> Tensor:
        batch, count, _ = patches.encoder_input.shape
        if hidden_mask.ndim == 1:
            hidden_mask = hidden_mask.expand(batch, -1)
        if hidden_mask.shape != (batch, count) or hidden_mask.dtype != torch.bool:
            raise ValueError(
                f"hidden_mask must be bool [{batch}, {count}], got {hidden_mask.dtype} {list(hidden_mask.shape)}"
            )
        if patches.valid is not None and patches.segments is None:
            hidden_mask = hidden_mask & patches.valid.to(hidden_mask.device)
        if hidden_mask.device.type == "cpu":
            if patches.segments is None:
                counts = hidden_mask.sum(dim=1)
                total = patches.clip_columns.to("cpu") * self.config.patch_rows
            else:
                counts, total = _clip_counts(hidden_mask, patches.segments.to("cpu"), patches.columns)
            if bool(((counts == 0) | (counts == total)).any()):
                raise ValueError("hidden_mask must hide at least one patch of every clip and leave one visible")
        return hidden_mask

    def _two_step(self, patches: Patches, split: Split, record: Record) -> tuple[Tensor, Tensor]:
        """Contextualize, then predict (paper section 2.2): the encoder sees visible patches only.

        Attention does not depend on the order of tokens, so the predictor gets [context, mask tokens] concatenated,
        each with its place in the grid, and nothing needs to be scattered back.
        """
        columns, device, count = patches.columns, split.places.device, split.visible_count
        visible, hidden = split.positions[:, :count], split.positions[:, count:]
        tokens = self.bestrq2.embed_values(_take(patches.encoder_input, split.visible))
        tokens = _add(tokens, self.bestrq2.encoder.added_positions(columns, device), visible)
        context = self.bestrq2.encoder(tokens, columns, visible, split.visible_valid, record)

        known = self.predictor_input(context).to(self.mask_token.dtype)
        asked = _add(self.mask_token.expand(*hidden.shape, -1), self.predictor.added_positions(columns, device), hidden)
        states = self.predictor(torch.cat([known, asked], 1), columns, split.positions, split.valid)
        return context, states[:, count:]

    def _one_stage(self, patches: Patches, split: Split, hidden_mask: Tensor, record: Record) -> tuple[Tensor, Tensor]:
        """Replace hidden patches by mask tokens or noise and encode the whole grid (paper section 2.1)."""
        is_hidden = to_device(hidden_mask, split.places.device)
        if self.config.mask_fill == "noise":
            tokens = self.bestrq2.embed_values(self._with_noise(patches.encoder_input, is_hidden))
        else:
            tokens = self.bestrq2.embed_values(patches.encoder_input)
            tokens = torch.where(is_hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
        states = self.bestrq2.encode(self.bestrq2.add_positions(tokens, patches), patches, record)
        return _take(states, split.visible), _take(states, split.hidden)

    def _with_noise(self, values: Tensor, is_hidden: Tensor) -> Tensor:
        """Replace hidden patches of [B, N, P] by Gaussian noise; in evaluation mode the noise is always the same."""
        generator = None if self.training else torch.Generator(values.device).manual_seed(0)
        noise = torch.randn(values.shape, generator=generator, device=values.device, dtype=values.dtype)
        return torch.where(is_hidden[..., None], self.config.mask_noise_std * noise, values)

    def _scored(self, states: Tensor, targets: Tensor, valid: Tensor | None, output_logits: bool) -> dict[str, Tensor]:
        """Compute the cross-entropy in float32 and diagnostics that tell learning from collapse.

        Args:
            states: [B, H, D], input of the head.
            targets: int64 [B, H] or [B, H, codebooks].
            valid: bool [B, H], True for targets that count; None for all.
            output_logits: as in `forward`.
        """
        hidden_valid = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if valid is None else valid
        counts = count_codes(targets, hidden_valid, self.config.codebook_size)
        total = targets.numel() if valid is None else valid.sum().clamp_min(1) * self.config.num_codebooks
        known = {"targets": targets, "hidden_valid": hidden_valid, "code_counts": counts}
        if not output_logits:
            loss, right = head_cross_entropy(self.head, states, targets, valid)
            return {**known, "loss": loss / total, "accuracy": right / total}
        logits = self.head(states)
        if self.config.num_codebooks > 1:
            logits = logits.unflatten(-1, (self.config.num_codebooks, self.config.codebook_size))
        with torch.autocast(logits.device.type, enabled=False):
            losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
            weights = hidden_valid.float().reshape(*hidden_valid.shape, *[1] * (targets.ndim - 2)).expand(targets.shape)
            loss = (losses.view(targets.shape) * weights).sum() / total
        right = ((logits.detach().argmax(dim=-1) == targets) * weights).sum()
        usage = code_usage(counts)
        return {
            **known,
            "loss": loss,
            "logits": logits,
            "accuracy": right / total,
            "target_entropy": usage.entropy,
            "excess_loss": loss.detach() - usage.entropy,
            "code_perplexity": usage.perplexity,
            "code_coverage": usage.coverage,
            "top_code_share": usage.top_share,
        }


class BestRQ2ForAudioClassification(BestRQ2PreTrainedModel):
    """Audio classifier: encoder, its clip vector (by default the mean over the frames), linear layer to the classes."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = PRETRAINING_KEYS

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__(config)
        self.bestrq2 = BestRQ2Model(config)
        self.classifier = nn.Linear(Readout.of(config).clip_width(config), config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        packing: Packing | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutput:
        """Classify a batch of clips.

        `config.problem_type` selects the loss. If it is None, the first labels set it, as in transformers: one class
        means regression, integer labels a single label, floating-point labels several.

        Args:
            input_values: float [B, S], mono waveform at `config.sampling_rate`, samples in [-1, 1].
            attention_mask: [B, S], 1 for samples of the clip, 0 for padding on the right; None for none.
            labels: int64 [B], class indices ("single_label_classification"); float [B, classes] of 0 and 1
                ("multi_label_classification"); float [B] or [B, classes] ("regression"); None for no loss.
            output_hidden_states: return the hidden states of the encoder, as `BestRQ2Model` does.
            output_attentions: return the attention weights of the encoder, as `BestRQ2Model` does.
            packing: clips of packed rows, where `input_values` [R, S] has several clips per row; B is then the number
                of all clips, and labels and logits are those of the clips row by row.
            unused: ignored keyword arguments that transformers passes around.

        Returns:
            `logits` [B, classes] and, with labels, `loss`: mean cross-entropy, binary cross-entropy or squared error;
            `hidden_states` and `attentions` as in `BestRQ2ModelOutput`. A tuple of these with `return_dict=False`.

        Raises:
            ValueError: for an unknown `config.problem_type`.
        """
        encoded = self.bestrq2(
            input_values,
            attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            packing=packing,
            return_dict=True,
        )
        logits = self.classifier(encoded.pooler_output)
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config, logits = self.config, logits.float()
        if config.problem_type is None:
            whole = not labels.is_floating_point()
            config.problem_type = REGRESSION if config.num_labels == 1 else SINGLE if whole else MULTI
        if config.problem_type == SINGLE:
            return F.cross_entropy(logits, labels)
        if config.problem_type == MULTI:
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        if config.problem_type == REGRESSION:
            return F.mse_loss(logits, labels.to(logits.dtype).view_as(logits))
        raise ValueError(f"problem_type must be {SINGLE}, {MULTI} or {REGRESSION}, got {config.problem_type!r}")


def _clip_counts(hidden_mask: Tensor, segments: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Count the hidden patches and all patches of every clip in packed rows, int64 [clips] each."""
    counts = torch.zeros(2, len(segments), columns + 1, dtype=torch.int64, device="cpu")
    counts[0].scatter_add_(1, segments, hidden_mask.long())
    counts[1].scatter_add_(1, segments, torch.ones_like(segments))
    hidden, total = counts[:, :, 1:]
    return hidden[total > 0], total[total > 0]


def _take(states: Tensor, index: Tensor) -> Tensor:
    """Gather rows of [B, N, D] at int64 [B, K]: [B, K, D]."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def _add(tokens: Tensor, positions: Tensor | None, index: Tensor) -> Tensor:
    """Add positions [N, D] at places [B, K] to tokens [B, K, D]; None adds nothing."""
    return tokens if positions is None else tokens + positions[index].to(tokens.dtype)
