"""A plain formant synthesiser that speaks where espeak-ng is not installed.

Letters become vowels and consonants; vowels are glottal pulses under three moving resonances, consonants are silence,
hum or shaped noise. It cannot be understood, but words, voices and languages differ audibly and consistently.
"""

from __future__ import annotations

import unicodedata

import numpy as np
from scipy.fft import irfft, rfft
from scipy.signal import lfilter

from bestrq2.soundworld.acoustics import SAMPLE_RATE

_FRAME = 80  # samples, 5 ms: the grid on which the vocal tract moves

# first three formants in Hz of an average speaker
_VOWELS: dict[str, tuple[float, float, float]] = {
    "a": (750.0, 1250.0, 2500.0),
    "e": (480.0, 1950.0, 2600.0),
    "i": (290.0, 2300.0, 3000.0),
    "o": (470.0, 850.0, 2450.0),
    "u": (310.0, 750.0, 2300.0),
    "y": (290.0, 1850.0, 2250.0),
}
# centre of the noise in Hz, share of noise, share of voicing, seconds
_CONSONANTS: dict[str, tuple[float, float, float, float]] = {
    "s": (6000.0, 0.8, 0.0, 0.10), "z": (5500.0, 0.5, 0.4, 0.08), "c": (3500.0, 0.8, 0.0, 0.09),
    "f": (4500.0, 0.3, 0.0, 0.08), "v": (4000.0, 0.2, 0.4, 0.06), "h": (1500.0, 0.3, 0.0, 0.06),
    "x": (2200.0, 0.5, 0.0, 0.08), "m": (300.0, 0.0, 0.5, 0.07), "n": (400.0, 0.0, 0.5, 0.06),
    "l": (500.0, 0.0, 0.7, 0.05), "r": (600.0, 0.1, 0.6, 0.05), "w": (400.0, 0.0, 0.7, 0.05),
    "j": (450.0, 0.0, 0.7, 0.05), "p": (900.0, 0.5, 0.0, 0.07), "t": (4200.0, 0.6, 0.0, 0.07),
    "k": (2000.0, 0.6, 0.0, 0.08), "q": (1600.0, 0.6, 0.0, 0.08), "b": (800.0, 0.3, 0.3, 0.06),
    "d": (3500.0, 0.3, 0.3, 0.06), "g": (1800.0, 0.3, 0.3, 0.06),
}  # fmt: skip


