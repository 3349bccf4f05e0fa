"""Shards: audio in WebDataset tars on a local disk, read at random through an index and a memory map."""
