"""XARES-LLM: an encoder in front of a small language model, trained and scored by the benchmark's own package."""
