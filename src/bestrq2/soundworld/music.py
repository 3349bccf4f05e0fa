"""Music: instruments of different synthesis, and melodies, chords, bass lines and drums in keys and tempi for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter

from bestrq2.seeding import pick
from bestrq2.soundworld.acoustics import SAMPLE_RATE, fade, normalise, place


@dataclass(frozen=True)
class Touch:
    """How an instrument is built and played throughout one piece.

    Attributes:
        bright: 0 (dull) to 1 (bright).
        attack: factor on the usual attack time.
        sustain: factor on the usual decay time.
        vibrato: factor on the usual vibrato depth.
    """

    bright: float
    attack: float
    sustain: float
    vibrato: float


def random_touch(rng: np.random.Generator) -> Touch:
    """Draw how an instrument is built and played."""
    return Touch(
        bright=float(rng.uniform(0.0, 1.0)),
        attack=float(np.exp(rng.uniform(-0.7, 0.7))),
        sustain=float(np.exp(rng.uniform(-0.6, 0.6))),
        vibrato=float(rng.uniform(0.0, 1.6)),
    )


def _time(seconds: float) -> np.ndarray:
    return np.arange(max(int(seconds * SAMPLE_RATE), 64)) / SAMPLE_RATE


def _phase(time: np.ndarray, frequency: float, vibrato: float, rate: float) -> np.ndarray:
    """Phase in radians of a tone whose pitch swings by `vibrato` semitones, after a moment of steadiness."""
    steady = 2 * np.pi * frequency * time
    if vibrato < 0.01:
        return steady
    depth = frequency * 0.0595 * vibrato * np.clip(time / 0.25, 0.0, 1.0)
    return steady + depth / rate * (1.0 - np.cos(2 * np.pi * rate * time))


def _harmonics(phase: np.ndarray, amplitudes: np.ndarray, frequency: float) -> np.ndarray:
    """Sum of sines at whole multiples of a phase, by Horner's rule; partials above 7.6 kHz are left out."""
    usable = amplitudes[: max(int(7600.0 / frequency), 1)]
    turn = np.exp(1j * phase).astype(np.complex64)
    total = np.full(phase.size, usable[-1], dtype=np.complex64)
    for amplitude in usable[-2::-1]:
        total *= turn
        total += np.float32(amplitude)
    return (total * turn).imag.astype(np.float64)


