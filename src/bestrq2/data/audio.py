"""Audio as mono float32 waveforms at a wanted rate: whole files, parts, random crops, arrays.

Only the part that is needed is decoded, and it equals that part of the whole. `errors_named` is the one place where an
exception of a codec, the resampler or numpy becomes the AudioError of a recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import soxr

from bestrq2.data.decoders import ArrayDecoder, Decoder, open_decoder
from bestrq2.data.places import AudioBytes, UnreadableAudioError
from bestrq2.data.rejections import Shorter
from bestrq2.data.waveforms import check_rate
from bestrq2.errors import AudioError, BestRQ2Error
from bestrq2.model.waveforms import FULL_SCALE, range_problem

AUDIO_SUFFIXES: frozenset[str] = frozenset(
    f".{suffix}"
    for suffixes in (
        # Samples, lossless codecs, and files of programs and instruments
        "wav wave bwf rf64 bw64 w64 amb flac fla aif aiff aifc au snd caf sph nist voc 8svx svx avr htk paf fap",
        "pvf sd2 sds sdx ircam sf sox wve xi xa ape apl wv tta tak shn mlp thd truehd bonk osq rka wsd dsf dff",
        # Lossy codecs, of which some have no header
        "mp1 mp2 mp3 mpa m1a m2a mpga mpc mpp m4a m4b m4r aac adts latm loas ac3 ac4 eac3 ec3 dts dtshd ogg oga opus",
        "spx wma amr awb 3ga ra aa aax aa3 oma omg at3 vqf vqe vql qoa lc3 sbc msbc aptx aptxhd ilbc lbc dss gsm",
        "g722 722 g723 g723_1 g726 g728 g729 al ul alaw ulaw sln",
        # Games
        "adx aea aix bcstm bfstm brstm binka fsb fwse genh hca laf mmf mtaf musx ss2 svag vag xvag",
        # Videos
        "webm weba mka mkv mk3d mp4 m4v f4v f4a f4b mov qt isma ismv psp 3gp 3g2 3gpp avi divx flv wmv asf mpg mpeg",
        "mpe m2p vob ts m2t m2ts mts ogv ogx ogm mxf gxf nut rm rmvb dv wtv nsv",
    )
    for suffix in suffixes.split()
)
"""Suffixes, in lower case, by which audio is found in folders; the format of a file is decided by its content.

All that FFmpeg or libsndfile name as audio, except playlists, and suffixes that mostly mean something else.
"""

SILENCE_PEAK = 1e-4
"""-80 dB of full scale: above the rounding noise of 16-bit silence (3e-5), below any recording with something in it."""

QUALITY = "HQ"
"""Quality of soxr's resampling."""

# Samples of 16-bit audio that are looked at first: most clips are heard at once.
_QUICK_SAMPLES = 4096
# Decoded on both sides of a span, so that the resampling filter sees what it would in the whole file.
_MARGIN_SECONDS = 0.1
_CROP_TRIES = 5
# Where `shorter_files` collects, if it does.
_SHORTER: ContextVar[list[Shorter] | None] = ContextVar("shorter", default=None)


# Files


@contextmanager
def errors_named(name: str) -> Iterator[None]:
    """Turn any exception raised on a recording into an AudioError that names the recording once.

    One bad recording must never stop a job, so this takes every exception: those of codecs, the resampler and numpy,
    and MemoryError. Errors of the project that are not about audio pass.

    Args:
        name: name of the recording in messages.
    """
    try:
        yield
    except AudioError as error:
        if str(error).startswith(f"{name}: "):
            raise
        raise type(error)(f"{name}: {error}") from error
    except BestRQ2Error:
        raise
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")
        detail = f": {text}" if text else ""
        raise AudioError(f"{name}: cannot be used ({type(error).__name__}{detail}).") from error


@contextmanager
def open_audio(audio: str | Path | AudioBytes) -> Iterator[Decoder]:
    """Open a file for the time of a block; errors in the block become AudioErrors that name the file.

    Args:
        audio: path of the file, or its bytes in memory.

    Raises:
        UnreadableAudioError: missing, empty, not audio, or with an impossible sampling rate.
        BestRQ2Error: the tar that holds it cannot be read any more.
    """
    with errors_named(str(audio)), _failures_raised(audio):
        decoder = open_decoder(audio if isinstance(audio, AudioBytes) else Path(audio))
        try:
            yield decoder
            if (shorter := _SHORTER.get()) is not None and (lengths := decoder.shortfall()) is not None:
                shorter.append(Shorter(str(audio), *lengths))
        finally:
            decoder.close()


