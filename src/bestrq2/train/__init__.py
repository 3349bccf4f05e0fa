"""Pretraining: from a source of audio to a run folder."""
