"""What embeddings are made from and how: the options, and the record that every part and the result carry."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from bestrq2._version import __version__
from bestrq2.data.prepare.cutting import printable
from bestrq2.data.remote import StreamSource
from bestrq2.inference.corpus.tasks import AnySource
from bestrq2.inference.embedder import Embedder, weights_hash


@dataclass(frozen=True)
class EmbedOptions:
    """What to write of each recording.

    Attributes:
        frames: one row a frame, instead of one a recording.
        phases: shifted copies of the patch grid.
        layers, pooling, normalize: see `Embedder.embed`.
    """

    frames: bool = False
    phases: int = 1
    layers: int | list[int] | str | None = None
    pooling: str = "mean"
    normalize: bool = False

    def keywords(self) -> dict[str, Any]:
        """Those options that `Embedder.embed` takes, by its names."""
        return {name: value for name, value in vars(self).items() if name != "frames"}


def identity(source: AnySource, embedder: Embedder, options: EmbedOptions) -> dict[str, str]:
    """What a result is made from, all as texts: version, model, options, and the source with a hash of its names."""
    names = iter(source.urls) if isinstance(source, StreamSource) else source.names()
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(os.fsencode(name) + b"\n")
    return {
        "bestrq2": __version__,
        "model": embedder.name,
        "weights_sha256": weights_hash(embedder),
        "source": printable(source.name),
        "source_names_blake2b": digest.hexdigest(),
        "rows": "frames" if options.frames else "clips",
        **{name: str(value) for name, value in options.keywords().items()},
    }
