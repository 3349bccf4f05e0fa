"""Music: melodies, chords, bass lines and drums in keys and tempi, played by the instruments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bestrq2.seeding import pick
from bestrq2.soundworld.acoustics import SAMPLE_RATE, fade, normalise, place
from bestrq2.soundworld.instruments import INSTRUMENTS, Touch, drum, random_touch

SCALES: dict[str, tuple[int, ...]] = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "pentatonic": (0, 2, 4, 7, 9),
    "blues": (0, 3, 5, 6, 7, 10),
}
CHORDS: dict[str, tuple[int, ...]] = {
    "major": (0, 4, 7),
    "minor": (0, 3, 7),
    "diminished": (0, 3, 6),
    "augmented": (0, 4, 8),
    "suspended": (0, 5, 7),
    "seventh": (0, 4, 7, 10),
}
ROOTS: tuple[str, ...] = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
TEMPI: tuple[int, ...] = (60, 78, 101, 131, 170, 221)  # beats per minute, a factor of 1.3 apart
CONTOURS: tuple[str, ...] = ("rising", "falling", "arch", "valley", "trill", "leap")


@dataclass(frozen=True)
class Note:
    """One note: start and duration in seconds, pitch as MIDI number, loudness 0 to 1."""

    start: float
    duration: float
    pitch: float
    loudness: float = 1.0


def play(rng: np.random.Generator, notes: Sequence[Note], instrument: str, seconds: float, touch: Touch) -> np.ndarray:
    """Play notes on an instrument.

    Args:
        rng: source of randomness (noise within notes).
        notes: the notes; those past the end are cut.
        instrument: one of `INSTRUMENTS`.
        seconds: length of the result.
        touch: construction of the instrument and manner of playing.

    Returns:
        float64 [samples] at 16 kHz, active level 0.1.
    """
    synthesis = INSTRUMENTS[instrument][0]
    total = np.zeros(round(seconds * SAMPLE_RATE))
    for note in notes:
        # MIDI note 69 is A4, 440 Hz.
        frequency = 440.0 * 2.0 ** ((note.pitch - 69.0) / 12.0)
        duration = min(note.duration, seconds - note.start)
        if duration > 0.01:
            wave = synthesis(rng, frequency, duration, touch)
            place(total, wave * note.loudness, round(note.start * SAMPLE_RATE))
    return normalise(total)


def scale_pitch(root: int, scale: tuple[int, ...], degree: int) -> int:
    """MIDI number of a scale degree (0 is the root, may be negative or beyond an octave)."""
    octave, step = divmod(degree, len(scale))
    return root + 12 * octave + scale[step]


def random_root(rng: np.random.Generator, instrument: str, span: int = 12) -> int:
    """Draw a MIDI note from which `span` semitones upwards are still in the instrument's usual range."""
    _, lowest, highest = INSTRUMENTS[instrument]
    return int(rng.integers(lowest, max(highest - span, lowest) + 1))


def melody(rng: np.random.Generator, root: int, scale: tuple[int, ...], beat: float, seconds: float) -> list[Note]:
    """Draw a melody that walks along a scale in notes of half to two beats, with rests.

    Args:
        rng: source of randomness.
        root: MIDI number of the key's root.
        scale: semitones above the root.
        beat: seconds.
        seconds: where the melody ends.
    """
    notes, degree, now = [], int(rng.integers(0, 8)), 0.0
    while now < seconds:
        length = beat * pick(rng, (0.5, 0.5, 1.0, 1.0, 2.0))
        if rng.random() > 0.12:
            held = length * float(rng.uniform(0.7, 1.05))
            notes.append(Note(now, held, scale_pitch(root, scale, degree), float(rng.uniform(0.6, 1.0))))
        degree = int(np.clip(degree + rng.integers(-2, 3), -2, 9))
        now += length
    return notes


