"""Evaluation of embeddings: probes, frozen benchmarks, X-ARES, XARES-LLM and HEAR, with one format of results."""