def _envelope(time: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Rise over `attack` seconds, hold, fall over `release` seconds at the end."""
    return np.minimum(np.clip(time / attack, 0.0, 1.0), np.clip((time[-1] - time) / release, 0.0, 1.0))


def _formant_weights(frequencies: np.ndarray, peaks: tuple[tuple[float, float], ...]) -> np.ndarray:
    return np.asarray(sum(1.0 / (1.0 + ((frequencies - centre) / width) ** 2) for centre, width in peaks))


def pluck(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Guitar: Karplus-Strong, a burst of noise circling in a string that dulls it each turn."""
    samples = _time(seconds).size
    period = max(SAMPLE_RATE / frequency - 0.5, 2.0)
    length = int(period)
    cycle = rng.uniform(-1.0, 1.0, length)
    cycle = lfilter([0.25 + 0.75 * touch.bright], [1.0, -0.75 * (1.0 - touch.bright)], cycle)
    turns = samples // length + 2
    string = np.empty((turns, length))
    loss = 10.0 ** (-3.0 / (frequency * 2.5 * touch.sustain))
    for turn in range(turns):
        string[turn] = cycle
        before = np.concatenate((string[turn - 1, -1:] if turn else cycle[-1:], cycle[:-1]))
        cycle = loss * 0.5 * (cycle + before)
    # play the table back at the exact pitch
    at = np.arange(samples) * (length + 0.5) / (period + 0.5)
    return np.interp(at, np.arange(string.size), string.ravel()) * _envelope(_time(seconds), 0.001, 0.02)


def piano(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Piano: stiff-string partials, stretched and each decaying at its own pace."""
    time = _time(seconds)
    number = np.arange(1, min(int(7000.0 / frequency), 14) + 1)
    partials = frequency * number * np.sqrt(1.0 + 0.0005 * number**2)
    strengths = np.exp(-(number - 1) * (0.75 - 0.5 * touch.bright)) * rng.uniform(0.6, 1.0, number.size)
    decays = touch.sustain * 2.0 / (1.0 + 0.5 * number) * (220.0 / frequency) ** 0.4
    wave = np.zeros(time.size)
    for partial, strength, decay in zip(partials, strengths, decays, strict=True):
        wave += strength * np.exp(-3.0 * time / decay) * np.sin(2 * np.pi * partial * time)
    return wave * _envelope(time, 0.003, 0.04)


def bell(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Bell: frequency modulation at an irrational ratio, index and level decaying."""
    time = _time(seconds)
    decay = np.exp(-time / (0.7 * touch.sustain))
    index = (2.0 + 3.0 * touch.bright) * decay
    carrier = np.sin(2 * np.pi * frequency * time + index * np.sin(2 * np.pi * 1.41 * frequency * time))
    return carrier * decay * _envelope(time, 0.002, 0.03)


def organ(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Organ: drawbars, sines at octaves and twelfths of constant level, with a slight tremolo."""
    time = _time(seconds)
    bars = np.zeros(16)
    bars[[0, 1, 2, 3, 5, 7, 9, 15]] = [1.0, 0.8, 0.6, 0.5, 0.3, 0.35, 0.2, 0.2]
    bars[3:] *= 0.2 + 0.8 * touch.bright
    tremolo = 1.0 + 0.15 * touch.vibrato * np.sin(2 * np.pi * 6.5 * time)
    return _harmonics(_phase(time, frequency, 0.0, 6.0), bars, frequency) * tremolo * _envelope(time, 0.008, 0.02)


def violin(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Violin: a bowed sawtooth with vibrato, seen through the resonances of the body."""
    time = _time(seconds)
    number = np.arange(1, 31)
    body = 0.25 + _formant_weights(number * frequency, ((480.0, 120.0), (1100.0, 250.0), (2700.0, 700.0)))
    amplitudes = body / number ** (1.5 - 0.6 * touch.bright)
    phase = _phase(time, frequency, 0.35 * touch.vibrato, 5.0 + touch.attack)
    bow = 0.02 * lfilter([1.0, -1.0], [1.0, -0.6], rng.standard_normal(time.size))
    return (_harmonics(phase, amplitudes, frequency) + bow) * _envelope(time, 0.08 * touch.attack, 0.06)


def flute(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Flute: few harmonics, breath noise around the tone, gentle vibrato of level."""
    time = _time(seconds)
    amplitudes = np.array([1.0, 0.35, 0.12, 0.05, 0.02]) * (0.4 + 0.6 * touch.bright) ** np.arange(5)
    tone = _harmonics(_phase(time, frequency, 0.12 * touch.vibrato, 5.2), amplitudes, frequency)
    swell = 1.0 + 0.15 * touch.vibrato * np.sin(2 * np.pi * 5.2 * time)
    angle = 2 * np.pi * frequency / SAMPLE_RATE
    breath = lfilter([0.05], [1.0, -1.94 * np.cos(angle), 0.94], rng.standard_normal(time.size))
    hiss = 0.03 * lfilter([1.0, -0.9], [1.0], rng.standard_normal(time.size))
    return (tone * swell + 0.3 * breath + hiss) * _envelope(time, 0.06 * touch.attack, 0.05)


def brass(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Brass: the louder the brighter; a dull and a bright spectrum cross-faded by the envelope."""
    time = _time(seconds)
    number = np.arange(1, 25)
    lips = 0.3 + _formant_weights(number * frequency, ((600.0, 300.0), (1200.0, 500.0)))
    phase = _phase(time, frequency, 0.1 * touch.vibrato, 5.0)
    loud = _envelope(time, 0.05 * touch.attack, 0.05) * (0.75 + 0.25 * np.exp(-time / 0.15))
    dull = _harmonics(phase, lips / number**1.8, frequency)
    bright = _harmonics(phase, lips / number ** (0.9 - 0.4 * touch.bright), frequency)
    return (dull * (1.0 - loud) + bright * loud) * loud


def clarinet(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Clarinet: odd harmonics of a cylindrical bore."""
    time = _time(seconds)
    number = np.arange(1, 20)
    amplitudes = np.where(number % 2 == 1, 1.0, 0.04) / number ** (1.7 - 0.8 * touch.bright)
    reed = 0.01 * rng.standard_normal(time.size)
    tone = _harmonics(_phase(time, frequency, 0.05 * touch.vibrato, 4.5), amplitudes, frequency)
    return (tone + reed) * _envelope(time, 0.03 * touch.attack, 0.04)


def marimba(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Marimba: three modes of a wooden bar (1 : 3.93 : 9.2) and the knock of the mallet."""
    time = _time(seconds)
    wave = np.zeros(time.size)
    for ratio, strength, decay in ((1.0, 1.0, 0.35), (3.93, 0.2 + 0.4 * touch.bright, 0.1), (9.2, 0.2, 0.035)):
        if ratio * frequency < 7600.0:
            wave += strength * np.exp(-time / (decay * touch.sustain)) * np.sin(2 * np.pi * ratio * frequency * time)
    knock = rng.standard_normal(time.size) * np.exp(-time / 0.004)
    return (wave + 0.3 * knock) * _envelope(time, 0.001, 0.02)


def bass(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Electric bass guitar: a plucked sawtooth whose filter closes, an octave below the written note."""
    time = _time(seconds)
    low = frequency / 2.0
    number = np.arange(1, 25)
    dull = _harmonics(_phase(time, low, 0.0, 5.0), 1.0 / number**2.2, low)
    bright = _harmonics(_phase(time, low, 0.0, 5.0), 1.0 / number ** (1.2 - 0.4 * touch.bright), low)
    closing = np.exp(-time / 0.12)
    string = dull * (1.0 - closing) + bright * closing
    return string * np.exp(-time / (0.6 * touch.sustain)) * _envelope(time, 0.004, 0.03)


def pad(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Synthesiser pad: three detuned sawtooths under a slowly moving filter."""
    time = _time(seconds)
    number = np.arange(1, 21)
    sweep = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.3, 1.5) * time + rng.uniform(0, 2 * np.pi))
    wave = np.zeros(time.size)
    for detune in (0.993, 1.0, 1.007):
        phase = 2 * np.pi * frequency * detune * time + rng.uniform(0, 2 * np.pi)
        bright = _harmonics(phase, 1.0 / number ** (1.4 - 0.5 * touch.bright), frequency)
        wave += bright * sweep + np.sin(phase) * (1.0 - sweep)
    return wave * _envelope(time, 0.1 * touch.attack, 0.1)


def choir(rng: np.random.Generator, frequency: float, seconds: float, touch: Touch) -> np.ndarray:
    """Choir: voices singing a vowel, each with its own vibrato."""
    time = _time(seconds)
    number = np.arange(1, 31)
    vowels = (((700.0, 90.0), (1150.0, 110.0), (2600.0, 200.0)), ((400.0, 80.0), (800.0, 90.0), (2500.0, 200.0)))
    vowel = pick(rng, vowels)
    amplitudes = (0.03 + _formant_weights(number * frequency, vowel)) / number ** (0.9 - 0.3 * touch.bright)
    wave = np.zeros(time.size)
    for _ in range(2):
        detuned = frequency * 2 ** (rng.normal(0.0, 8.0) / 1200.0)
        phase = _phase(time, detuned, 0.3 * touch.vibrato, rng.uniform(4.5, 6.5)) + rng.uniform(0, 2 * np.pi)
        wave += _harmonics(phase, amplitudes, frequency)
    return wave * _envelope(time, 0.09 * touch.attack, 0.08)


Instrument = Callable[[np.random.Generator, float, float, Touch], np.ndarray]

# name → synthesis and usual range as MIDI notes
INSTRUMENTS: dict[str, tuple[Instrument, int, int]] = {
    "guitar": (pluck, 45, 76),
    "piano": (piano, 40, 84),
    "bell": (bell, 60, 84),
    "organ": (organ, 45, 81),
    "violin": (violin, 55, 88),
    "flute": (flute, 60, 91),
    "brass": (brass, 48, 77),
    "clarinet": (clarinet, 50, 84),
    "marimba": (marimba, 50, 84),
    "bass": (bass, 40, 62),
    "pad": (pad, 45, 76),
    "choir": (choir, 48, 76),
}


def drum(rng: np.random.Generator, kind: str, touch: Touch) -> np.ndarray:
    """One stroke on a drum kit: kind "kick", "snare", "hat" or "tom"."""
    time = _time({"kick": 0.25, "snare": 0.2, "hat": 0.08, "tom": 0.3}[kind])
    noise = rng.standard_normal(time.size)
    if kind == "kick":
        sweep = 45.0 * time + 2.5 * (1.0 - np.exp(-time / 0.025)) * (1.0 + touch.bright)
        return 1.4 * np.sin(2 * np.pi * sweep) * np.exp(-time / 0.09)
    if kind == "snare":
        shell = np.sin(2 * np.pi * (180.0 + 60.0 * touch.bright) * time) * np.exp(-time / 0.05)
        return 0.6 * shell + 0.5 * noise * np.exp(-time / (0.06 * touch.sustain))
    if kind == "hat":
        return 0.5 * lfilter([1.0, -1.0], [1.0, 0.3], noise) * np.exp(-time / (0.02 * touch.sustain))
    sweep = (90.0 + 80.0 * touch.bright) * time + 1.5 * (1.0 - np.exp(-time / 0.04))
    return np.sin(2 * np.pi * sweep) * np.exp(-time / 0.11) + 0.1 * noise * np.exp(-time / 0.01)


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
