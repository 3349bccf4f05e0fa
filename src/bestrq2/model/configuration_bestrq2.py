"""Every architectural choice of a BEST-RQ-2 encoder and of its pretraining objective."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

try:
    from transformers import PreTrainedConfig
except ImportError:  # its name before transformers 5
    from transformers import PretrainedConfig as PreTrainedConfig

from .validation import check

# Keys that transformers itself reads from or writes to a config.json.
_HUB_KEYS = frozenset(
    [
        "architectures",
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "dtype",
        "experts_implementation",
        "finetuning_task",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_return_dict",
        "chunk_size_feed_forward",
        "tie_last_hidden_states",
        "per_layer_config",
    ]
)


class BestRQ2Config(PreTrainedConfig):
    """Configuration of `BestRQ2Model` and `BestRQ2ForPreTraining`; the defaults are the paper's (section 3).

    Args:
        sampling_rate: Hz of the input waveform.
        n_fft: length of the Fourier transform, samples.
        win_length: length of the Hann window, samples.
        hop_length: samples between frames.
        num_mel_bands: mel bands of the spectrogram.
        mel_min_hz: lower edge of the lowest band.
        mel_max_hz: upper edge of the highest band.
        max_seconds: longest clip in pretraining, and the window in which longer audio is embedded.
        input_normalization: of the log-mel spectrogram: "none" (dB as they are, the paper), "dataset" (per band, with
            the statistics stored in the model), "clip" (one mean and deviation per clip).
        patch_size: (mel bands, frames) of one patch.
        encoder_type: "vit", or "conformer" (convolutions over the spectrogram, then Conformer blocks; one-stage only).
        hidden_size: width of the encoder.
        num_hidden_layers: blocks of the encoder.
        num_attention_heads: heads of the encoder.
        intermediate_size: hidden width of the encoder's feed-forward part.
        activation: "gelu" or "swiglu" (leave it at "gelu" for a Conformer, which always has SiLU).
        norm: "layernorm" or "rmsnorm".
        norm_eps: epsilon of the norms.
        use_bias: whether the linear maps inside the blocks, the patch embedding, and the predictor have biases.
        qk_norm: whether queries and keys are normalised per head before the dot product.
        position_embedding: "sincos" (2-D sine-cosine, added), "rope_2d" (rotary, frequency and time), "rope_time"
            (rotary, time only), "learned" (added), "relative" (Transformer-XL; the Conformer's, and only its).
        max_columns: for "learned" positions, the largest number of patch columns.
        drop_path_rate: stochastic depth of the last encoder block; it rises linearly from 0 at the first (a Conformer
            has dropout instead).
        conformer_channels: channels of the two convolutions (kernel 3, stride 2) in front of a Conformer.
        conformer_kernel_size: frames that the depthwise convolution of a Conformer block sees; odd.
        conformer_dropout: dropout inside a Conformer.
        objective: "two_step" (encoder sees visible patches, a predictor names the codes) or "one_stage" (mask tokens in
            the encoder's input, the head sits on the encoder).
        predictor_hidden_size: width of the predictor.
        predictor_num_layers: blocks of the predictor.
        predictor_num_attention_heads: heads of the predictor.
        predictor_intermediate_size: hidden width of the predictor's feed-forward part.
        predictor_context_positions: whether the predictor adds positions to the context too, not to mask tokens only.
        codebook_size: codes per codebook.
        codebook_dim: width of the random projection.
        num_codebooks: independent quantizers; their losses are averaged.
        quantizer_seed: seed of the random projection and the codebook.
        quantizer_normalization: of what the quantizer sees: "none" (the encoder's own input), "layernorm" (each patch
            of it to mean 0 and deviation 1), "dataset" (log-mel per band with the stored statistics).
        mask_ratio: (lowest, highest) share of patches hidden, drawn once per step.
        mask_shape: "uniform" (patch by patch), "block" (rectangles of `mask_block_size`) or "span" (every column starts
            a span of `mask_block_size[1]` whole columns with probability `mask_span_probability`; no `mask_ratio`).
        mask_block_size: (rows, columns) of a block, in patches.
        mask_span_probability: that a column starts a span.
        mask_fill: of one-stage models, what hidden patches are replaced by: "token" (a learned token) or "noise"
            (Gaussian noise of `mask_noise_std` in place of their normalised values, before anything reads them).
        mask_noise_std: standard deviation of that noise.
        masks_per_clip: masks trained on for every clip of a step; they share one spectrogram and its targets, and
            where they are uniform their visible parts overlap as little as possible (two masks of ratio 0.5 are each
            other's complement), other shapes are drawn independently.
        initializer_range: standard deviation of the truncated normal initialisation.

    Raises:
        ValueError: for an unknown key, a value out of range, or values at odds with each other.
    """

    model_type = "bestrq2"

    def __init__(
        self,
        sampling_rate: int = 16_000,
        n_fft: int = 2048,
        win_length: int = 2048,
        hop_length: int = 625,
        num_mel_bands: int = 128,
        mel_min_hz: float = 0.0,
        mel_max_hz: float = 8000.0,
        max_seconds: float = 10.0,
        input_normalization: str = "none",
        patch_size: Sequence[int] = (16, 16),
        encoder_type: str = "vit",
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        activation: str = "gelu",
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        use_bias: bool = True,
        qk_norm: bool = False,
        position_embedding: str = "sincos",
        max_columns: int = 16,
        drop_path_rate: float = 0.1,
        conformer_channels: Sequence[int] = (128, 32),
        conformer_kernel_size: int = 31,
        conformer_dropout: float = 0.1,
        objective: str = "two_step",
        predictor_hidden_size: int = 768,
        predictor_num_layers: int = 4,
        predictor_num_attention_heads: int = 12,
        predictor_intermediate_size: int = 3072,
        predictor_context_positions: bool = False,
        codebook_size: int = 8192,
        codebook_dim: int = 16,
        num_codebooks: int = 1,
        quantizer_seed: int = 0,
        quantizer_normalization: str = "none",
        mask_ratio: Sequence[float] = (0.4, 0.6),
        mask_shape: str = "uniform",
        mask_block_size: Sequence[int] = (2, 2),
        mask_span_probability: float = 0.15,
        mask_fill: str = "token",
        mask_noise_std: float = 0.1,
        masks_per_clip: int = 1,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown(kwargs)
        self.sampling_rate = sampling_rate
        self.n_fft = n_fft
        self.win_length = win_length
        self.hop_length = hop_length
        self.num_mel_bands = num_mel_bands
        self.mel_min_hz = mel_min_hz
        self.mel_max_hz = mel_max_hz
        self.max_seconds = max_seconds
        self.input_normalization = input_normalization
        self.patch_size = _pair(patch_size, "patch_size")
        self.encoder_type = encoder_type
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.norm = norm
        self.norm_eps = norm_eps
        self.use_bias = use_bias
        self.qk_norm = qk_norm
        self.position_embedding = position_embedding
        self.max_columns = max_columns
        self.drop_path_rate = drop_path_rate
        self.conformer_channels = _pair(conformer_channels, "conformer_channels")
        self.conformer_kernel_size = conformer_kernel_size
        self.conformer_dropout = conformer_dropout
        self.objective = objective
        self.predictor_hidden_size = predictor_hidden_size
        self.predictor_num_layers = predictor_num_layers
        self.predictor_num_attention_heads = predictor_num_attention_heads
        self.predictor_intermediate_size = predictor_intermediate_size
        self.predictor_context_positions = predictor_context_positions
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.num_codebooks = num_codebooks
        self.quantizer_seed = quantizer_seed
        self.quantizer_normalization = quantizer_normalization
        self.mask_ratio = _pair(mask_ratio, "mask_ratio")
        self.mask_shape = mask_shape
        self.mask_block_size = _pair(mask_block_size, "mask_block_size")
        self.mask_span_probability = mask_span_probability
        self.mask_fill = mask_fill
        self.mask_noise_std = mask_noise_std
        self.masks_per_clip = masks_per_clip
        self.initializer_range = initializer_range
        check(self)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but fields changed by keyword (`from_pretrained(..., qk_norm=True)`) are checked too."""
        changes = {name: kwargs.pop(name) for name in field_names() if name in kwargs}
        return super().from_dict({**config_dict, **changes}, **kwargs)

    @property
    def patch_rows(self) -> int:
        """Patches along the frequency axis."""
        return self.num_mel_bands // self.patch_size[0]

    @property
    def patch_values(self) -> int:
        """Log-mel values in one patch."""
        return self.patch_size[0] * self.patch_size[1]

    @property
    def frame_hop_samples(self) -> int:
        """Samples between the frames that the encoder returns (one per patch column)."""
        return self.patch_size[1] * self.hop_length

    @property
    def max_samples(self) -> int:
        """Samples of the longest clip in pretraining."""
        return round(self.max_seconds * self.sampling_rate)

    @property
    def min_training_samples(self) -> int:
        """Samples of the shortest clip in pretraining: one patch of two must stay visible."""
        one_column = self.patch_rows > 1 and self.mask_shape != "span"
        return 1 if one_column else 2 * self.frame_hop_samples - self.hop_length

    @property
    def uses_dataset_statistics(self) -> bool:
        """Whether mean and deviation per mel band must be estimated before training."""
        return "dataset" in (self.input_normalization, self.quantizer_normalization)

    @property
    def mean_hidden_share(self) -> float:
        """Share of the patches that a mask hides on average, but for rounding to whole patches."""
        if self.mask_shape == "span":
            return 1.0 - (1.0 - self.mask_span_probability) ** self.mask_block_size[1]
        return sum(self.mask_ratio) / 2

    def columns(self, samples: int) -> int:
        """Patch columns of a clip of that many samples: whole patches only, at least one."""
        return max(1, (1 + samples // self.hop_length) // self.patch_size[1])


def field_names() -> list[str]:
    """Names of the architectural fields, in order of declaration."""
    parameters = inspect.signature(BestRQ2Config.__init__).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]


def _nearest(name: str, known: Sequence[str]) -> str:
    """A hint that names the known key most like `name`; empty where none is alike."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name not in _HUB_KEYS and not name.startswith("_"):
            raise ValueError(f"BestRQ2Config has no field '{name}'{_nearest(name, field_names())}")


def _pair(value: Any, name: str) -> list[Any]:
    """`value` as a list of two, as JSON keeps it."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers, got {value!r}")
    return list(value)