@contextmanager
def _failures_raised(audio: str | Path | AudioBytes) -> Iterator[None]:
    """Raise the first error met while reading a file in memory in place of what a codec makes of it."""
    failures = audio.failures if isinstance(audio, AudioBytes) else []
    try:
        yield
    except Exception as error:
        if failures:
            raise failures[0] from error
        raise
    if failures:
        raise failures[0]


@contextmanager
def shorter_files() -> Iterator[list[Shorter]]:
    """Collect the files, among those read in a block, that end before their header promised.

    A file is in the list once for each time that it was opened and its end was found.
    """
    found: list[Shorter] = []
    token = _SHORTER.set(found)
    try:
        yield found
    finally:
        _SHORTER.reset(token)


def read_audio(
    path: str | Path | AudioBytes, sampling_rate: int = 16_000, start_seconds: float = 0.0, seconds: float | None = None
) -> np.ndarray:
    """Decode a file, or a part of it, to mono.

    Only the requested part (and a fraction of a second around it) is decoded, and it equals that part of the
    whole.

    Args:
        path: file that libsndfile or FFmpeg reads, or its bytes in memory.
        sampling_rate: wanted rate in Hz.
        start_seconds: beginning of the part.
        seconds: length of the part; None for the rest of the file. The result is shorter where the file ends earlier.

    Returns:
        float32 [samples] at `sampling_rate`: mean over channels, integer formats scaled to [-1, 1).

    Raises:
        AudioError: missing, empty, damaged, or not audio; NaN or infinite samples; nothing at that position.
    """
    check_rate(sampling_rate)
    if not start_seconds >= 0 or (seconds is not None and not seconds > 0):
        raise AudioError(f"{path}: cannot read {seconds} s from {start_seconds} s on; start at 0 or later, read some.")
    with open_audio(path) as decoder:
        count = None if seconds is None else max(1, round(seconds * sampling_rate))
        waveform = read_span(decoder, round(start_seconds * sampling_rate), count, sampling_rate)
        if not len(waveform):
            length = decoder.measure() / decoder.rate
            raise AudioError(f"nothing at {start_seconds:g} s, the file is {length:.2f} s long.")
        return waveform


# Spans of an open recording


