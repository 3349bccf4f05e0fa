"""SoundWorld: a deterministic generator of varied 16 kHz audio and labelled tasks, for demo, tests and experiments."""

from bestrq2.soundworld.acoustics import SAMPLE_RATE
from bestrq2.soundworld.corpus import VERSION, Split, Waveforms, generated_tasks, unlabelled
from bestrq2.soundworld.export import write_corpus
from bestrq2.soundworld.scenes import DOMAINS, clip, clip_domain
from bestrq2.soundworld.speech import synthesiser
from bestrq2.soundworld.task_specs import TASKS, TaskSpec

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
