"""Input of an embedder: audio in any form as checked mono float32 blocks at the model's rate, read one at a time."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import soxr
from torch import Tensor

from bestrq2.data.audio import QUALITY, array_decoder, check_finite, check_range, errors_named, open_audio
from bestrq2.data.decoders import ArrayDecoder, Decoder
from bestrq2.data.places import AudioBytes
from bestrq2.data.waveforms import HIGHEST_RATE, LOWEST_RATE
from bestrq2.errors import AudioError, ConfigError
from bestrq2.model.waveforms import as_array, is_array

Audio: TypeAlias = (
    "np.ndarray | Tensor | str | os.PathLike[str] | AudioBytes | BinaryIO | bytes | Iterable[float] | SampleStream"
    " | Mapping[str, Any]"
)
"""A waveform, the path of an audio file, an open audio file, its bytes, or a dictionary of `datasets`."""

MOST_CHANNELS = 64
"""Largest number of rows of a waveform; an array with more is a batch of clips."""

# Blocks hold at most this much audio at its own rate.
_BLOCK_SECONDS, _BLOCK_SAMPLES = 60, 1 << 22


@dataclass(frozen=True)
class SampleStream:
    """Audio that arrives in blocks, for instance from another process, and is read once.

    Attributes:
        name: name of the audio in messages.
        blocks: float32 [samples] each, mono, at the model's rate, checked.
    """

    name: str
    blocks: Iterator[np.ndarray]


def checked_rate(sampling_rate: Any, default: int, name: str = "sampling_rate") -> float:
    """Sampling rate of waveforms in Hz; `default` for None.

    Args:
        sampling_rate: rate in Hz, or None.
        default: rate in Hz.
        name: name of the rate in messages.

    Raises:
        ConfigError: not a number, or not a rate of audio.
    """
    if sampling_rate is None:
        return default
    if getattr(sampling_rate, "ndim", None) == 0:  # of a dataset in the format of numpy or torch
        sampling_rate = sampling_rate.item()
    if not _is_number(sampling_rate):
        kind = type(sampling_rate).__name__
        raise ConfigError(f"{name} must be a number of Hz, got {sampling_rate!r} ({kind})")
    if not LOWEST_RATE <= sampling_rate <= HIGHEST_RATE:
        raise ConfigError(f"{name} must be from {LOWEST_RATE} to {HIGHEST_RATE} Hz, got {sampling_rate}")
    return float(sampling_rate)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def named_items(audio: Any) -> list[tuple[str, Any]]:
    """Pair each piece of audio with its name in messages: its path, or its place in the list.

    Args:
        audio: one piece of audio, or several.

    Raises:
        AudioError: the list is empty, or this is neither audio nor a list.
    """
    if _is_single(audio):
        return [(_name(audio, "audio"), audio)]
    if not isinstance(audio, Iterable):
        kind = type(audio).__name__
        raise AudioError(f"a {kind} is not audio; give a waveform, a path, or a file opened in mode 'rb'")
    items = list(audio)
    if not items:
        raise AudioError("there is no audio to embed: the list is empty")
    if all(map(_is_number, items)):
        return [("audio", items)]
    return [(_name(item, f"audio[{index}]"), item) for index, item in enumerate(items)]


def _is_single(audio: Any) -> bool:
    kinds = str | os.PathLike | AudioBytes | SampleStream | Mapping | bytes | bytearray | memoryview
    return isinstance(audio, kinds) or is_array(audio) or _is_file(audio) or hasattr(audio, "get_all_samples")


def _is_file(audio: Any) -> bool:
    return hasattr(audio, "read")


def _name(item: Any, otherwise: str) -> str:
    if isinstance(item, str | os.PathLike):
        return str(Path(item))
    name = getattr(item, "name", None)
    is_named = _is_file(item) or isinstance(item, AudioBytes | SampleStream)
    return name if is_named and isinstance(name, str) else otherwise


def mono_blocks(name: str, audio: Any, sampling_rate: float, model_rate: int) -> Iterator[np.ndarray]:
    """Read audio from beginning to end.

    Args:
        name: name of the audio in messages.
        audio: audio as in `Embedder.embed`.
        sampling_rate: rate of waveforms in Hz; files carry their own.
        model_rate: wanted rate in Hz.

    Yields:
        float32 [samples] at `model_rate`, mean over channels; joined they equal the audio resampled at once.

    Raises:
        AudioError: unreadable, empty, or with samples that are not finite or far outside [-1, 1].
    """
    with errors_named(name):
        if isinstance(audio, SampleStream):
            yield from audio.blocks
            return
        with _opened(name, audio, sampling_rate) as (decoder, rate):
            samples = _own_blocks(decoder, rate)
            yield from samples if rate == model_rate else _resampled(samples, rate, model_rate)


def chunk_blocks(chunks: Iterable[Any], sampling_rate: float, model_rate: int) -> Iterator[np.ndarray]:
    """Read a waveform that arrives in chunks.

    Args:
        chunks: waveforms as in `Embedder.stream`.
        sampling_rate: their rate in Hz.
        model_rate: wanted rate in Hz.

    Yields:
        As `mono_blocks`, with at least one block, possibly of no samples, for each chunk that has samples.

    Raises:
        AudioError: a chunk is unusable, named by its place, or none has samples.
    """
    samples = _chunk_samples(chunks, round(sampling_rate))
    return samples if sampling_rate == model_rate else _resampled(samples, sampling_rate, model_rate)


def _chunk_samples(chunks: Iterable[Any], rate: int) -> Iterator[np.ndarray]:
    """Checked mono float32 blocks of chunks, at their own rate."""
    channels = 0
    for index, chunk in enumerate(chunks):
        with errors_named(f"chunks[{index}]"):
            array = _array(chunk)
            if not array.size:
                continue
            rows = len(array) if array.ndim == 2 else 1
            if channels and array.ndim in (1, 2):
                # No check against swapped axes: the last chunk may have fewer samples than channels.
                if rows != channels:
                    raise AudioError(f"has another number of channels ({rows}) than the chunks before ({channels}).")
                decoder = ArrayDecoder(array, rate)
            else:
                channels, decoder = rows, array_decoder(array, rate)
            for block in _own_blocks(decoder, rate):
                # The caller may fill the same array again.
                yield block.copy() if np.may_share_memory(block, array) else block
    if not channels:
        raise AudioError("there is no audio to embed: the stream holds no samples")


def _own_blocks(decoder: Decoder, rate: float) -> Iterator[np.ndarray]:
    """Checked mono float32 blocks at the audio's own rate."""
    size = min(_BLOCK_SAMPLES, math.ceil(_BLOCK_SECONDS * rate))
    position = 0
    # The audio may end before the length in its header, but not after it.
    while position < decoder.measure():
        with np.errstate(over="ignore", invalid="ignore"):  # refused by the check that follows
            block = decoder.read(position, size)
        if not len(block):
            break
        check_range(block)
        yield block
        position += len(block)
    if not position:
        raise AudioError("holds no samples.")


