"""Replacement for a torchaudio that is missing or cannot be loaded.

A wheel built for another torch, such as the one that the X-ARES harness brings beside a CPU build, fails with OSError,
and from 2.9 on `torchaudio.load` needs torchcodec. transformers takes an installed package for a working one, and the
harness calls two functions: `torchaudio.functional.resample`, and `torchaudio.load` through webdataset. Installed
packages stay as they are; only the running process changes.
"""

from __future__ import annotations

import importlib.machinery
import io
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VERSION = "0+bestrq2"


def import_torchaudio() -> types.ModuleType | None:
    """Import the installed torchaudio; None where there is none that can be imported."""
    try:
        import torchaudio
    except Exception:  # a missing native library shows as OSError, ImportError or RuntimeError
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        return None
    module: types.ModuleType = torchaudio
    return module


def hide_broken_torchaudio() -> None:
    """Let transformers do without a torchaudio that cannot be imported."""
    from transformers import utils

    if utils.is_torchaudio_available() and import_torchaudio() is None:
        utils.is_torchaudio_available = utils.import_utils.is_torchaudio_available = lambda: False


def provide_torchaudio() -> str:
    """Make `import torchaudio` in this process give a module that decodes and resamples.

    Returns:
        A description: "torchaudio VERSION", the same "with bestrq2's decoder", or "bestrq2's stand-in".
    """
    real: Any = import_torchaudio()
    if real is None:
        functional = types.ModuleType("torchaudio.functional")
        vars(functional).update(resample=resample)
        _install(functional, VERSION)
        return "bestrq2's stand-in"
    version = f"torchaudio {real.__version__}"
    if _decodes(real):
        return version
    _install(real.functional, real.__version__)
    return f"{version} with bestrq2's decoder"


def load(path: str, *_: Any, **__: Any) -> tuple[Tensor, int]:
    """Decode a whole file: the mean over channels, float32 [1, samples], and its sampling rate in Hz."""
    import numpy as np
    import torch

    from bestrq2.data.audio import open_audio

    with open_audio(path) as decoder:
        return torch.from_numpy(np.ascontiguousarray(decoder.read(0, None))[None]), decoder.rate


def resample(waveform: Tensor, orig_freq: int, new_freq: int, **_: Any) -> Tensor:
    """Resample float [..., samples] from one rate in Hz to another, by soxr."""
    import numpy as np
    import torch

    from bestrq2.data.audio import resampled

    if orig_freq == new_freq:
        return waveform
    rows = waveform.reshape(-1, waveform.shape[-1]).numpy()
    converted = np.stack([resampled(row, orig_freq, new_freq) for row in rows])
    return torch.from_numpy(converted).reshape(*waveform.shape[:-1], -1)


def _decodes(torchaudio: Any) -> bool:
    """Whether it can decode a WAV file."""
    import numpy as np
    import soundfile

    content = io.BytesIO()
    soundfile.write(content, np.array([0.0, 0.5, -0.5]), 16_000, format="WAV", subtype="PCM_16")
    content.seek(0)
    try:
        waveform, rate = torchaudio.load(content)
    except Exception:  # torchcodec is missing or broken, or an older version has no backend
        return False
    return tuple(waveform.shape) == (1, 3) and rate == 16_000


def _install(functional: types.ModuleType, version: str) -> None:
    module = types.ModuleType("torchaudio")
    # transformers looks at the spec to find out which packages there are
    module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None, is_package=True)
    module.__path__ = []
    vars(module).update(load=load, functional=functional, __version__=version)
    sys.modules["torchaudio"] = module
    sys.modules["torchaudio.functional"] = functional