def read_span(decoder: Decoder, start: int, count: int | None, sampling_rate: int) -> np.ndarray:
    """A span of a recording, equal to that span of the whole resampled recording.

    Args:
        decoder: the recording.
        start: first sample, at `sampling_rate`.
        count: samples at `sampling_rate`; None for all that follow.
        sampling_rate: wanted rate in Hz.

    Returns:
        float32 [samples]; shorter than `count`, even empty, where the recording ends earlier.

    Raises:
        AudioError: the span cannot be decoded, or holds NaN or infinite samples.
    """
    # Output sample k * up falls on input sample k * down: resample from there, to keep the phase of the whole.
    common = math.gcd(decoder.rate, sampling_rate)
    up, down = sampling_rate // common, decoder.rate // common
    margin = math.ceil(_MARGIN_SECONDS * decoder.rate / down) if up != down else 0
    phase = max(0, start // up - margin)
    frames = None
    if count is not None:
        frames = -(-(start + count) * down // up) + margin * down - phase * down
    samples = decoder.read(phase * down, frames)
    check_range(samples)
    # Drop the margin, which only served the filter.
    skipped = start - phase * up
    return resampled(samples, decoder.rate, sampling_rate)[skipped : None if count is None else skipped + count]


def random_crop(decoder: Decoder, rng: np.random.Generator, sampling_rate: int, max_seconds: float) -> np.ndarray:
    """A crop of at most `max_seconds` from a uniformly drawn position; shorter recordings come whole.

    A silent crop is drawn again, four times at most.

    Args:
        decoder: the recording.
        rng: random generator of the position; the crop is a function of its state.
        sampling_rate: wanted rate in Hz.
        max_seconds: longest crop.

    Returns:
        float32 [samples] at `sampling_rate`; int16 where the decoder gives that.

    Raises:
        UnreadableAudioError: no crop of this recording can be used.
        AudioError: this crop cannot be used.
    """
    longest = max(1, round(max_seconds * sampling_rate))
    problem: AudioError | None = None
    for _ in range(_CROP_TRIES):
        total = decoder.measure()
        length = total * sampling_rate // decoder.rate
        start = int(rng.integers(length - longest + 1)) if length > longest else 0
        waveform = read_span(decoder, start, longest, sampling_rate)
        if decoder.measure() != total and len(waveform) < longest:
            continue  # the header overstated the length: draw within the true one
        try:
            check_usable(waveform)
        except AudioError as error:
            problem = error
        else:
            return np.ascontiguousarray(waveform)
        if length <= longest:
            raise UnreadableAudioError(str(problem)) from problem
    raise problem or AudioError("its length keeps changing while it is read.")


def usable_span(decoder: Decoder, start: int, count: int, sampling_rate: int) -> np.ndarray:
    """A span of a recording, as by `read_span`, if it is neither silent nor holds NaN.

    Returns:
        float32 [samples] at `sampling_rate`; int16 where the decoder gives that.

    Raises:
        UnreadableAudioError: the span is all of the recording, and cannot be used.
        AudioError: it cannot be used.
    """
    waveform = read_span(decoder, start, count, sampling_rate)
    try:
        check_usable(waveform)
    except AudioError as error:
        if start == 0 and decoder.measure() * sampling_rate // decoder.rate <= count:
            raise UnreadableAudioError(str(error)) from error
        raise
    return np.ascontiguousarray(waveform)


def check_finite(waveform: np.ndarray) -> None:
    """Check that samples are finite; for what a resampling filter, which exceeds their range a little, made of them.

    Raises:
        AudioError: NaN or infinite samples.
    """
    if waveform.size and not (math.isfinite(waveform.min()) and math.isfinite(waveform.max())):
        raise AudioError("holds NaN or infinite samples.")


def check_range(waveform: np.ndarray) -> None:
    """Check that float samples are audio: finite and within ±16, so that resampling cannot overflow.

    Args:
        waveform: [samples] or [channels, samples]; integers always pass.

    Raises:
        AudioError: NaN or infinite samples, or samples that are far from [-1, 1].
    """
    problem = range_problem(waveform)
    if problem:
        raise AudioError(problem)


def check_usable(waveform: np.ndarray) -> None:
    """Check that a waveform is finite and not silent.

    Silent means that no sample is further than 1e-4 (-80 dB of full scale) from the mean, so a constant is silent too.

    Args:
        waveform: float32 [samples], or int16 with a full scale of 32768.

    Raises:
        AudioError: no samples, NaN or infinite samples, or silence.
    """
    if waveform.size == 0:
        raise AudioError("holds no samples.")
    scale = FULL_SCALE["int16"] if waveform.dtype == np.int16 else 1.0
    # Integers hold no NaN: where the beginning is not silent, the rest need not be looked at.
    beginning = waveform[:_QUICK_SAMPLES]
    if scale > 1 and (float(beginning.max()) - float(beginning.min())) / scale / 2 >= SILENCE_PEAK:
        return
    check_finite(waveform)
    low, high = float(waveform.min()) / scale, float(waveform.max()) / scale
    if (high - low) / 2 >= SILENCE_PEAK:
        return  # wherever the mean is, one of the two is at least that far from it
    mean = float(waveform.mean(dtype=np.float64)) / scale
    if max(high - mean, mean - low) < SILENCE_PEAK:
        raise AudioError(f"is silent: no sample exceeds {SILENCE_PEAK:g} of full scale.")


# Waveforms in memory


def resampled(waveform: np.ndarray, from_rate: float, to_rate: float) -> np.ndarray:
    """Resample float32 [samples] from one rate in Hz to another (soxr, HQ); unchanged where they are equal.

    Raises:
        AudioError: the result is not finite.
    """
    if from_rate == to_rate or not len(waveform):
        return waveform
    found = np.ascontiguousarray(soxr.resample(waveform, from_rate, to_rate, quality=QUALITY), np.float32)
    check_finite(found)
    return found


def array_decoder(waveform: np.ndarray, rate: int) -> ArrayDecoder:
    """Decoder of a waveform in memory, after a check of its shape and rate.

    Args:
        waveform: [samples], or [channels, samples] with at most as many channels as samples. Float samples are taken as
            they are; int8, int16 and int32 are scaled to [-1, 1), uint8 is centred on 128 as in WAV files.
        rate: sampling rate in Hz.

    Raises:
        UnreadableAudioError: another shape, no samples, or an impossible rate.
    """
    check_rate(rate)
    waveform = np.asarray(waveform)
    _check_shape(waveform)
    return ArrayDecoder(waveform, rate)


def _check_shape(waveform: np.ndarray) -> None:
    if waveform.ndim not in (1, 2):
        shape = list(waveform.shape)
        raise UnreadableAudioError(f"A waveform of shape {shape} is not audio; give [samples] or [channels, samples].")
    if waveform.size == 0:
        raise UnreadableAudioError(f"The waveform is empty (shape {list(waveform.shape)}).")
    if waveform.ndim == 2 and waveform.shape[0] > waveform.shape[1]:
        raise UnreadableAudioError(
            f"A waveform of shape {list(waveform.shape)} has more channels than samples; "
            "give [channels, samples], for instance by transposing it."
        )
