"""Embedding a corpus: any source in, one Parquet file out, by one process, several, or a Ray cluster."""
