"""What a score was made with: two models, or one model used in two ways, never share any."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from typing import Any

from bestrq2._version import __version__
from bestrq2.errors import ConfigError
from bestrq2.inference.embedder import Embedder, weights_hash
from bestrq2.inference.readout import layer_indices
from bestrq2.model.configuration_bestrq2 import BestRQ2Config

INSTALL = "the X-ARES harness is not installed: pip install 'bestrq2[xares]'"


@dataclass(frozen=True)
class Extraction:
    """How frames are taken from a model.

    Attributes:
        phases: shifted copies of the patch grid for frame-level tasks.
        clip_phases: the same for clip-level tasks.
        layers: hidden layer or layers, see `Embedder.embed`; None for the model's output.
    """

    phases: int = 2
    clip_phases: int = 1
    layers: int | list[int] | str | None = None

    def check(self, config: BestRQ2Config) -> None:
        """Pass if the model can be used so.

        Raises:
            ConfigError: naming the option.
        """
        for name in ("phases", "clip_phases"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= config.patch_size[1]:
                raise ConfigError(f"{name} must be a whole number from 1 to {config.patch_size[1]}, got {value!r}")
        layer_indices(self.layers, config.num_hidden_layers)


def harness_version() -> str:
    """Version of the installed harness.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.metadata.version("xares")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(INSTALL) from error


def model_identity(embedder: Embedder, extraction: Extraction) -> dict[str, str]:
    """All that frames depend on, as texts: weights, architecture, options, and the versions of the code.

    Raises:
        ConfigError: the harness is not installed.
    """
    config = embedder.config.to_diff_dict()
    for name in ("transformers_version", "architectures", "dtype"):
        config.pop(name, None)
    return {
        "weights_sha256": weights_hash(embedder),
        "architecture_sha256": hashlib.sha256(_canonical(config).encode()).hexdigest(),
        **{name: str(value) for name, value in asdict(extraction).items()},
        "bestrq2": __version__,
        "xares": harness_version(),
    }


def digest(identity: dict[str, str]) -> str:
    """A short name for an identity: 16 hexadecimal digits."""
    return hashlib.blake2b(_canonical(identity).encode(), digest_size=8).hexdigest()


def _canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True, default=str)
