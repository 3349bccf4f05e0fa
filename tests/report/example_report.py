"""A report with the structure of a real one: curves that fall, audio one can hear, clustered embeddings."""

from __future__ import annotations

import itertools

import numpy as np

from bestrq2.evaluate.result import TaskScore
from bestrq2.report.curves import RunCurves
from bestrq2.report.embeddings import EmbeddedClip
from bestrq2.report.page import ReportContents
from bestrq2.report.patches import MaskExample
from published_models import published_result

TASKS = {
    "speech": {
        "language": ["German", "English", "Spanish", "Finnish", "French", "Hindi", "Italian", "Polish", "Turkish"],
        "voice": ["voice 1", "voice 2", "voice 3", "voice 4"],
        "spoken word": ["yes", "no", "seven", "window"],
        "number of speakers": ["1", "2", "3"],
    },
    "music": {
        "instrument": ["bowed string", "organ", "plucked string", "flute"],
        "chord quality": ["major", "minor", "diminished", "augmented"],
        "key": ["C", "D", "E", "F"],
        "tempo class": ["slow", "middle", "fast"],
    },
    "environment": {
        "event class": ["rain", "wind", "siren", "bell", "knock", "footsteps", "bird", "crackle", "water", "alarm"],
        "number of events": ["0", "1", "2", "3"],
        "signal-to-noise class": ["near", "middle", "far"],
    },
}
FEATURES = {
    "two steps": 0.16,
    "one stage": 0.14,
    "random-initialised encoder": 0.0,
    "log-mel mean + std": 0.1,
}
SAMPLING_RATE = 16_000


