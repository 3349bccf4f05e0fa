"""SoundWorld: a deterministic generator of varied 16 kHz audio and labelled tasks, for demo, tests and experiments.

Speech, music and everyday sounds are synthesised, put into rooms and recorded with noise. It yields
waveforms and labels, or writes them as files, and imports nothing of `bestrq2.data`.
"""

from bestrq2.soundworld.acoustics import SAMPLE_RATE
from bestrq2.soundworld.clips import DOMAINS, TASKS, TaskSpec, clip, clip_domain
from bestrq2.soundworld.corpus import VERSION, Split, Waveforms, generated_tasks, unlabelled
from bestrq2.soundworld.export import write_corpus
from bestrq2.soundworld.speech import synthesiser

__all__ = [
    "DOMAINS",
    "SAMPLE_RATE",
    "TASKS",
    "VERSION",
    "Split",
    "TaskSpec",
    "Waveforms",
    "clip",
    "clip_domain",
    "generated_tasks",
    "synthesiser",
    "unlabelled",
    "write_corpus",
]
