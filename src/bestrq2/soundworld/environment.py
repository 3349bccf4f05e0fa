"""Environment: everyday sounds, short events and lasting textures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.signal import butter, lfilter, sosfilt

from bestrq2.seeding import pick
from bestrq2.soundworld import speech
from bestrq2.soundworld.acoustics import SAMPLE_RATE, fade, normalise, place

Event = Callable[[np.random.Generator, float], np.ndarray]


def _time(seconds: float) -> np.ndarray:
    return np.arange(max(round(seconds * SAMPLE_RATE), 160)) / SAMPLE_RATE


def _band(wave: np.ndarray, low: float, high: float) -> np.ndarray:
    return sosfilt(butter(2, (low, min(high, 7900.0)), "bandpass", fs=SAMPLE_RATE, output="sos"), wave)


def _wander(rng: np.random.Generator, samples: int, per_second: float, low: float, high: float) -> np.ndarray:
    """A smooth random curve [samples] between two values, with `per_second` turning points a second."""
    points = rng.uniform(low, high, max(int(samples / SAMPLE_RATE * per_second), 1) + 2)
    return np.interp(np.linspace(0, points.size - 1, samples), np.arange(points.size), points)


def _impulses(rng: np.random.Generator, samples: int, per_second: float) -> np.ndarray:
    """Random instants [samples] with exponentially distributed strengths and signs."""
    count = rng.poisson(per_second * samples / SAMPLE_RATE)
    train = np.zeros(samples)
    np.add.at(train, rng.integers(0, samples, count), rng.exponential(1.0, count) * rng.choice((-1.0, 1.0), count))
    return train


def _strikes(rng: np.random.Generator, seconds: float, gap: tuple[float, float], strike: Event) -> np.ndarray:
    """Repeat one struck sound at a nearly regular pace drawn from `gap` (seconds)."""
    total = np.zeros(_time(seconds).size)
    pace, now = float(rng.uniform(*gap)), float(rng.uniform(0.0, 0.2))
    while now < seconds - 0.02:
        place(total, strike(rng, 1.0) * rng.uniform(0.7, 1.0), round(now * SAMPLE_RATE))
        now += pace * float(rng.uniform(0.85, 1.15))
    return total


def rain(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Rain: a hiss of very many drops and single near ones."""
    samples = _time(seconds).size
    hiss = _band(rng.standard_normal(samples), rng.uniform(800, 2000), rng.uniform(5000, 7500))
    drops = lfilter([1.0], [1.0, -1.2, 0.8], _impulses(rng, samples, rng.uniform(20, 150)))
    return normalise(hiss) * _wander(rng, samples, 1.0, 0.8, 1.0) + rng.uniform(0.2, 1.0) * normalise(drops)


