"""Clips of SoundWorld: unlabelled ones, and those of labelled tasks.

Every clip gets a random room, noise, channel and level, so that loudness or colour alone does not give a class away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from bestrq2.seeding import generator, pick
from bestrq2.soundworld import environment, music, speech
from bestrq2.soundworld.acoustics import (
    SAMPLE_RATE,
    coloured_noise,
    fade,
    fit,
    mix_at_snr,
    normalise,
    place,
    random_room,
    record,
    reverberate,
    room_response,
)
from bestrq2.soundworld.music import CHORDS, CONTOURS, INSTRUMENTS, ROOTS, SCALES, TEMPI, Note, random_touch

# Unlabelled clips

DOMAINS: tuple[str, ...] = ("speech", "music", "environment")


def _foreground(rng: np.random.Generator, domain: str, seconds: float) -> np.ndarray:
    if domain == "music":
        return music.piece(rng, seconds)
    if domain == "environment":
        return environment.scene(rng, seconds)
    total = np.zeros(round(seconds * SAMPLE_RATE))
    for _ in range(pick(rng, (1, 1, 1, 2, 3))):
        # A speaker may begin late or stop early, so that several take turns or overlap.
        length = seconds * float(rng.uniform(0.5, 1.0))
        language, voice = pick(rng, speech.LANGUAGES), pick(rng, speech.VOICES)
        wave = speech.talk(rng, length, language, voice)
        place(total, wave * rng.uniform(0.5, 1.0), round(float(rng.uniform(0.0, seconds - length)) * SAMPLE_RATE))
    return total


def clip_domain(seed: int, index: int) -> str:
    """Name the domain, one of `DOMAINS`, that dominates clip `index` of the world `seed`."""
    return DOMAINS[int(generator(seed, "unlabelled", index, "domain").integers(len(DOMAINS)))]


def clip(seed: int, index: int, seconds: float = 10.0) -> np.ndarray:
    """Generate unlabelled clip `index` of the world `seed`; a pure function of its arguments and the synthesiser.

    Args:
        seed: random seed of the world.
        index: number of the clip.
        seconds: length.

    Returns:
        float32 [round(seconds * 16000)], peak at most 0.99.
    """
    domain = clip_domain(seed, index)
    rng = generator(seed, "unlabelled", index)
    wave = random_room(_foreground(rng, domain, seconds), rng)
    if rng.random() < 0.3:
        other = pick(rng, tuple(name for name in DOMAINS if name != domain))
        wave = mix_at_snr(wave, random_room(_foreground(rng, other, seconds), rng), float(rng.uniform(3.0, 18.0)))
    # No recording is without a noise floor; a third have a faint one.
    snr_db = rng.uniform(0.0, 35.0) if rng.random() < 0.65 else rng.uniform(35.0, 60.0)
    wave = mix_at_snr(wave, coloured_noise(rng, wave.size), float(snr_db))
    return record(wave, rng)


# Tasks

Render = Callable[[np.random.Generator, int, float], np.ndarray]


@dataclass(frozen=True)
class TaskSpec:
    """Specification of a labelled task.

    Attributes:
        name: "domain/what", e.g. "speech/language".
        domain: "speech", "music" or "environment".
        kind: "clip" (one class per clip) or "frame" (is the event present at this moment).
        classes: their names in the order of their indices.
        seconds: length of every clip.
        description: one sentence: the question, and what varies besides.
        render: makes the sound of a class index before noise, room and channel: (rng, class, seconds) -> [samples];
            None for a frame task, which is rendered from its events.
        snr_db: range of the level of the sound over the noise, dB.
        equaliser_db: standard deviation of the channel's gain, dB.
    """

    name: str
    domain: str
    kind: Literal["clip", "frame"]
    classes: tuple[str, ...]
    seconds: float
    description: str
    render: Render | None = field(repr=False)
    snr_db: tuple[float, float] = (0.0, 25.0)
    equaliser_db: float = 6.0


def _language(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    return random_room(speech.talk(rng, seconds, TASK_LANGUAGES[label], pick(rng, speech.VOICES), pauses=False), rng)


def _voice(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    wave = speech.talk(rng, seconds, pick(rng, speech.LANGUAGES), TASK_VOICES[label])
    return random_room(wave, rng)


def _word(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    rate, pitch = float(rng.uniform(0.65, 1.5)), float(rng.normal(0.0, 14.0))
    wave = speech.utterance(rng, KEYWORDS[label], "en", pick(rng, speech.VOICES), rate, pitch)
    total = np.zeros(round(seconds * SAMPLE_RATE))
    place(total, wave, int(rng.uniform(0.0, max(total.size - wave.size, 1))))
    return random_room(total, rng)


def _speakers(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    total = np.zeros(round(seconds * SAMPLE_RATE))
    for speaker in rng.permutation(len(speech.VOICES))[: label + 1]:
        length = seconds * float(rng.uniform(0.6, 1.0))
        wave = speech.talk(rng, length, pick(rng, speech.LANGUAGES), speech.VOICES[speaker])
        start = round(float(rng.uniform(0.0, seconds - length)) * SAMPLE_RATE)
        place(total, random_room(wave, rng) * rng.uniform(0.6, 1.0), start)
    return normalise(total)


def _instrument(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    names = tuple(INSTRUMENTS)
    scale, beat = SCALES[pick(rng, tuple(SCALES))], float(rng.uniform(0.3, 0.9))
    tune = music.melody(rng, int(rng.integers(48, 73)), scale, beat, seconds)
    wave = music.play(rng, tune, names[label], seconds, random_touch(rng))
    if rng.random() < 0.6:
        wave = mix_at_snr(wave, music.drums(rng, beat, seconds), float(rng.uniform(0.0, 15.0)))
    return random_room(wave, rng)


def _chord(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    name = pick(rng, ("guitar", "piano", "organ", "violin", "brass", "clarinet", "pad", "choir"))
    steps = tuple(CHORDS.values())[label]
    root, broken = int(rng.integers(52, 58)), rng.random() < 0.4
    pitches = [root + step + (12 if rng.random() < 0.2 else 0) for step in steps]
    pitches.append(root + 12 * int(rng.integers(-1, 2)))
    notes, now = [], float(rng.uniform(0.0, 0.2))
    while now < seconds - 0.2:
        length = float(rng.uniform(0.6, 1.4))
        gap = length / (len(pitches) + 1) if broken else 0.0
        for place_in_chord, voice in enumerate(rng.permutation(len(pitches))):
            start = now + gap * place_in_chord
            notes.append(Note(start, now + length - start, pitches[voice], float(rng.uniform(0.7, 1.0))))
        now += length
    return random_room(music.play(rng, notes, name, seconds, random_touch(rng)), rng)


def _key(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    scale, beat = SCALES[pick(rng, ("major", "minor"))], float(rng.uniform(0.3, 0.6))
    root = 36 + label + 12 * int(rng.integers(0, 3))
    notes: list[Note] = []
    length, now = beat * 2, 0.0
    # Cadences home: every clip holds all notes of its scale, and only their roles name the root.
    cadence = pick(rng, ((0, 3, 4, 0), (0, 5, 4, 0), (0, 1, 4, 0), (3, 4, 0, 0), (4, 0, 4, 0)))
    for step in range(int(seconds / length) + 1):
        degree, now = cadence[step % 4], step * length
        pitches = [music.scale_pitch(root, scale, degree + third) for third in (0, 2, 4)]
        notes += [Note(now, length * 0.95, pitch + 12 * int(rng.integers(-1, 2))) for pitch in pitches]
    backing = pick(rng, ("guitar", "piano", "organ", "violin", "brass", "pad", "choir"))
    total = music.play(rng, notes, backing, seconds, random_touch(rng))
    tune = music.melody(rng, 60 + label - (12 if label > 6 else 0), scale, beat, seconds)
    lead = music.play(rng, tune, pick(rng, tuple(INSTRUMENTS)), seconds, random_touch(rng))
    total += lead * rng.uniform(0.3, 1.0)
    if rng.random() < 0.5:
        total = mix_at_snr(total, music.drums(rng, beat, seconds), float(rng.uniform(0.0, 15.0)))
    return random_room(total, rng)


def _tempo(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    beat = 60.0 / (TEMPI[label] * float(np.exp(rng.uniform(-0.05, 0.05))))
    if rng.random() < 0.4:
        wave = music.drums(rng, beat, seconds + beat)
    else:
        name, touch = pick(rng, tuple(INSTRUMENTS)), random_touch(rng)
        root, notes = int(rng.integers(48, 72)), []
        held = float(rng.uniform(0.1, 0.4))  # seconds, not beats: the share of sound must not give the tempo away
        for count in range(int((seconds + beat) / beat) + 1):
            pitch = music.scale_pitch(root, SCALES["major"], int(rng.integers(0, 6)))
            notes.append(Note(count * beat, held, pitch, 1.0 if count % 4 == 0 else 0.8))
        wave = music.play(rng, notes, name, seconds + beat, touch)
    start = int(rng.uniform(0.0, beat) * SAMPLE_RATE)
    return random_room(fade(fit(wave[start:], round(seconds * SAMPLE_RATE))), rng)


def _melody(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    degrees = music.contour_degrees(CONTOURS[label], rng)
    scale = SCALES[pick(rng, ("major", "minor", "pentatonic"))]
    root, pace = int(rng.integers(50, 66)), float(rng.uniform(0.26, 0.4))
    start = float(rng.uniform(0.0, seconds - 7 * pace))
    notes = [
        Note(start + place_in_tune * pace, pace * float(rng.uniform(0.7, 1.0)), music.scale_pitch(root, scale, degree))
        for place_in_tune, degree in enumerate(degrees)
    ]
    return random_room(music.play(rng, notes, pick(rng, tuple(INSTRUMENTS)), seconds, random_touch(rng)), rng)


def _event(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    names = tuple(environment.EVENTS)
    wave = random_room(environment.event(rng, names[label], seconds), rng)
    if rng.random() < 0.6:
        other = pick(rng, tuple(name for name in names if name != names[label]))
        wave = mix_at_snr(wave, environment.event(rng, other, seconds), float(rng.uniform(2.0, 15.0)))
    return wave


def _spread(rng: np.random.Generator, count: int, seconds: float, gap: float) -> np.ndarray:
    """Draw `count` increasing instants in [0, seconds] that are at least `gap` seconds apart."""
    free = np.sort(rng.uniform(0.0, seconds - gap * (count - 1), count))
    return free + gap * np.arange(count)


def _count(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    total = np.zeros(round(seconds * SAMPLE_RATE))
    name, length = pick(rng, tuple(environment.STROKES)), float(rng.uniform(0.12, 0.36))
    stroke = normalise(fade(environment.STROKES[name](rng, length), 0.005))
    for start in _spread(rng, int(COUNTS[label]), seconds - length, max(length, 0.25)):
        place(total, stroke * rng.uniform(0.6, 1.0), round(float(start) * SAMPLE_RATE))
    return random_room(total, rng)


def _rhythm(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    total = np.zeros(round(seconds * SAMPLE_RATE))
    name, slot = pick(rng, tuple(environment.STROKES)), float(rng.uniform(0.09, 0.15))
    stroke = normalise(fade(environment.STROKES[name](rng, float(rng.uniform(0.06, 0.2))), 0.005))
    shift = int(rng.integers(0, 8))  # a rhythm has no beginning
    for step in range(int(seconds / slot) + 1):
        if RHYTHMS[label][(step + shift) % 8] == "x":
            place(total, stroke * rng.uniform(0.8, 1.0), round((step * slot + rng.normal(0.0, 0.004)) * SAMPLE_RATE))
    return random_room(total, rng)


def _distance(rng: np.random.Generator, label: int, seconds: float) -> np.ndarray:
    kind = int(rng.integers(0, 3))
    if kind == 0:
        wave = speech.talk(rng, seconds, pick(rng, speech.LANGUAGES), pick(rng, speech.VOICES))
    elif kind == 1:
        wave = environment.event(rng, pick(rng, ("knock", "footsteps", "dog", "clock", "bird", "alarm")), seconds)
    else:
        wave = music.piece(rng, seconds)
    distance = DISTANCES[label] * float(np.exp(rng.uniform(-0.25, 0.25)))
    return normalise(reverberate(wave, room_response(rng, float(rng.uniform(0.35, 0.8)), distance)))


def presence_events(seed: int, split: str, index: int, seconds: float) -> np.ndarray:
    """Draw when the bird of the presence task calls in a clip: float64 [events, 2], onset and offset in seconds."""
    rng = generator(seed, "environment/presence", split, index, "events")
    lengths = rng.uniform(0.3, 1.0, int(rng.integers(0, 4)))
    if lengths.size == 0:
        return np.zeros((0, 2))
    free = np.sort(rng.uniform(0.0, seconds - lengths.sum() - 0.2 * (lengths.size - 1), lengths.size))
    onsets = free + np.concatenate(([0.0], np.cumsum(lengths[:-1] + 0.2)))
    return np.stack((onsets, onsets + lengths), axis=1)


def _presence(rng: np.random.Generator, events: np.ndarray, seconds: float) -> np.ndarray:
    total = environment.event(rng, pick(rng, ("rain", "wind", "water", "engine", "crackle", "babble")), seconds)
    total *= 10.0 ** (-rng.uniform(0.0, 14.0) / 20.0)
    for _ in range(int(rng.integers(1, 4))):
        name, length = pick(rng, ("siren", "alarm", "dog", "knock", "insects", "bell")), float(rng.uniform(0.4, 1.5))
        wave = environment.event(rng, name, length) * rng.uniform(0.4, 1.0)
        place(total, wave, round(float(rng.uniform(0.0, seconds - length)) * SAMPLE_RATE))
    for onset, offset in events:
        call = normalise(fade(environment.bird_call(rng, float(offset - onset)), 0.02)) * rng.uniform(0.25, 0.9)
        place(total, call, round(float(onset) * SAMPLE_RATE))
    return total


KEYWORDS: tuple[str, ...] = (
    "water", "music", "seven", "yellow", "garden", "happy", "machine", "family", "window", "silver", "doctor", "police",
)  # fmt: skip
TASK_LANGUAGES = ("en", "de", "fr", "es", "nl", "pl", "ru", "tr", "fi", "hi", "cmn", "sw")
TASK_VOICES = speech.VOICES[:12]
# Four strokes in eight slots each, no two alike however they are shifted.
RHYTHMS = ("x.x.x.x.", "xx..xx..", "xxxx....", "xxx.x...", "xx.x.x..", "xxx...x.")
COUNTS = ("1", "2", "3", "4", "6", "9")
DISTANCES = (0.3, 0.8, 2.0, 5.0, 12.0)  # metres

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec("speech/language", "speech", "clip", TASK_LANGUAGES, 5.0,
                 "Which language is spoken, by any voice at any rate and pitch.", _language),
        TaskSpec("speech/voice", "speech", "clip", tuple(voice.name for voice in TASK_VOICES), 3.75,
                 "Which voice speaks, in any language at any rate and pitch.", _voice,
                 (-3.0, 20.0)),
        TaskSpec("speech/word", "speech", "clip", KEYWORDS, 2.5,
                 "Which word is said once, at any moment, by any voice at any rate and pitch.", _word),
        TaskSpec("speech/speakers", "speech", "clip", ("1", "2", "3", "4"), 5.0,
                 "How many people talk, together or in turn, in any languages.", _speakers,
                 (5.0, 30.0)),
        TaskSpec("music/instrument", "music", "clip", tuple(INSTRUMENTS), 3.75,
                 "Which instrument plays the melody, in any key, tempo and touch, often with drums.", _instrument),
        TaskSpec("music/chord", "music", "clip", tuple(CHORDS), 2.5,
                 "Which quality has the chord, on any root and instrument, struck or broken.", _chord,
                 (8.0, 30.0)),
        TaskSpec("music/key", "music", "clip", ROOTS, 3.75,
                 "Which note is the root of the major or minor key of a melody and its cadences.", _key,
                 (3.0, 28.0)),
        TaskSpec("music/tempo", "music", "clip", tuple(str(tempo) for tempo in TEMPI), 5.0,
                 "How many beats per minute, on any instrument or drums.", _tempo),
        TaskSpec("music/melody", "music", "clip", CONTOURS, 3.125,
                 "In which order seven notes of a scale come, at any height and pace, on any instrument.", _melody,
                 (8.0, 30.0)),
        TaskSpec("environment/event", "environment", "clip", tuple(environment.EVENTS), 3.75,
                 "Which sound is in front, often over another one.", _event),
        TaskSpec("environment/count", "environment", "clip", COUNTS, 3.75,
                 "How often a short sound of any kind is repeated.", _count,
                 (6.0, 30.0)),
        TaskSpec("environment/rhythm", "environment", "clip", RHYTHMS, 3.75,
                 "In which pattern a short sound of any kind is repeated, at any pace.", _rhythm,
                 (4.0, 28.0)),
        TaskSpec("environment/distance", "environment", "clip", tuple(f"{d:g} m" for d in DISTANCES), 3.75,
                 "How far away the source is in a reverberant room; the level gives nothing away.", _distance,
                 (15.0, 35.0), 3.0),
        TaskSpec("environment/presence", "environment", "frame", ("absent", "present"), 5.0,
                 "When a bird calls, among other sounds.", None),
    )
}  # fmt: skip


def label_of(spec: TaskSpec, index: int) -> int:
    """Class index of clip `index` of a clip task: classes take turns, so every prefix is balanced."""
    return index % len(spec.classes)


def render(name: str, split: str, seed: int, index: int) -> np.ndarray:
    """Generate clip `index` of a split of a task; a pure function of its arguments and the synthesiser.

    Args:
        name: one of `TASKS`.
        split: "train" or "test".
        seed: random seed of the world.
        index: number of the clip.

    Returns:
        float32 [samples] at 16 kHz, peak at most 0.99.
    """
    spec = TASKS[name]
    rng = generator(seed, name, split, index)
    if spec.render is None:
        wave = _presence(rng, presence_events(seed, split, index, spec.seconds), spec.seconds)
    else:
        wave = spec.render(rng, label_of(spec, index), spec.seconds)
    wave = mix_at_snr(wave, coloured_noise(rng, wave.size), float(rng.uniform(*spec.snr_db)))
    return record(wave, rng, spec.equaliser_db)
