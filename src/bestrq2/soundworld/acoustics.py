"""Acoustics of a recording: room, distance, frequency response of the channel, noise, level."""

from __future__ import annotations

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft

SAMPLE_RATE = 16000
SPEED_OF_SOUND = 343.0  # metres per second


def active_rms(wave: np.ndarray) -> float:
    """Root mean square over the 20 ms frames within 30 dB of the loudest one, so that pauses do not count.

    Args:
        wave: float array [samples].
    """
    usable = wave.size // 320 * 320
    if usable == 0:
        return float(np.sqrt(np.mean(wave**2))) if wave.size else 0.0
    power = np.mean(wave[:usable].reshape(-1, 320) ** 2, axis=1)
    loudest = float(power.max())
    return float(np.sqrt(power[power >= loudest * 1e-3].mean())) if loudest > 0 else 0.0


def normalise(wave: np.ndarray, level: float = 0.1) -> np.ndarray:
    """Scale a wave [samples] to an active root mean square of `level`; silence stays silent."""
    rms = active_rms(wave)
    return wave * (level / rms) if rms > 1e-9 else wave


def mix_at_snr(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise [samples] to a wave [samples] so that the wave's active level is `snr_db` dB above the noise's."""
    signal, floor = active_rms(wave), active_rms(noise)
    if signal < 1e-9 or floor < 1e-9:
        return wave + noise
    return wave + noise * (signal / floor * 10.0 ** (-snr_db / 20.0))


def place(total: np.ndarray, wave: np.ndarray, start: int) -> None:
    """Add `wave` into `total` in place from sample `start`; whatever falls outside is cut off."""
    begin, end = max(start, 0), min(start + wave.size, total.size)
    if end > begin:
        total[begin:end] += wave[begin - start : end - start]


def fade(wave: np.ndarray, seconds: float = 0.01) -> np.ndarray:
    """Fade a wave [samples] in and out linearly over `seconds`, so that cutting it makes no click."""
    length = min(int(seconds * SAMPLE_RATE), wave.size // 2)
    if length == 0:
        return wave
    faded = wave.copy()
    ramp = np.linspace(0.0, 1.0, length)
    faded[:length] *= ramp
    faded[-length:] *= ramp[::-1]
    return faded


def fit(wave: np.ndarray, samples: int) -> np.ndarray:
    """Cut a wave to `samples`, or extend it with silence."""
    return wave[:samples] if wave.size >= samples else np.pad(wave, (0, samples - wave.size))


def shape_spectrum(wave: np.ndarray, frequencies: np.ndarray, gains_db: np.ndarray) -> np.ndarray:
    """Filter a wave [samples] with zero phase so that its gain passes through the given points.

    Args:
        wave: float array [samples].
        frequencies: Hz, increasing, [points]; between them the gain is linear in log frequency.
        gains_db: dB, [points].
    """
    size = next_fast_len(wave.size, real=True)
    grid = np.log(np.fft.rfftfreq(size, 1.0 / SAMPLE_RATE) + 1.0)
    gain = 10.0 ** (np.interp(grid, np.log(frequencies + 1.0), gains_db) / 20.0)
    return irfft(rfft(wave, size) * gain, size)[: wave.size]


def random_equaliser(rng: np.random.Generator, spread_db: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw a smooth random frequency response: points in Hz [9] and gains in dB [9] (tilt plus independent bands)."""
    frequencies = np.array([0.0, 80.0, 200.0, 450.0, 900.0, 1800.0, 3200.0, 5200.0, 8000.0])
    tilt = rng.normal(0.0, spread_db / 2.0) * np.linspace(-1.0, 1.0, frequencies.size)
    gains = tilt + rng.normal(0.0, spread_db / 1.5, frequencies.size)
    return frequencies, np.clip(gains, -2.5 * spread_db, 2.5 * spread_db)


def room_response(rng: np.random.Generator, decay: float, distance: float, size: float = 6.0) -> np.ndarray:
    """Draw a room impulse response: direct sound, early reflections, and a tail that loses treble as it decays.

    Args:
        rng: source of randomness.
        decay: reverberation time (-60 dB) in seconds.
        distance: source to microphone in metres; the direct sound falls with it, the tail does not.
        size: distance between walls in metres, which sets when reflections begin.

    Returns:
        float array [samples], direct sound first, not normalised.
    """
    length = int(SAMPLE_RATE * min(max(decay, 0.05), 1.0)) + 1
    time = np.arange(length) / SAMPLE_RATE
    # exp(-6.9) is -60 dB, which defines the reverberation time.
    tail = rng.standard_normal(length) * np.exp(-6.9 * time / decay)
    dull = np.convolve(rng.standard_normal(length), np.ones(6) / np.sqrt(6.0), mode="same")
    # High frequencies die about twice as fast as low ones
    tail = tail * np.exp(-4.0 * time / decay) + dull * np.exp(-6.9 * time / decay)
    onset = min(int(size / SPEED_OF_SOUND * SAMPLE_RATE), length - 1)
    tail[:onset] *= 0.1
    response = tail * (0.045 / np.sqrt(max(decay, 0.05)) / np.sqrt(2.0))
    count = int(rng.integers(4, 9))
    # Early reflections: few, discrete, within about two passes between the walls.
    early = np.minimum(rng.uniform(0.1, 2.0, count) * size / SPEED_OF_SOUND * SAMPLE_RATE, length - 1).astype(int)
    response[early] += rng.uniform(-0.35, 0.35, count)
    response[0] = 1.0 / max(distance, 0.1)
    return response


def reverberate(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve a wave [samples] with a room response and keep its length."""
    size = next_fast_len(wave.size + response.size - 1, real=True)
    return irfft(rfft(wave, size) * rfft(response, size), size)[: wave.size]


def random_room(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put a wave [samples] into a random room, sometimes a dry one."""
    if rng.random() < 0.25:
        return wave
    decay, distance = float(rng.uniform(0.1, 0.8)), float(rng.uniform(0.3, 2.5))
    return reverberate(wave, room_response(rng, decay, distance, float(rng.uniform(2.0, 10.0))))


def coloured_noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Draw stationary or slowly swelling noise [samples]: any spectral tilt, perhaps with mains hum."""
    slope = rng.uniform(-9.0, 1.0)  # dB per octave
    frequencies = np.array([0.0, 60.0, 125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0])
    gains = slope * np.log2(np.maximum(frequencies, 30.0) / 30.0) + rng.normal(0.0, 4.0, frequencies.size)
    noise = shape_spectrum(rng.standard_normal(samples), frequencies, gains)
    if rng.random() < 0.4:
        points = rng.uniform(0.3, 1.0, max(int(samples / SAMPLE_RATE * 2), 2) + 1)
        noise *= np.interp(np.linspace(0, points.size - 1, samples), np.arange(points.size), points)
    noise = normalise(noise)
    if rng.random() < 0.3:
        mains = 2 * np.pi * (50.0 if rng.random() < 0.5 else 60.0) * np.arange(samples) / SAMPLE_RATE
        for harmonic in range(1, 7):
            noise += rng.exponential(0.05) / harmonic * np.sin(harmonic * mains + rng.uniform(0, 2 * np.pi))
    return noise


def record(wave: np.ndarray, rng: np.random.Generator, equaliser_db: float = 6.0) -> np.ndarray:
    """Colour a finished scene with a random channel and set a random level, as a recording device would.

    Args:
        wave: float array [samples].
        rng: source of randomness.
        equaliser_db: standard deviation of the channel's gain in dB.

    Returns:
        float32 array [samples], active level between -40 and -12 dB of full scale, peak at most 0.99.
    """
    scene = shape_spectrum(wave, *random_equaliser(rng, equaliser_db))
    scene = normalise(scene, 10.0 ** (rng.uniform(-40.0, -12.0) / 20.0))
    peak = float(np.abs(scene).max(initial=0.0))
    return (scene * (0.99 / peak) if peak > 0.99 else scene).astype(np.float32)
