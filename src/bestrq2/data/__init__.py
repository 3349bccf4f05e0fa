"""From a --data argument to batches: decoding, sources, order, batches, and labels; preparation of corpora."""
