"""Readout of a model as options of functions and commands choose it."""

from __future__ import annotations

from bestrq2.errors import ConfigError
from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.model.modeling_bestrq2 import BestRQ2Model
from bestrq2.model.readout import Layers, Readout


def choose_readout(
    config: BestRQ2Config, layers: Layers | None = None, frequency: str | None = None, pooling: str | None = None
) -> Readout:
    """The readout of a model, with the options that are not None in place of its own; see `Readout`.

    Raises:
        ConfigError: unknown option, or the encoder has no such layer.
    """
    try:
        return Readout.of(config, layers, frequency, pooling)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def set_readout(
    model: BestRQ2Model, layers: Layers | None = None, frequency: str | None = None, pooling: str | None = None
) -> None:
    """Give a model the readout of `choose_readout`, which it keeps when it is saved."""
    model.set_readout(**choose_readout(model.config, layers, frequency, pooling).settings())
