"""Inference: embedding and classification of arrays, files and whole corpora."""
