"""Speech: sentences in many languages, spoken by espeak-ng, or by formants where espeak-ng is missing.

The formant synthesiser turns letters into vowels and consonants: vowels are glottal pulses under three moving
resonances, consonants are silence, hum or shaped noise. It cannot be understood, but words, voices and languages differ
audibly and consistently.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
import unicodedata
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import ModuleType

import numpy as np
import soxr
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import lfilter

from bestrq2.errors import DataError
from bestrq2.seeding import pick
from bestrq2.soundworld.acoustics import SAMPLE_RATE, fade, normalise, place

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


def speak_by_formants(
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


# Words from which sentences are drawn, by the language code of espeak-ng.
_LINES = (resources.files("bestrq2") / "soundworld" / "words.txt").read_text(encoding="utf-8").splitlines()
WORDS: dict[str, tuple[str, ...]] = {language: tuple(words) for language, *words in map(str.split, _LINES)}

# Languages written without spaces between words
_UNSPACED = frozenset({"cmn"})
LANGUAGES: tuple[str, ...] = tuple(WORDS)

_RETRIEVAL = 2  # AUDIO_OUTPUT_SYNCHRONOUS: audio only reaches our callback
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_UTF8 = 1
_DO_NOT_EXIT = 0x8000  # without this espeak-ng ends the whole process when its data are missing
_lock = threading.Lock()
_noticed = False


@dataclass(frozen=True)
class Voice:
    """A speaker: parameters for espeak-ng, and their approximation for the formant synthesiser.

    Attributes:
        name: class name in the voice task.
        variant: espeak-ng voice variant.
        pitch: usual espeak-ng pitch, 0 to 99.
        fundamental: Hz, formant synthesiser.
        tract: factor on the formants, formant synthesiser (larger for a shorter vocal tract).
        breath: 0 to 1, share of noise in the voicing, formant synthesiser.
    """

    name: str
    variant: str
    pitch: int
    fundamental: float
    tract: float
    breath: float


VOICES: tuple[Voice, ...] = (
    Voice("m1", "m1", 45, 110.0, 0.95, 0.05),
    Voice("m2", "m2", 40, 95.0, 0.90, 0.15),
    Voice("m3", "m3", 48, 125.0, 1.00, 0.05),
    Voice("m7", "m7", 42, 120.0, 0.85, 0.30),
    Voice("f1", "f1", 50, 190.0, 1.12, 0.10),
    Voice("f2", "f2", 52, 210.0, 1.18, 0.25),
    Voice("f4", "f4", 46, 180.0, 1.08, 0.05),
    Voice("f5", "f5", 55, 230.0, 1.24, 0.15),
    Voice("croak", "croak", 40, 80.0, 0.98, 0.50),
    Voice("andrea", "Andrea", 50, 200.0, 1.05, 0.20),
    Voice("linda", "linda", 50, 205.0, 1.15, 0.05),
    Voice("quincy", "quincy", 45, 105.0, 1.06, 0.20),
    Voice("m4", "m4", 46, 115.0, 1.08, 0.20),
    Voice("f3", "f3", 50, 200.0, 1.22, 0.40),
    Voice("whisper", "whisper", 50, 140.0, 1.00, 1.00),
    Voice("klatt2", "klatt2", 45, 130.0, 1.05, 0.10),
)


def _espeak() -> ModuleType | None:
    """The module with the paths of espeak-ng's library and data; None where they are missing or do not load."""
    if sys.platform == "win32":  # the library cannot be unloaded there the way `_speak` needs
        return None
    try:
        module = importlib.import_module("espeakng_loader")
    except ImportError:
        return None
    return module if _loads(str(module.get_library_path()), str(module.get_data_path())) else None


@lru_cache
def _loads(library_path: str, data_path: str) -> bool:
    """Whether espeak-ng starts here (it does not, for instance, where the path of its data is very long)."""
    with _lock:
        try:
            library = ctypes.CDLL(library_path)
        except OSError:
            return False
        try:
            return bool(library.espeak_Initialize(_RETRIEVAL, 0, data_path.encode(), _DO_NOT_EXIT) > 0)
        finally:
            library.espeak_Terminate()
            _unload(library)


def synthesiser() -> str:
    """Name of the synthesiser in use, "espeak" or "formant"; part of the name of every cached file."""
    return "formant" if _espeak() is None else "espeak"


def notice_missing_synthesiser() -> None:
    """Warn once in this process that speech comes from the formant synthesiser, and how to get espeak-ng."""
    global _noticed
    if not _noticed and _espeak() is None:
        _noticed = True
        warnings.warn(
            "espeakng-loader is not installed: SoundWorld's speech comes from a plain formant synthesiser "
            "(pip install 'bestrq2[demo]' adds espeak-ng)",
            stacklevel=3,
        )


