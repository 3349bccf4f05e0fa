"""`bestrq2 explore`: a local page to see, hear and search an embedded corpus."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bestrq2 import flags
from bestrq2.errors import ConfigError
from bestrq2.progress import starting


def explore(
    embeddings: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    labels: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
) -> None:
    """Serve a local page on which an embedded corpus is a map to hear and to search, until Ctrl-C.

    Select a region and hear it; drop, record or choose a sound and get its nearest recordings, and where in them it
    is; list near-duplicates and outliers; export selections as a CSV file that `finetune` and `probe` take. Needs
    gradio: pip install 'bestrq2[explore]'.

    Args:
        embeddings: Parquet file of `bestrq2 embed`; the recordings are read where it names them.
        model: the model that made the embeddings, for searches by a sound; by default the name in the file, which is
            enough for the encoder of the package.
        labels: table (.csv, .tsv, .jsonl) with path and label, such as the result of `bestrq2 predict`, to colour the
            map by; by default the labels of the list that was embedded.
        host: address to listen at; any other than 127.0.0.1 lets other machines play the recordings.
        port: port to listen at; 0 for any that is free.
        device: device of the model, such as "cpu" or "cuda:0"; CUDA by default where available.

    Raises:
        BestRQ2Error: with one sentence that says what to change.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("explore needs gradio: pip install 'bestrq2[explore]'")
    with ExitStack() as stack:
        with starting("explore") as progress:
            from bestrq2.inference.embedder import load
            from bestrq2.search.explorer import Explorer
            from bestrq2.search.page import listening, serve
            from bestrq2.search.table import EmbeddingTable

            progress.show(details="laying out the map")
            table = EmbeddingTable(embeddings, labels)
            listener = stack.enter_context(listening(host, port))  # first: the layout takes longer
            explorer = Explorer(table, lambda: load(os.fspath(model or table.model), device))
        serve(explorer, listener, ready=lambda url: print(f"{url} (Ctrl-C ends it)", flush=True))


def main(argv: Sequence[str]) -> None:
    """Run `bestrq2 explore`."""
    explore(**flags.parse_command(explore, argv, positional=("embeddings",)))
