"""torchaudio where it is installed but cannot be loaded.

A wheel built for another torch, such as the one that the X-ARES harness brings beside a CPU build, fails with OSError.
transformers takes an installed package for a working one, and its audio classes cannot be imported then.
"""

from __future__ import annotations

import sys
from types import ModuleType


def import_torchaudio() -> ModuleType | None:
    """The installed torchaudio; None where there is none that can be imported."""
    try:
        import torchaudio
    except Exception:  # a missing native part shows as OSError, ImportError or RuntimeError
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        return None
    module: ModuleType = torchaudio
    return module


def hide_broken_torchaudio() -> None:
    """Let transformers do without a torchaudio that cannot be imported; nothing on disk changes."""
    from transformers import utils

    if utils.is_torchaudio_available() and import_torchaudio() is None:
        utils.is_torchaudio_available = utils.import_utils.is_torchaudio_available = lambda: False
