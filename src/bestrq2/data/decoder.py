"""What all decoders share: the view they give of audio, where they find it, and how samples become float32."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias, cast

import numpy as np

from bestrq2.errors import AudioError

FULL_SCALE = {"int8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}


@dataclass(frozen=True)
class AudioBytes:
    """An audio file that lies in memory, for instance as a member of a tar; it is read in place.

    Attributes:
        name: what to call it in messages; its suffix may decide how it is read.
        content: the file's bytes; they must not change while a decoder is open.
    """

    name: str
    content: bytes | memoryview

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.content)

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """The bytes as an open file, as `Path.open` gives those of a path."""
        return cast(BinaryIO, MemoryFile(self))


AudioPlace: TypeAlias = Path | AudioBytes
"""Where a decoder finds audio; as a string it is what messages call it."""


class MemoryFile(io.RawIOBase):
    """Bytes in memory as a read-only file; unlike `io.BytesIO` it copies only what is read.

    Args:
        audio: the bytes and their name.
    """

    def __init__(self, audio: AudioBytes) -> None:
        super().__init__()
        # FFmpeg guesses the format by the name's suffix too, and takes the rest for an address.
        self.name = f"audio{PurePosixPath(audio.name).suffix}"
        self._content = memoryview(audio.content)
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in bytes, counted from the start, from here, or from the end; never before the start."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._content)}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as bytes are there; how many were."""
        piece = self._content[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


class UnreadableAudioError(AudioError):
    """No part of this audio can be used, whatever crop is asked for."""


class Decoder(Protocol):
    """Mono audio that can be read from any position.

    Attributes:
        rate: Hz.
        channels: channels of the original.
        frames: length in samples per channel; None where only `measure` would tell.
    """

    rate: int
    channels: int
    frames: int | None

    def measure(self) -> int:
        """Length in samples per channel, found by going through the file where its header does not say."""

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are."""

    def close(self) -> None:
        """Release the file."""


def to_float32(samples: np.ndarray) -> np.ndarray:
    """Samples of any common format as float32: integers scaled to [-1, 1), uint8 centred on 128 as in WAV files.

    Raises:
        UnreadableAudioError: a dtype without a defined full scale.
    """
    name = samples.dtype.name
    if name == "uint8":
        return (samples.astype(np.float32) - 128.0) / 128.0
    if name in FULL_SCALE:
        return (samples * (1.0 / FULL_SCALE[name])).astype(np.float32)
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    raise UnreadableAudioError(
        f"samples of type {name} have no defined full scale; give floats in [-1, 1], or int8, int16, int32 or uint8."
    )


def put_samples(samples: np.ndarray, row: np.ndarray) -> None:
    """Write [samples] into a row [samples], int16 as it is or float32 as by `to_float32`; of int16 no copy is made."""
    if samples.dtype == row.dtype == np.int16:
        row[:] = samples
    elif samples.dtype == np.int16:
        # Quicker than one multiplication with a conversion within: both loops are plain ones.
        row[:] = samples
        row *= np.float32(1 / FULL_SCALE["int16"])
    else:
        row[:] = to_float32(samples)


def mixed_down(samples: np.ndarray) -> np.ndarray:
    """Mean over channels of [samples] or [channels, samples], as float32 [samples]; integers as in `to_float32`."""
    samples = to_float32(samples)
    if samples.ndim == 2:
        return samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32)
    return samples


def truncated(path: AudioPlace, detail: str) -> UnreadableAudioError:
    return UnreadableAudioError(f"{path}: the file is truncated: {detail}; copy or download it again.")


class ArrayDecoder:
    """A waveform in memory, seen as a decoder.

    Args:
        waveform: [samples] or [channels, samples], float or integer.
        rate: Hz.
    """

    def __init__(self, waveform: np.ndarray, rate: int) -> None:
        self.waveform = waveform
        self.rate = rate
        self.channels = 1 if waveform.ndim == 1 else len(waveform)
        self.frames: int | None = waveform.shape[-1]

    def measure(self) -> int:
        """Length in samples per channel."""
        return int(self.waveform.shape[-1])

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are."""
        end = None if count is None else start + count
        return mixed_down(self.waveform[..., start:end])

    def close(self) -> None:
        """Nothing to release."""