def _resampled(blocks: Iterator[np.ndarray], rate: float, model_rate: int) -> Iterator[np.ndarray]:
    stream = soxr.ResampleStream(rate, model_rate, 1, dtype="float32", quality=QUALITY)
    first, has_output = None, False
    for block in blocks:
        first = block[:1] if first is None else first
        out = stream.resample_chunk(np.ascontiguousarray(block))
        check_finite(out)
        has_output = has_output or len(out) > 0
        yield out
    out = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    check_finite(out)
    # One or two samples at a higher rate make less than one at the model's: keep the first.
    yield out if has_output or len(out) or first is None else first


@contextmanager
def _opened(name: str, audio: Any, sampling_rate: float) -> Iterator[tuple[Decoder, float]]:
    """A decoder and the rate of its samples in Hz."""
    try:
        audio, sampling_rate = _held(audio, sampling_rate)
    except ConfigError as error:  # here the rate is part of the recording
        raise AudioError(f"{error}.") from error
    if isinstance(audio, str | os.PathLike):
        place: Path | AudioBytes = Path(audio)
    elif isinstance(audio, AudioBytes):
        place = audio
    elif isinstance(audio, bytes | bytearray | memoryview) and not is_array(audio):
        place = AudioBytes(name, bytes(audio))
    elif _is_file(audio):
        place = _file_content(name, audio)
    else:
        # Decoders have integer rates; the rate of an array need not be one.
        yield array_decoder(_array(audio), round(sampling_rate)), sampling_rate
        return
    with open_audio(place) as decoder:
        yield decoder, decoder.rate


def _file_content(name: str, file: Any) -> Path | AudioBytes:
    """Whole content of an open file for a decoder; the file keeps its position."""
    if isinstance(file, io.TextIOBase):
        raise AudioError("is opened as text; open it in mode 'rb'")
    try:
        # Long files are read piece by piece, if the name still leads to the same file.
        if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO) and isinstance(file.name, str):
            try:
                if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                    return Path(file.name)
            except FileNotFoundError:
                pass  # deleted, but still open
        position = None
        if getattr(file, "seekable", lambda: False)():
            position = file.tell()
            file.seek(0)
        content = file.read()
        if position is not None:
            file.seek(position)
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot be read ({error}).") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise AudioError(f"gives {type(content).__name__} where bytes are expected; open it in mode 'rb'")
    return AudioBytes(name, bytes(content))


def _array(audio: Any) -> np.ndarray:
    """A waveform as numpy array, without a copy if it is in this machine's memory."""
    try:
        array = as_array(audio)
    except ValueError as error:
        raise AudioError(str(error)) from error
    if array.ndim == 2 and MOST_CHANNELS < len(array) <= array.shape[1]:
        raise AudioError(
            f"has the shape {list(array.shape)}, read as [channels, samples], of more than {MOST_CHANNELS} channels; "
            "pass a batch as list(batch)."
        )
    return array


def _held(audio: Any, sampling_rate: float) -> tuple[Any, float]:
    """The audio that an object of `datasets` holds, a dictionary or a decoder, and its sampling rate in Hz."""
    if hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder
        samples = audio.get_all_samples()
        return samples.data, checked_rate(samples.sample_rate, 0)
    if not isinstance(audio, Mapping):
        return audio, sampling_rate
    array = audio.get("array", audio.get("raw"))
    if array is not None and audio.get("sampling_rate") is not None:
        return array, checked_rate(audio["sampling_rate"], 0)
    content = audio.get("bytes")
    if content is None:
        content = audio.get("path")
    if content is None:
        keys = ", ".join(map(repr, audio)) or "none"
        raise AudioError(
            f"is a dictionary with the keys {keys}; expected 'array' and 'sampling_rate', or 'bytes' or 'path'."
        )
    return content, sampling_rate
