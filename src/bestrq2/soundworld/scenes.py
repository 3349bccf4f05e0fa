"""Unlabelled clips: speech, music, everyday sounds and mixtures of them, as a microphone would hear them."""

from __future__ import annotations

import numpy as np

from bestrq2.seeding import generator, pick
from bestrq2.soundworld import environment, music, speech
from bestrq2.soundworld.acoustics import SAMPLE_RATE, coloured_noise, mix_at_snr, place, random_room, record

DOMAINS: tuple[str, ...] = ("speech", "music", "environment")


def _foreground(rng: np.random.Generator, domain: str, seconds: float) -> np.ndarray:
    if domain == "music":
        return music.piece(rng, seconds)
    if domain == "environment":
        return environment.scene(rng, seconds)
    total = np.zeros(round(seconds * SAMPLE_RATE))
    for _ in range(pick(rng, (1, 1, 1, 2, 3))):
        # a speaker may begin late or stop early, so that several take turns or overlap
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
        seed: which world.
        index: which clip of it.
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
    # no recording is without a noise floor, though a third have a faint one
    snr_db = rng.uniform(0.0, 35.0) if rng.random() < 0.65 else rng.uniform(35.0, 60.0)
    wave = mix_at_snr(wave, coloured_noise(rng, wave.size), float(snr_db))
    return record(wave, rng)