def _speak(module: ModuleType, text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
    """Speak a text by a freshly loaded espeak-ng and return float64 [samples] at 16 kHz.

    espeak-ng carries its pitch flutter, phase and echo from one utterance into the next, even across
    espeak_Terminate. Unloading the library resets all of it, and costs under a millisecond.
    """
    chunks: list[bytes] = []

    def receive(wave: int | None, count: int, _events: int) -> int:
        if wave and count > 0:
            chunks.append(ctypes.string_at(wave, 2 * count))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(receive)
    encoded = text.encode() + b"\0"
    with _lock:
        library = ctypes.CDLL(module.get_library_path())
        try:
            own_rate = library.espeak_Initialize(_RETRIEVAL, 0, str(module.get_data_path()).encode(), _DO_NOT_EXIT)
            library.espeak_SetSynthCallback(callback)
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            if library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise DataError(f"espeak-ng has no voice {voice!r}; is its data folder {module.get_data_path()} whole?")
            for parameter, value in ((_RATE, rate), (_VOLUME, 70), (_PITCH, pitch), (_RANGE, pitch_range)):
                library.espeak_SetParameter(parameter, value, 0)
            library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, 1, 0, _UTF8, None, None)
            library.espeak_Terminate()
        finally:
            _unload(library)
    wave = np.frombuffer(b"".join(chunks), dtype=np.int16).astype(np.float32) / 32768.0
    return soxr.resample(wave, own_rate, SAMPLE_RATE, quality="MQ").astype(np.float64)


def _unload(library: ctypes.CDLL) -> None:
    close = ctypes.CDLL(None).dlclose
    close.argtypes = [ctypes.c_void_p]
    close(library._handle)


def utterance(
    rng: np.random.Generator, text: str, language: str, voice: Voice, rate: float = 1.0, pitch: float = 0.0
) -> np.ndarray:
    """Speak a text.

    Args:
        rng: source of randomness (intonation range).
        text: words of the language.
        language: one of `LANGUAGES`.
        voice: one of `VOICES`.
        rate: speed relative to the usual one, about 0.6 to 1.6.
        pitch: shift of the voice's pitch, about -25 to 25 (espeak-ng's scale of 0 to 99).

    Returns:
        float64 [samples] at 16 kHz, silence at the ends removed, active level 0.1.
    """
    pitch_range = int(rng.integers(20, 80))
    module = _espeak()
    if module is None:
        fundamental = voice.fundamental * 2.0 ** (pitch / 50.0)
        wave = speak_by_formants(rng, text, language, fundamental, voice.tract, voice.breath, rate)
    else:
        wanted = int(np.clip(round(voice.pitch + pitch), 5, 95))
        words_per_minute = int(np.clip(round(165 * rate), 80, 400))
        wave = _speak(module, text, f"{language}+{voice.variant}", words_per_minute, wanted, pitch_range)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max(initial=1e-6))
    return normalise(fade(wave[loud[0] : loud[-1] + 1])) if loud.size else np.zeros(SAMPLE_RATE // 10)


def sentence(rng: np.random.Generator, language: str, words: int) -> str:
    """Draw a plausible word sequence of a language, as statement or question."""
    drawn = [pick(rng, WORDS[language]) for _ in range(words)]
    if words > 5:
        drawn[words // 2] += ","
    return ("" if language in _UNSPACED else " ").join(drawn) + ("?" if rng.random() < 0.2 else ".")


def talk(rng: np.random.Generator, seconds: float, language: str, voice: Voice, pauses: bool = True) -> np.ndarray:
    """Let one speaker talk for the given time, sentence after sentence.

    Args:
        rng: source of randomness.
        seconds: length of the result; the last sentence is cut there.
        language: one of `LANGUAGES`.
        voice: one of `VOICES`.
        pauses: leave 0.1 to 0.8 s between sentences.

    Returns:
        float64 [samples] at 16 kHz.
    """
    total = np.zeros(round(seconds * SAMPLE_RATE))
    rate, pitch = float(rng.uniform(0.75, 1.4)), float(rng.normal(0.0, 10.0))
    start = int(rng.uniform(0.0, 0.4 if pauses else 0.05) * SAMPLE_RATE)
    while start < total.size:
        words = int(np.clip((total.size - start) / SAMPLE_RATE * 2.6 * rate, 3, 14))
        wave = utterance(rng, sentence(rng, language, words), language, voice, rate, pitch)
        place(total, wave, start)
        start += wave.size + int(rng.uniform(0.1, 0.8 if pauses else 0.15) * SAMPLE_RATE)
    return fade(total)


def babble(rng: np.random.Generator, seconds: float, speakers: int = 6) -> np.ndarray:
    """Many people talking at once, too many to understand a word.

    Args:
        rng: source of randomness.
        seconds: length of the result.
        speakers: number of voices that overlap.

    Returns:
        float64 [samples] at 16 kHz, active level 0.1.
    """
    samples = round(seconds * SAMPLE_RATE)
    size = next_fast_len(samples, real=True)
    total = np.zeros(size // 2 + 1, dtype=complex)
    frequencies = np.arange(total.size) / size
    for _ in range(max(speakers // 2, 1)):
        wave = rfft(talk(rng, seconds, pick(rng, LANGUAGES), pick(rng, VOICES), pauses=False), size)
        # One synthesised voice, heard from two moments of its talk, stands for two people.
        total += wave * rng.uniform(0.5, 1.0)
        total += wave * rng.uniform(0.5, 1.0) * np.exp(-2j * np.pi * frequencies * int(rng.uniform(0.2, 0.8) * samples))
    return normalise(irfft(total, size)[:samples])
