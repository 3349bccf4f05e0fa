"""Embedding of arrays, files and whole corpora."""