def tone(frequency: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Three harmonics in short notes, some noise: int16 [S]."""
    time = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    notes = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * 1.5 * time + rng.uniform(0, 6)))
    wave = sum(np.sin(2 * np.pi * frequency * k * time) / k for k in (1, 2, 3)) * notes * np.exp(-(time % 0.7) * 3)
    return (6000 * wave + 200 * rng.standard_normal(len(time))).astype(np.int16)


def log_mel_of(samples: np.ndarray, mel: int = 128, frames: int = 256) -> np.ndarray:
    """A rough log-mel picture [mel, frames] in dB, good enough to look at."""
    starts = np.linspace(0, len(samples) - 2048, frames).astype(int)
    spectra = np.abs(np.fft.rfft(np.stack([samples[s : s + 2048] for s in starts]) * np.hanning(2048), axis=1)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), mel + 1) / 2595) - 1) / 7.8125
    bands = [spectra[:, int(a) : max(int(b), int(a) + 1)].mean(axis=1) for a, b in itertools.pairwise(edges)]
    return 10 * np.log10(np.stack(bands) / 1e9 + 1e-6)


def example_run(name: str, label: str, speed: float, seed: int, steps: int = 3000) -> RunCurves:
    rng = np.random.default_rng(seed)
    train, check = np.arange(5, steps + 1, 5), np.arange(250, steps + 1, 250)

    def falling(at: np.ndarray, noise: float) -> np.ndarray:
        return 3.6 + 4.0 * np.exp(-at * speed / 900) + noise * rng.standard_normal(len(at))

    curves = {}
    for split, at, noise in (("train", train, 0.12), ("validation", check, 0.02)):
        loss = falling(at, noise)
        entropy = 5.4 + 0.03 * rng.standard_normal(len(at))
        curves |= {
            f"{split}/loss": (at, loss),
            f"{split}/excess_loss": (at, loss - entropy),
            f"{split}/accuracy": (at, np.clip(0.36 - 0.045 * loss, 0.001, 1)),
            f"{split}/code_perplexity": (at, np.exp(entropy)),
            f"{split}/code_coverage": (at, np.clip(0.41 + 0.01 * rng.standard_normal(len(at)), 0, 1)),
            f"{split}/top_code_share": (at, np.clip(0.06 + 0.008 * rng.standard_normal(len(at)), 0, 1)),
            f"{split}/target_entropy": (at, entropy),
        }
    for domain, best in (("speech", 0.5), ("music", 0.55), ("environment", 0.6)):
        curves[f"probe/{domain}"] = (check, best - 0.3 * np.exp(-check * speed / 700))
    curves["train/learning_rate"] = (train, 1e-3 * np.minimum(train / 150, 0.5 + 0.5 * np.cos(np.pi * train / steps)))
    facts = {"objective": label, "parameters": "1.24 M", "training compute": "2.1 TFLOP", "wall time": "2 min 51 s"}
    return RunCurves(name, label, facts, curves)


def example_mask(title: str, seed: int, rows: int = 8, columns: int = 16) -> MaskExample:
    rng = np.random.default_rng(seed)
    picture = log_mel_of(tone(180 * (seed + 1), 10, rng), frames=257)
    level = picture[:, :256].reshape(rows, 128 // rows, columns, 256 // columns).mean(axis=(1, 3))
    true = (np.argsort(np.argsort(level.ravel())) // 3 * 7).reshape(rows, columns) % 512
    hidden = np.zeros(rows * columns, dtype=bool)
    hidden[rng.permutation(rows * columns)[: rows * columns // 2]] = True
    predicted = np.where(rng.random((rows, columns)) < 0.4, true, (true + 31) % 512)
    return MaskExample(
        title, picture, (128 // rows, 256 // columns), hidden.reshape(rows, columns), true, predicted, 10.03
    )


def example_probes() -> list[TaskScore]:
    rng = np.random.default_rng(3)
    scores = []
    for domain, tasks in TASKS.items():
        for task, labels in tasks.items():
            for features, lead in FEATURES.items():
                for method, cost in (("linear", 0.0), ("knn", 0.08)):
                    score = min(0.97, 1 / len(labels) + 0.2 + lead - cost + 0.06 * rng.standard_normal())
                    half = 1.96 * (score * (1 - score) / 400) ** 0.5
                    ends = score - half, score + half
                    name, chance = f"{domain}/{task}", 1 / len(labels)
                    scores.append(TaskScore(features, name, method, "accuracy", score, *ends, chance, 200, domain))
    return scores


def example_clips(per_label: int = 6, seconds: float = 5.0) -> list[EmbeddedClip]:
    rng = np.random.default_rng(5)
    clips = []
    for domain, tasks in TASKS.items():
        of_domain = 1.2 * rng.standard_normal(48)
        for task, labels in tasks.items():
            of_task = 0.9 * rng.standard_normal(48)
            for number, label in enumerate(labels):
                centre = of_domain + of_task + 0.9 * rng.standard_normal(48)
                for _ in range(per_label):
                    samples = tone(110 * 2 ** (number / 3), seconds, rng)
                    vector = centre + 1.6 * rng.standard_normal(48)
                    clips.append(EmbeddedClip(vector, domain, f"{domain}/{task}", label, samples, SAMPLING_RATE))
    return clips


def example_contents(per_label: int = 6) -> ReportContents:
    runs = [example_run("two-step", "two steps", 1.0, 0), example_run("one-stage", "one stage", 1.3, 1)]
    return ReportContents(
        title="BEST-RQ-2 on SoundWorld",
        lead="Two tiny encoders learnt from 1,500 unlabelled clips of synthetic speech, music and environmental sound, "
        "4.2 hours in all, on two CPU cores under equal training compute. One only ever sees the visible patches, the "
        "other sees mask tokens in their place.",
        facts={
            "recipe": "demo",
            "audio": "SoundWorld, 1,500 clips of 10 s",
            "patches": "16 mel × 16 frames, 625 ms",
            "codebook": "512 codes",
            "batch": "32 clips",
            "hardware": "2 CPU cores",
            "seed": "0",
        },
        runs=runs,
        examples=[example_mask("Speech: Finnish, voice 3", 0), example_mask("Music: organ, C minor", 2)],
        probes=example_probes(),
        xares=published_result("Dasheng", name="two steps"),
        clips=example_clips(per_label),
        notes=[
            "Probes: logistic regression on mean-pooled frozen features, k-NN with k = 10; intervals by bootstrap.",
            "Made by `bestrq2 demo` with seed 0.",
        ],
    )
