"""Difficulty of SoundWorld's tasks for log-mel statistics, and speed of the generator.

    python benchmarks/soundworld_difficulty.py [--tasks speech/word ...] [--train 400] [--test 200] [--seed 0] [--speed]

Clip tasks: StandardScaler + LogisticRegression on the mean and standard deviation over time of 128 log-mel bands, C
chosen on a fifth of the training clips; accuracy. Frame task: the same classifier on every fourth frame (the level of
each band there and its difference from the clip's mean); balanced accuracy.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.fft import rfft
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.audio_utils import mel_filter_bank

from bestrq2 import soundworld
from bestrq2.data.labels import LabelledClips, LabelledTask, soundworld_tasks

WINDOW, HOP = 2048, 625
MEL = mel_filter_bank(WINDOW // 2 + 1, 128, 0.0, 8000.0, soundworld.SAMPLE_RATE, norm=None, mel_scale="htk")


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram in dB, [frames, 128]."""
    padded = np.pad(wave, WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: wave.size // HOP]
    power = np.abs(rfft(windows * np.hanning(WINDOW + 1)[:-1].astype(np.float32), axis=1)) ** 2
    return 10.0 * np.log10(np.maximum(power @ MEL, 1e-10))


def clip_statistics(clips: LabelledClips) -> tuple[np.ndarray, np.ndarray]:
    spectra = [log_mel(wave) for wave in clips.audio]
    return np.stack([np.concatenate((s.mean(axis=0), s.std(axis=0))) for s in spectra]), np.asarray(clips.labels)


def frame_statistics(clips: LabelledClips) -> tuple[np.ndarray, np.ndarray]:
    features, labels = [], []
    for wave, events in zip(clips.audio, clips.labels, strict=True):
        spectrum = log_mel(wave)
        centre = (np.arange(len(spectrum)) + 0.5) * HOP / soundworld.SAMPLE_RATE
        inside = (centre[:, None] >= events[None, :, 0]) & (centre[:, None] < events[None, :, 1])
        features.append(np.concatenate((spectrum, spectrum - spectrum.mean(axis=0)), axis=1)[::4])
        labels.append(inside.any(axis=1).astype(int)[::4])
    return np.concatenate(features), np.concatenate(labels)


def probe(task: LabelledTask) -> float:
    """Test accuracy (balanced for frame tasks) of a linear probe on log-mel statistics."""
    statistics = clip_statistics if task.kind == "clip" else frame_statistics
    (x, y), (test_x, test_y) = statistics(task.train), statistics(task.test)
    score = accuracy_score if task.kind == "clip" else balanced_accuracy_score
    weight = None if task.kind == "clip" else "balanced"

    def fit(c: float, features: np.ndarray, labels: np.ndarray):
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000, class_weight=weight)).fit(
            features, labels
        )

    fit_x, held_x, fit_y, held_y = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    best = max((1e-3, 1e-2, 1e-1, 1.0), key=lambda c: score(held_y, fit(c, fit_x, fit_y).predict(held_x)))
    return float(score(test_y, fit(best, x, y).predict(test_x)))


def print_speed(clips: int = 60) -> None:
    domains = [soundworld.clip_domain(1, index) for index in range(clips)]
    seconds = []
    for index in range(clips):
        began = time.process_time()
        soundworld.clip(1, index)
        seconds.append(time.process_time() - began)
    print(f"\n10 s clips per second of one core ({soundworld.synthesiser()}): all {clips / sum(seconds):.1f}", end="")
    for domain in soundworld.DOMAINS:
        own = [duration for duration, name in zip(seconds, domains, strict=True) if name == domain]
        print(f", {domain} {len(own) / sum(own):.1f}", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=None)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache", type=Path, default=None, help="folder to keep the generated clips in; default: a temporary one"
    )
    parser.add_argument("--speed", action="store_true", help="measure only the speed of generation")
    options = parser.parse_args()
    print_speed()
    if options.speed:
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        tasks = soundworld_tasks(options.tasks, options.train, options.test, options.seed, cache)
        print("\n| task | classes | seconds | chance | log-mel |\n|---|--:|--:|--:|--:|")
        for task in tasks:
            seconds, chance = soundworld.TASKS[task.name].seconds, 1.0 / len(task.classes)
            print(f"| {task.name} | {len(task.classes)} | {seconds:g} | {chance:.3f} | {probe(task):.3f} |", flush=True)


if __name__ == "__main__":
    main()
