"""What the harness needs of torchaudio, for processes in which torchaudio itself does not work.

Two functions are called there: `torchaudio.functional.resample`, and `torchaudio.load` through webdataset. A wheel of
torchaudio built for CUDA cannot be imported beside a CPU build of torch, and from 2.9 on `load` needs torchcodec.
The installed packages stay as they are; only `sys.modules` of the running process changes.
"""

from __future__ import annotations

import importlib.machinery
import io
import sys
import types
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from bestrq2._torchaudio import import_torchaudio
from bestrq2.data.audio import open_audio, resampled

VERSION = "0+bestrq2"


def provide_torchaudio() -> str:
    """Make `import torchaudio` give something that decodes and resamples, in this process.

    Returns:
        What that is: "torchaudio VERSION", the same "with bestrq2's decoder", or "bestrq2's stand-in".
    """
    real: Any = import_torchaudio()
    if real is None:
        _install(_functional())
        return "bestrq2's stand-in"
    version = f"torchaudio {real.__version__}"
    if _decodes(real):
        return version
    _install(real.functional, real.__version__)
    return f"{version} with bestrq2's decoder"


def load(path: str, *_: Any, **__: Any) -> tuple[Tensor, int]:
    """Decode a whole file: float32 [1, samples], the mean over channels, which the harness takes next, and its Hz."""
    with open_audio(path) as decoder:
        return torch.from_numpy(np.ascontiguousarray(decoder.read(0, None))[None]), decoder.rate


def resample(waveform: Tensor, orig_freq: int, new_freq: int, **_: Any) -> Tensor:
    """Resample float [..., samples] from one rate in Hz to another, by soxr."""
    if orig_freq == new_freq:
        return waveform
    rows = waveform.reshape(-1, waveform.shape[-1]).numpy()
    converted = np.stack([resampled(row, orig_freq, new_freq) for row in rows])
    return torch.from_numpy(converted).reshape(*waveform.shape[:-1], -1)


def _decodes(torchaudio: Any) -> bool:
    """Whether it can decode a WAV file."""
    content = io.BytesIO()
    soundfile.write(content, np.array([0.0, 0.5, -0.5]), 16_000, format="WAV", subtype="PCM_16")
    content.seek(0)
    try:
        waveform, rate = torchaudio.load(content)
    except Exception:  # torchcodec missing or broken, or no backend of older versions
        return False
    return tuple(waveform.shape) == (1, 3) and rate == 16_000


def _functional() -> types.ModuleType:
    module = types.ModuleType("torchaudio.functional")
    vars(module).update(resample=resample)
    return module


def _install(functional: types.ModuleType, version: str = VERSION) -> None:
    module = types.ModuleType("torchaudio")
    # transformers asks for the spec when it looks which packages there are
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None, is_package=True)
    module.__path__ = []
    vars(module).update(load=load, functional=functional, __version__=version)
    sys.modules["torchaudio"] = module
    sys.modules["torchaudio.functional"] = functional
