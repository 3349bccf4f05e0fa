"""`bestrq2 search`: the recordings of an embedded corpus that are most like a sound."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bestrq2 import flags
from bestrq2.errors import ConfigError
from bestrq2.progress import starting
from bestrq2.text import csv_cell

if TYPE_CHECKING:
    from bestrq2.search.table import Hit


def search_embeddings(
    model: str | os.PathLike[str],
    embeddings: Path,
    sound: Path,
    top: int = 10,
    places: bool = True,
    device: str | None = None,
) -> list[Hit]:
    """Find the recordings of an embedded corpus that are most like a sound, and where in them.

    Similarity is the cosine of two embeddings after the mean of the corpus was subtracted: 1 for the same recording,
    around 0 for unrelated ones. Up to a million recordings are compared one by one, without an index.

    Args:
        model: the model that the corpus was embedded with, named as for `bestrq2 embed`.
        embeddings: Parquet file of `bestrq2 embed`. Of one with --frames, recordings are ranked by the stretch, as long
            as the sound, that is most like it; otherwise as wholes.
        sound: audio file to search for.
        top: number of recordings.
        places: tell which stretch of each recording is most like the sound (seconds). Unless EMBEDDINGS has frames, the
            recordings found are embedded again for that, as many as half an hour of audio holds.
        device: device to run on, such as "cpu" or "cuda:0"; CUDA by default where available.

    Returns:
        Recordings with similarity and place, most similar first.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    if top < 1:
        raise ConfigError(f"top is {top}; it must be at least 1")
    with starting("search") as progress:
        from bestrq2.data.audio import open_audio
        from bestrq2.inference.embedder import load
        from bestrq2.search.table import EmbeddingTable

        progress.show()
        table = EmbeddingTable(embeddings)
        with open_audio(sound):  # loading the model takes longer
            pass
        return table.search(load(model, device), sound, count=top, places=places)


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 search`."""
    words = ("model", "embeddings", "sound")
    hits = search_embeddings(**flags.parse_command(search_embeddings, argv, name="search", positional=words))
    print("similarity  from (s)    to (s)  recording")
    for hit in hits:
        start, stop = ("-", "-") if hit.place is None else (f"{hit.place.start:.2f}", f"{hit.place.stop:.2f}")
        print(f"{hit.similarity:10.3f}  {start:>8}  {stop:>8}  {csv_cell(hit.path)}")
