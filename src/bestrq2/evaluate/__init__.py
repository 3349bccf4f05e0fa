"""Evaluation of embeddings: probes, frozen benchmarks, X-ARES, XARES-LLM, HEAR and MTEB, with one format of results."""
