"""The tasks of X-ARES under the names its harness gives them, and which of them the published averages count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Method = Literal["mlp", "knn"]
Domain = Literal["speech", "music", "environment"]

METHODS: tuple[Method, ...] = ("mlp", "knn")
METHOD_TITLES: Mapping[str, str] = MappingProxyType({"mlp": "linear probe", "knn": "k-NN"})
DOMAINS: tuple[Domain, ...] = ("speech", "music", "environment")


@dataclass(frozen=True)
class PublicTask:
    """One task of X-ARES.

    Attributes:
        name: the harness's `TaskConfig.name`; also the folder of its data.
        title: its name in tables.
        domain: as the model cards count it.
        paper_domain: as the paper counts it; they differ for Vocal Imitation only.
        methods: those the harness scores.
        metric: the harness's name of it; scores are in 0..1, higher is better.
        entries: whether its scores are among the 37 entries of the model cards.
        paper: whether it is among the 21 datasets of the paper.
        private: whether its data were never published.
    """

    name: str
    title: str
    domain: Domain
    paper_domain: Domain
    methods: tuple[Method, ...]
    metric: str = "accuracy"
    entries: bool = True
    paper: bool = True
    private: bool = False


_BOTH: tuple[Method, ...] = ("mlp", "knn")
_MLP: tuple[Method, ...] = ("mlp",)


def _speech(name: str, title: str) -> PublicTask:
    return PublicTask(name, title, "speech", "speech", _BOTH)


def _music(name: str, title: str, methods: tuple[Method, ...] = _BOTH, metric: str = "accuracy") -> PublicTask:
    return PublicTask(name, title, "music", "music", methods, metric)


def _environment(name: str, title: str, methods: tuple[Method, ...] = _BOTH, metric: str = "accuracy") -> PublicTask:
    return PublicTask(name, title, "environment", "environment", methods, metric)


def _private(name: str, title: str, methods: tuple[Method, ...] = _BOTH) -> PublicTask:
    return PublicTask(name, title, "environment", "environment", methods, entries=False, paper=False, private=True)


# xares 0.1.3, src/tasks/*.py. "nsynthinstument" is spelt so there.
TASKS: Mapping[str, PublicTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            _speech("asvspoof2015", "ASV2015"),
            _speech("cremad", "CREMA-D"),
            _speech("fluentspeechcommands", "Fluent Speech Commands"),
            _speech("libricount", "LibriCount"),
            _speech("librispeechmalefemale", "LibriSpeech-MF"),
            _speech("ravdess", "RAVDESS"),
            _speech("speechcommandsv1", "Speech Commands"),
            PublicTask("vocalimitations", "Vocal Imitation", "speech", "environment", _BOTH),
            _speech("vocalsound", "VocalSound"),
            _speech("voxceleb1", "VoxCeleb1"),
            _speech("voxlingua33", "VoxLingua33"),
            PublicTask(
                "librispeech", "LibriSpeech-ASR", "speech", "speech", _MLP, "WER_inv", entries=False, paper=False
            ),
            _music("freemusicarchive", "FMA"),
            _music("gtzan_genre", "GTZAN"),
            _music("maestro", "MAESTRO", _MLP, "segmentf1_micro"),
            _music("nsynthinstument", "NSynth"),
            _environment("clotho", "Clotho", _MLP, "recallatk_r1"),
            _environment("desed", "DESED", _MLP, "segmentf1_macro"),
            _environment("esc50", "ESC-50"),
            _environment("fsd50k", "FSD50k", _MLP, "mAP"),
            _environment("fsdkaggle2018", "FSD18-Kaggle", _MLP),
            _environment("urbansound8k", "UrbanSound8k"),
            _private("finger_snap", "Finger snap sound"),
            _private("inside_outside_car", "Inside/outside car"),
            _private("key_scratching", "Key scratching car"),
            _private("liveenv", "LiveEnv sounds", _MLP),
            _private("subway_broadcast", "Subway broadcast"),
        )
    }
)