def wind(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Wind: low noise in gusts, with a howl whose pitch follows them."""
    samples = _time(seconds).size
    gust = _wander(rng, samples, rng.uniform(0.6, 1.5), 0.1, 1.0)
    low = lfilter([0.03], [1.0, -0.97], rng.standard_normal(samples)) * gust
    centre = rng.uniform(250, 700) * (0.7 + 0.6 * gust)
    slow = lfilter([0.01], [1.0, -0.99], rng.standard_normal(samples))
    howl = slow * np.sin(2 * np.pi * np.cumsum(centre) / SAMPLE_RATE) * gust**2
    return normalise(low) + rng.uniform(0.2, 1.0) * normalise(howl)


def water(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Running water: bubbles, each a short rising sine, over a soft rush."""
    samples = _time(seconds).size
    total = np.zeros(samples)
    for _ in range(int(seconds * rng.uniform(30, 70))):
        time = _time(rng.uniform(0.015, 0.06))
        pitch = np.exp(rng.uniform(np.log(400.0), np.log(2200.0)))
        bubble = np.sin(2 * np.pi * pitch * time * (1.0 + 4.0 * time)) * np.exp(-time * 120.0)
        place(total, bubble * rng.exponential(1.0), int(rng.integers(0, samples)))
    rush = _band(rng.standard_normal(samples), 200.0, rng.uniform(1500, 4000))
    return normalise(total) + rng.uniform(0.2, 0.7) * normalise(rush)


def engine(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Engine: firing pulses at a wandering speed, exciting the exhaust, with valve noise."""
    samples = _time(seconds).size
    speed = rng.uniform(18, 70) * _wander(rng, samples, 0.8, 0.8, 1.25)
    phase = 2 * np.pi * np.cumsum(speed) / SAMPLE_RATE
    fire = np.exp(6.0 * (np.cos(phase) - 1.0)) + rng.uniform(0.1, 0.6) * np.exp(6.0 * (np.cos(phase / 2) - 1.0))
    exhaust = _band(fire, 30.0, rng.uniform(300, 1200))
    rattle = _band(rng.standard_normal(samples) * fire, 500.0, 4000.0)
    return normalise(exhaust) + rng.uniform(0.1, 0.6) * normalise(rattle)


def siren(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Siren: a tone that sweeps up and down, smoothly or between two pitches."""
    time = _time(seconds)
    swing = np.sin(2 * np.pi * rng.uniform(0.25, 3.0) * time + rng.uniform(0, 2 * np.pi))
    if rng.random() < 0.4:
        swing = np.tanh(20.0 * swing)
    pitch = rng.uniform(500, 1000) * 2.0 ** (rng.uniform(0.2, 0.6) * swing)
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    return np.sin(phase) + rng.uniform(0.1, 0.5) * np.sin(2 * phase) + rng.uniform(0.05, 0.3) * np.sin(3 * phase)


def alarm(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Alarm: groups of equal beeps of constant pitch."""
    time = _time(seconds)
    pitch, rate = rng.uniform(700, 3200), rng.uniform(2.5, 9.0)
    gate = ((time * rate) % 1.0 < rng.uniform(0.4, 0.7)) & ((time * rate) % 6.0 < rng.integers(2, 7))
    smooth = lfilter([0.03], [1.0, -0.97], gate.astype(float))
    tone = np.sin(2 * np.pi * pitch * time) + rng.uniform(0.0, 0.5) * np.sin(6 * np.pi * pitch * time) * (pitch < 2500)
    return tone * smooth


def bell_stroke(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """One stroke of a church or door bell: inharmonic modes that ring."""
    time = _time(seconds)
    pitch = np.exp(rng.uniform(np.log(300.0), np.log(1200.0)))
    wave = np.zeros(time.size)
    for ratio, strength in ((0.5, 0.5), (1.0, 1.0), (1.2, 0.7), (1.5, 0.5), (2.0, 0.8), (2.7, 0.4), (4.2, 0.25)):
        if ratio * pitch < 7600.0:
            decay = rng.uniform(0.3, 0.9) / ratio**0.7
            wave += strength * np.exp(-time / decay) * np.sin(2 * np.pi * ratio * pitch * time)
    return wave


def knock_stroke(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """One knock on wood: a few low, quickly dying resonances."""
    time = _time(min(seconds, 0.25))
    wave = 0.3 * rng.standard_normal(time.size) * np.exp(-time / 0.003)
    base = rng.uniform(120, 350)
    for ratio in (1.0, 2.3, 3.9):
        mode = base * ratio * rng.uniform(0.9, 1.1)
        wave += np.exp(-time / (0.035 / ratio**0.5)) * np.sin(2 * np.pi * mode * time) / ratio
    return wave


def step_stroke(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """One footstep: heel, then the scrape of the sole."""
    time = _time(min(seconds, 0.3))
    heel = np.sin(2 * np.pi * rng.uniform(60, 130) * time) * np.exp(-time / 0.02)
    late = np.maximum(time - rng.uniform(0.05, 0.1), 0.0)
    scrape = rng.standard_normal(time.size) * late * np.exp(-late / 0.02) * 40.0
    click = rng.standard_normal(time.size) * np.exp(-time / 0.004)
    return heel + 0.3 * _band(click, 300.0, 5000.0) + rng.uniform(0.2, 0.6) * _band(scrape, 800.0, 6000.0)


def bird_call(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A bird's phrase: a few equal chirps, each a fast sweep between 2 and 7 kHz."""
    time = _time(seconds)
    rate, start = rng.uniform(3.0, 12.0), rng.uniform(2300, 5000)
    within = (time * rate) % 1.0
    sweep = start * 2.0 ** (rng.uniform(-0.6, 0.6) * within + rng.uniform(0, 0.15) * np.sin(2 * np.pi * 3 * within))
    share = rng.uniform(0.5, 0.9)
    shape = np.clip(np.sin(np.pi * np.minimum(within / share, 1.0)), 0.0, 1.0)
    return np.sin(2 * np.pi * np.cumsum(sweep) / SAMPLE_RATE) * shape


def bark(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """One bark: a harsh voiced burst whose pitch rises and falls."""
    time = _time(min(seconds, rng.uniform(0.15, 0.3)))
    arch = np.sin(np.pi * np.arange(time.size) / time.size)
    phase = 2 * np.pi * np.cumsum(rng.uniform(250, 550) * (0.7 + 0.5 * arch)) / SAMPLE_RATE
    voice = np.sign(np.sin(phase)) * 0.5 + np.sin(phase) + 0.4 * rng.standard_normal(time.size)
    return _band(voice, 300.0, rng.uniform(1500, 3000)) * arch**0.6


def click_stroke(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """One click of a clock or keyboard: a very short high resonance."""
    time = _time(min(seconds, 0.05))
    ring = np.sin(2 * np.pi * rng.uniform(1800, 5500) * time) * np.exp(-time / rng.uniform(0.002, 0.008))
    return ring + 0.4 * rng.standard_normal(time.size) * np.exp(-time / 0.0015)


def bell(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Bell ringing at a steady pace."""
    stroke = bell_stroke(rng, 1.8)
    return _strikes(rng, seconds, (0.5, 1.4), lambda *_: stroke)


def knock(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Knocking on a door."""
    stroke = knock_stroke(rng, 0.3)
    return _strikes(rng, seconds, (0.15, 0.6), lambda *_: stroke)


def footsteps(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Footsteps, no two quite alike."""
    return _strikes(rng, seconds, (0.3, 0.75), step_stroke)


def bird(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A bird that sings phrases and pauses between them."""
    total = np.zeros(_time(seconds).size)
    now = float(rng.uniform(0.0, 0.4))
    while now < seconds - 0.1:
        length = float(rng.uniform(0.3, 1.0))
        place(total, fade(bird_call(rng, length)), round(now * SAMPLE_RATE))
        now += length + float(rng.uniform(0.1, 0.8))
    return total


def crackle(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Fire: sparse sharp crackles over a low flame."""
    samples = _time(seconds).size
    sparks = _band(_impulses(rng, samples, rng.uniform(8, 40)), rng.uniform(600, 1500), rng.uniform(4000, 7500))
    flame = lfilter([0.02], [1.0, -0.98], rng.standard_normal(samples)) * _wander(rng, samples, 4.0, 0.5, 1.0)
    return normalise(sparks) + rng.uniform(0.1, 0.5) * normalise(flame)


def babble(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A crowd of people talking."""
    return speech.babble(rng, seconds, int(rng.integers(4, 9)))


def dog(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A dog barking."""
    return _strikes(rng, seconds, (0.35, 0.9), bark)


def insects(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Crickets: a high tone chopped into fast, regular trills."""
    time = _time(seconds)
    pitch, rate = rng.uniform(3000, 6500), rng.uniform(18, 45)
    chop = np.clip(np.sin(2 * np.pi * rate * time), 0.0, 1.0)
    trill = np.clip(3.0 * np.sin(2 * np.pi * rng.uniform(0.7, 2.5) * time + rng.uniform(0, 6)) + 1.5, 0.0, 1.0)
    return np.sin(2 * np.pi * pitch * time + 0.5 * np.sin(2 * np.pi * 7.0 * time)) * chop * trill


def clock(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """A clock that ticks: two different clicks in turn."""
    total = np.zeros(_time(seconds).size)
    strokes = (click_stroke(rng, 0.05), click_stroke(rng, 0.05))
    pace = float(rng.uniform(0.15, 0.6))
    for count, start in enumerate(np.arange(rng.uniform(0.0, pace), seconds, pace)):
        place(total, strokes[count % 2], round(float(start) * SAMPLE_RATE))
    return total


EVENTS: dict[str, Event] = {
    "rain": rain, "wind": wind, "water": water, "engine": engine, "siren": siren, "alarm": alarm, "bell": bell,
    "knock": knock, "footsteps": footsteps, "bird": bird, "crackle": crackle, "babble": babble, "dog": dog,
    "insects": insects, "clock": clock,
}  # fmt: skip
STROKES: dict[str, Event] = {
    "bell": bell_stroke, "knock": knock_stroke, "step": step_stroke, "bird": bird_call, "bark": bark,
    "click": click_stroke,
}  # fmt: skip
TEXTURES: tuple[str, ...] = ("rain", "wind", "water", "engine", "crackle", "insects")


def event(rng: np.random.Generator, name: str, seconds: float) -> np.ndarray:
    """Sound one class of `EVENTS` for the given time: float64 [samples] at 16 kHz, active level 0.1."""
    samples = round(seconds * SAMPLE_RATE)
    return normalise(fade(EVENTS[name](rng, seconds)[:samples]))


def scene(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Draw an everyday scene: one to three sounds that come, last and go, often over a lasting texture.

    Returns:
        float64 [samples] at 16 kHz, active level 0.1.
    """
    total = np.zeros(round(seconds * SAMPLE_RATE))
    if rng.random() < 0.5:
        total += event(rng, pick(rng, TEXTURES), seconds) * 10.0 ** (rng.uniform(-20.0, 0.0) / 20.0)
    for _ in range(int(rng.integers(1, 4))):
        length = float(rng.uniform(0.2, 1.0)) * seconds
        wave = event(rng, pick(rng, tuple(EVENTS)), length) * rng.uniform(0.3, 1.0)
        place(total, wave, round(float(rng.uniform(0.0, seconds - length)) * SAMPLE_RATE))
    return normalise(total)