def chords(
    rng: np.random.Generator, root: int, scale: tuple[int, ...], beat: float, seconds: float
) -> tuple[list[Note], list[Note]]:
    """Draw a chord progression of a key and the bass line under it: (chord notes, bass notes)."""
    upper, lower = [], []
    progression = [int(rng.integers(0, len(scale))) for _ in range(4)]
    arpeggio = rng.random() < 0.4
    length = beat * pick(rng, (2, 4))
    for bar in range(int(np.ceil(seconds / length))):
        degree, now = progression[bar % 4], bar * length
        for voice in range(3):
            delay = voice * length / 4 if arpeggio else 0.0
            pitch = scale_pitch(root, scale, degree + 2 * voice)
            upper.append(Note(now + delay, (length - delay) * 0.95, pitch, 0.8))
        lower.append(Note(now, length * 0.45, scale_pitch(root, scale, degree)))
        lower.append(Note(now + length / 2, length * 0.45, scale_pitch(root, scale, degree)))
    return upper, lower


def drums(rng: np.random.Generator, beat: float, seconds: float) -> np.ndarray:
    """Draw a one-bar pattern of kick, snare and hat and repeat it: float64 [samples], active level 0.1."""
    total = np.zeros(round(seconds * SAMPLE_RATE))
    touch = random_touch(rng)
    strokes = {kind: drum(rng, kind, touch) for kind in ("kick", "snare", "hat", "tom")}
    pattern = [(step, "hat") for step in range(0, 8, pick(rng, (1, 2)))] + [(0, "kick"), (2, "snare"), (6, "snare")]
    pattern += [(int(rng.integers(0, 8)), pick(rng, ("kick", "snare", "tom"))) for _ in range(int(rng.integers(0, 4)))]
    for bar in range(int(np.ceil(seconds / (4 * beat)))):
        for step, kind in pattern:
            start = (4 * bar + step / 2) * beat
            place(total, strokes[kind] * rng.uniform(0.7, 1.0), round(start * SAMPLE_RATE))
    return normalise(total)


def piece(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Draw a piece: a solo, or any of melody, chords, bass and drums together.

    Returns:
        float64 [samples] at 16 kHz, active level 0.1.
    """
    beat = 60.0 / float(np.exp(rng.uniform(np.log(55.0), np.log(230.0))))
    scale = SCALES[pick(rng, tuple(SCALES))]
    total = np.zeros(round(seconds * SAMPLE_RATE))
    layers = set(pick(rng, (("melody",), ("chords",), ("melody", "chords"), ("melody", "drums"), ("drums",),
                            ("melody", "bass"), ("melody", "chords", "bass", "drums"))))  # fmt: skip
    key = int(rng.integers(0, 12))
    if "melody" in layers:
        lead = pick(rng, tuple(INSTRUMENTS))
        root = random_root(rng, lead, 14)
        root += (key - root) % 12 - (12 if (key - root) % 12 > 6 else 0)
        total += play(rng, melody(rng, root, scale, beat, seconds), lead, seconds, random_touch(rng))
    upper, lower = chords(rng, 48 + key, scale, beat, seconds)
    if "chords" in layers:
        backing = pick(rng, ("guitar", "piano", "organ", "pad", "violin", "brass", "choir", "marimba"))
        total += rng.uniform(0.4, 1.0) * play(rng, upper, backing, seconds, random_touch(rng))
    if "bass" in layers:
        total += rng.uniform(0.4, 0.9) * play(rng, lower, "bass", seconds, random_touch(rng))
    if "drums" in layers:
        total += rng.uniform(0.4, 1.0) * drums(rng, beat, seconds)
    return normalise(fade(total))


def contour_degrees(contour: str, rng: np.random.Generator) -> list[int]:
    """Scale degrees of seven notes whose order has the named shape; every shape uses about the same pitches."""
    step = int(rng.integers(1, 3))
    shapes = {
        "rising": [0, 1, 2, 3, 4, 5, 6],
        "falling": [6, 5, 4, 3, 2, 1, 0],
        "arch": [0, 2, 4, 6, 5, 3, 1],
        "valley": [6, 4, 2, 0, 1, 3, 5],
        "trill": [0, 6, 1, 5, 2, 4, 3],
        "leap": [3, 4, 5, 6, 0, 1, 2],
    }
    return [degree * step for degree in shapes[contour]]
