"""Speech: sentences in many languages, spoken by espeak-ng, or by formants where espeak-ng is missing."""

from __future__ import annotations

import ctypes
import importlib
import sys
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import ModuleType

import numpy as np
import soxr
from scipy.fft import irfft, next_fast_len, rfft

from bestrq2.errors import DataError
from bestrq2.seeding import pick
from bestrq2.soundworld import formant
from bestrq2.soundworld.acoustics import SAMPLE_RATE, fade, normalise, place

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
        wave = formant.speak(rng, text, language, fundamental, voice.tract, voice.breath, rate)
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