def _sounds(text: str, language: str) -> list[str]:
    """Spell a text with the sounds known here: letters without accents, other scripts by code point, " " a pause."""
    shift = sum(language.encode())  # gives each language its own accent on foreign scripts
    known = "".join(_VOWELS) + "".join(_CONSONANTS)
    sounds: list[str] = []
    for letter in unicodedata.normalize("NFD", text.lower()):
        if letter in known:
            sounds.append(letter)
        elif letter in ".,?" or letter == " ":
            sounds.append(" ")
        elif ord(letter) > 0x0370 and not unicodedata.combining(letter):
            sounds.append("bdghklmnprstvz"[(ord(letter) + shift) % 14])
            sounds.append("aeiouy"[(ord(letter) // 3) % 6])
    return sounds


def _tracks(sounds: list[str], rate: float, language: str) -> np.ndarray:
    """Control values [frames, 6]: three formants in Hz, voicing, noise, centre of the noise in Hz."""
    shift = sum(language.encode())
    vowel_seconds = (0.09 + 0.01 * (shift % 5)) / rate
    rows: list[np.ndarray] = []
    formants = np.array(_VOWELS["e"])
    for sound in sounds:
        if sound in _VOWELS:
            # every language pronounces its vowels a little differently
            formants = np.array(_VOWELS[sound]) * (1.0 + 0.12 * np.sin(shift * np.array([1.0, 2.0, 3.0]) + ord(sound)))
            row, seconds = np.array([*formants, 1.0, 0.0, 2000.0]), vowel_seconds
        elif sound in _CONSONANTS:
            centre, noise, voicing, seconds = _CONSONANTS[sound]
            row, seconds = np.array([*formants, voicing, noise, centre]), seconds / rate
        else:
            row, seconds = np.array([*formants, 0.0, 0.0, 2000.0]), 0.04 / rate
        rows.append(np.repeat(row[None], max(int(seconds * SAMPLE_RATE / _FRAME), 2), axis=0))
    if not rows:
        return np.zeros((0, 6))
    controls = np.concatenate(rows)
    # Tracks glide over about 35 ms, as lips and tongue do.
    kernel = np.hanning(9)[1:-1] / np.hanning(9).sum()
    padded = np.pad(controls, ((3, 3), (0, 0)), mode="edge")
    return np.stack([np.convolve(padded[:, column], kernel, mode="valid") for column in range(6)], axis=1)


def _resonate(source: np.ndarray, controls: np.ndarray, tract: float) -> np.ndarray:
    """Send a source [samples] through the moving resonances, window by window."""
    hop, window, size = 2 * _FRAME, 4 * _FRAME, 512
    steps = source.size // hop + 1
    padded = np.pad(source, (hop, 2 * window))
    taper = np.hanning(window + 1)[:-1]  # half-overlapping Hann windows sum to one
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[: steps * hop : hop] * taper
    frequencies = np.arange(size // 2 + 1) * SAMPLE_RATE / size
    rows = controls[np.minimum(np.arange(steps) * 2, len(controls) - 1)]
    gain = np.full((steps, frequencies.size), 0.01)
    for column, (width, weight) in enumerate(((90.0, 1.0), (110.0, 0.6), (160.0, 0.35))):
        gain += weight / (1.0 + ((frequencies - rows[:, column : column + 1] * tract) / width) ** 2)
    filtered = irfft(rfft(pieces, size, axis=1) * (gain * rows[:, 3:4]), size, axis=1)
    total = np.zeros(padded.size + size)
    for step in range(steps):
        total[step * hop : step * hop + size] += filtered[step]
    return total[hop : hop + source.size]


def speak(
    rng: np.random.Generator,
    text: str,
    language: str,
    fundamental: float,
    tract: float,
    breath: float,
    rate: float,
) -> np.ndarray:
    """Speak a text.

    Args:
        rng: source of randomness (intonation and noise).
        text: words; letters decide the sounds.
        language: code that colours vowels and timing.
        fundamental: Hz.
        tract: factor on the formants.
        breath: 0 (voiced) to 1 (whispered).
        rate: speed relative to the usual one.

    Returns:
        float64 [samples] at 16 kHz.
    """
    controls = _tracks(_sounds(text, language), rate, language)
    samples = len(controls) * _FRAME
    if samples == 0:
        return np.zeros(0)
    steps = max(samples // 3200, 2)
    # Pitch wanders and falls over the utterance by a quarter of an octave.
    accents = 2 ** (rng.normal(0.0, 0.12, steps + 1) + np.linspace(0.12, -0.12, steps + 1))
    contour = fundamental * np.interp(np.linspace(0, steps, samples), np.arange(steps + 1), accents)
    phase = 2 * np.pi * np.cumsum(contour) / SAMPLE_RATE
    pulses = np.zeros(samples)
    # One pulse each time the phase completes a turn.
    turns = np.floor(phase / (2 * np.pi))
    pulses[1:] = np.diff(turns) * np.sqrt(SAMPLE_RATE / fundamental)
    glottis = lfilter([0.3], [1.0, -0.7], pulses)
    hiss = rng.standard_normal(samples)
    voiced = _resonate(glottis * (1.0 - 0.9 * breath) + 0.4 * breath * hiss, controls, tract)
    at, frames = np.arange(samples) / _FRAME, np.arange(len(controls))
    low = lfilter([0.35], [1.0, -0.65], hiss)
    bright = np.interp(at, frames, np.clip(controls[:, 5] / 5000.0, 0.0, 1.0))
    noise = (bright * (hiss - low) + (1.0 - bright) * low) * np.interp(at, frames, controls[:, 4])
    return voiced + 0.25 * noise
