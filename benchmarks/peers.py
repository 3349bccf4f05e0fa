"""Other published implementations of BEST-RQ at the sizes of this package's Conformer recipes; both are optional.

SpeechBrain (its front end, Conformer, mask and quantizer, put together as in its LibriSpeech recipe BEST-RQ) and
best-rq-pytorch (whose wrapper trains a Conformer on the codes of every 10 ms frame, four times as many tokens).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bestrq2


class SpeechBrainBestRQ(nn.Module):
    """Loss of SpeechBrain's pieces at the sizes of `config`."""

    def __init__(self, config: bestrq2.BestRQ2Config) -> None:
        super().__init__()
        features = importlib.import_module("speechbrain.lobes.features")
        convolution = importlib.import_module("speechbrain.lobes.models.convolution")
        asr = importlib.import_module("speechbrain.lobes.models.transformer.TransformerASR")
        quantisers = importlib.import_module("speechbrain.nnet.quantisers")
        self.compute_mask = importlib.import_module("speechbrain.lobes.models.BESTRQ").compute_mask
        self.config = config
        milliseconds = 1000 / config.sampling_rate
        self.fbank = features.Fbank(
            sample_rate=config.sampling_rate, n_fft=config.n_fft, n_mels=config.num_mel_bands,
            win_length=config.win_length * milliseconds, hop_length=config.hop_length * milliseconds,
        )  # fmt: skip
        self.front = convolution.ConvolutionFrontEnd(
            input_shape=(8, 10, config.num_mel_bands), num_blocks=2, num_layers_per_block=1, kernel_sizes=(3, 3),
            out_channels=tuple(config.conformer_channels), strides=(2, 2), residuals=(False, False),
        )  # fmt: skip
        self.encoder = asr.EncoderWrapper(
            asr.TransformerASR(
                tgt_vocab=1, input_size=config.conformer_channels[1] * config.num_mel_bands // 4,
                d_model=config.hidden_size, nhead=config.num_attention_heads, d_ffn=config.intermediate_size,
                num_encoder_layers=config.num_hidden_layers, num_decoder_layers=0, dropout=config.conformer_dropout,
                activation=nn.GELU, encoder_module="conformer", attention_type="RelPosMHAXL", normalize_before=True,
                causal=False, kernel_size=config.conformer_kernel_size,
            )
        )  # fmt: skip
        self.quantizer = quantisers.RandomProjectionQuantizer(
            config.patch_values, config.codebook_dim, config.codebook_size
        )
        self.head = nn.Linear(config.hidden_size, config.codebook_size)

    def forward(self, audio: Tensor) -> Tensor:
        with torch.no_grad():
            frames = self.fbank(audio)
            frames = (frames - frames.mean(dim=(1, 2), keepdim=True)) / frames.std(dim=(1, 2), keepdim=True)
            frames = frames[:, : frames.shape[1] // 4 * 4]
            targets = self.quantizer(frames.reshape(len(audio), -1, self.config.patch_values))
            mask = self.compute_mask(frames.shape, [frames.shape[1]] * len(audio), 0.15, 4)
            mask = mask[mask < frames.shape[1]].to(audio.device)
            frames[:, mask] = 0.1 * torch.randn(len(audio), len(mask), frames.shape[2], device=audio.device)
        states = self.encoder(self.front(frames), torch.ones(len(audio), device=audio.device))
        hidden = mask[::4] // 4
        return F.cross_entropy(self.head(states[:, hidden]).flatten(0, 1).float(), targets[:, hidden].flatten())


def best_rq_pytorch(config: bestrq2.BestRQ2Config) -> nn.Module:
    """The wrapper of best-rq-pytorch at the sizes of `config`; called with audio it returns its loss first."""
    if "best_rq_pytorch" not in sys.modules:
        spec = importlib.util.find_spec("best_rq_pytorch")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("No module named 'best_rq_pytorch'")
        # The package of version 0.0.2 imports a name that it does not hold; its modules are whole.
        package = types.ModuleType("best_rq_pytorch")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["best_rq_pytorch"] = package
    module = importlib.import_module("best_rq_pytorch.best_rq")
    conformer = {
        "dim": config.hidden_size, "depth": config.num_hidden_layers, "heads": config.num_attention_heads,
        "dim_head": config.hidden_size // config.num_attention_heads, "conv_kernel_size": config.conformer_kernel_size,
        "ff_mult": config.intermediate_size // config.hidden_size, "attn_flash": True,
    }  # fmt: skip
    wrapper = importlib.import_module("best_rq_pytorch.conformer").ConformerWrapper
    model = module.BestRQ(
        config.codebook_size, config.codebook_dim, sample_rate=config.sampling_rate, n_mels=config.num_mel_bands,
        win_length=config.win_length, hop_length=config.hop_length, n_fft=config.n_fft,
        conformer=wrapper(num_tokens=config.codebook_size, conformer=conformer),
    )  # fmt: skip
    return module.BestRQPretrainWrapper(model)


class _First(nn.Module):
    """First output of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, audio: Tensor) -> Tensor:
        return self.module(audio)[0]


PEERS: dict[str, Callable[[bestrq2.BestRQ2Config], nn.Module]] = {
    "SpeechBrain": SpeechBrainBestRQ,
    "best-rq-pytorch": lambda config: _First(best_rq_pytorch(config)),
}


def make_peer(name: str, config: bestrq2.BestRQ2Config) -> nn.Module | str:
    """A module that turns audio [B, S] into a loss, or the reason why it is not available."""
    try:
        return PEERS[name](config)
    except Exception as error:  # foreign packages fail to import in many ways
        missing = isinstance(error, ModuleNotFoundError) or str(error).startswith("No module named")
        return "not installed" if missing else f"does not load: {str(error).splitlines()[0][:80]}"
