"""Decoders: files, bytes and arrays as mono audio that can be read from any position.

libsndfile reads what it seeks exactly: WAV, FLAC, Ogg, AIFF, AU, CAF and others. FFmpeg (PyAV) reads the rest: MP3,
AAC, WebM, the sound of videos. `open_decoder` is the one place that distinguishes formats.

Decoders read only the requested span and average channels as they go, so a long file or one of many channels
takes no more memory than the span. Positions and counts are in frames (samples per channel) at the file's own rate.

The length in a header holds until fewer samples are found: a file that ends early is used as far as it goes.
"""

from __future__ import annotations

import errno
import io
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias, cast

import av
import numpy as np
import soundfile

from bestrq2.errors import AudioError, BestRQ2Error

FULL_SCALE = {"int8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}

LOWEST_RATE, HIGHEST_RATE = 100, 10_000_000
"""Accepted sampling rates in Hz; others come from rates in kHz or damaged headers, and 1 Hz would make GB of KB."""

_BLOCK_FRAMES = 1 << 18
# Decoded and dropped before the wanted position, so that codecs with memory (MP3, AAC, Opus) have settled.
_PREROLL_SECONDS = 0.5
# FFmpeg formats whose headers or time stamps state the length; of others FFmpeg has an estimate from the bit rate only.
_TIMED_FORMATS = {"mov", "matroska", "ogg", "asf", "avi", "flv", "mpegts", "wav", "aiff", "caf", "w64", "au"}
# Too many open files, no memory, and disks or servers that fail for a while: not the fault of the audio.
_NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
_PASSING = (*_NO_MORE_FILES, errno.ENOMEM, errno.EIO, errno.ESTALE)


class UnreadableAudioError(AudioError):
    """A recording of which no crop can be used."""


class Decoder(Protocol):
    """Mono audio that can be read from any position.

    Attributes:
        rate: sampling rate in Hz.
        channels: channels of the original.
        frames: length in samples per channel; None where only `measure` finds it.
    """

    rate: int
    channels: int
    frames: int | None

    def measure(self) -> int:
        """Length in samples per channel, found by going through the file where its header does not state it."""

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are."""

    def close(self) -> None:
        """Release the file."""


# Samples


def to_float32(samples: np.ndarray) -> np.ndarray:
    """Samples of any common type as float32: integers scaled to [-1, 1), uint8 centred on 128 as in WAV files.

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
    """Write [samples] into a row [samples], int16 as it is or float32 as by `to_float32`; int16 is not copied first."""
    if samples.dtype == row.dtype == np.int16:
        row[:] = samples
    elif samples.dtype == np.int16:
        # Two plain loops are faster than one multiplication that converts as it goes.
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


def _mean_of_channels(block: np.ndarray) -> np.ndarray:
    """Mean over channels of float32 [samples, channels]."""
    if block.shape[1] == 1:
        return block[:, 0]
    if block.shape[1] == 2:  # the usual case: numpy is slow at reducing a short last axis
        return (block[:, 0] + block[:, 1]) / np.float32(2)
    return block.mean(axis=1, dtype=np.float32)


# Places of audio


@dataclass(frozen=True)
class AudioBytes:
    """An audio file in memory, for instance a member of a tar; it is read in place.

    Attributes:
        name: name of the file in messages; its suffix may decide how it is read.
        content: the file's bytes; they must not change while a decoder is open.
        failures: errors met while reading, which codecs take for the end of the file.
    """

    name: str
    content: bytes | memoryview
    failures: list[BestRQ2Error] = field(default_factory=list, kw_only=True, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.content)

    def read_into(self, buffer: Any, position: int) -> int:
        """Fill a buffer with the bytes from a position on; returns their number."""
        piece = memoryview(self.content)[position : position + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """The bytes as an open file, like `Path.open`."""
        return cast(BinaryIO, MemoryFile(self))


AudioPlace: TypeAlias = Path | AudioBytes
"""A file on disk or in memory; as a string it is its name in messages."""


class MemoryFile(io.RawIOBase):
    """Bytes in memory as a read-only file; unlike `io.BytesIO` it copies only what is read.

    Args:
        audio: the bytes and their name.
    """

    def __init__(self, audio: AudioBytes) -> None:
        super().__init__()
        # FFmpeg guesses formats by suffix too, and takes other names for addresses.
        self.name = f"audio{PurePosixPath(audio.name).suffix}"
        self._audio = audio
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in bytes, counted from the start, from here, or from the end; never before the start."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._audio.size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the bytes that follow; returns their number."""
        count = self._audio.read_into(buffer, self._position)
        self._position += count
        return count


# Opening


def open_decoder(audio: AudioPlace) -> Decoder:
    """Open a file, on disk or in memory; the caller closes the decoder.

    Raises:
        UnreadableAudioError: missing, empty, not a regular file, not audio, or without samples.
        AudioError: it cannot be opened now, for instance because too many files are open.
    """
    size = audio.size if isinstance(audio, AudioBytes) else _regular_size(audio)
    if size == 0:
        raise UnreadableAudioError(f"{audio}: the file is empty (0 bytes).")
    # libsndfile's MPEG decoder guesses lengths and writes notes to the terminal, even for files that are not MPEG.
    if str(audio).lower().endswith((".mp3", ".mp2")) or _is_mpeg_audio(_head(audio)):
        return FFmpegDecoder(audio)
    try:
        file = soundfile.SoundFile(audio.open() if isinstance(audio, AudioBytes) else str(audio))
    except (soundfile.SoundFileError, TypeError, ValueError):
        return FFmpegDecoder(audio)
    if _libsndfile_reads(file, size):
        return SoundFileDecoder(audio, file)
    file.close()
    return FFmpegDecoder(audio)


def _libsndfile_reads(file: Any, size: int) -> bool:
    """Whether libsndfile reads an open file as it is."""
    if file.format in ("MP3", "RAW"):  # any bytes are RAW to it if they are called .au, .snd or the like
        return False
    if size > 1024 and not 0 < file.frames < 1 << 62:  # a stream written into a pipe has no length for it
        return False
    if file.format != "FLAC" or not file.frames:
        return True
    # Of a FLAC file that ends early, it reads nothing of the block that ends there.
    try:
        file.seek(file.frames - 1)
        return len(file.read(1, dtype="float32")) == 1
    except soundfile.SoundFileError:
        return False


def is_passing(error: OSError) -> bool:
    """Whether an error is temporary, so that a retry may succeed."""
    return error.errno in _PASSING


def cannot_open(what: object, error: OSError) -> AudioError:
    """The error for something that cannot be opened; an UnreadableAudioError unless another try may do better."""
    kind = AudioError if is_passing(error) else UnreadableAudioError
    return kind(f"{what} cannot be opened ({error.strerror or error}).")


def _regular_size(path: Path) -> int:
    """Bytes of a regular file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UnreadableAudioError(f"{path}: the file does not exist.") from None
    except OSError as error:
        raise cannot_open(f"{path}:", error) from error
    except ValueError as error:
        raise UnreadableAudioError(f"{path}: cannot be opened ({error}).") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise UnreadableAudioError(f"{path}: is {kind}, expected an audio file.")
    return status.st_size


def _head(audio: AudioPlace, start: int = 0, count: int = 10) -> bytes:
    """A few bytes of a file."""
    try:
        with audio.open("rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise cannot_open(f"{audio}:", error) from error


def _is_mpeg_audio(head: bytes) -> bool:
    """Whether a file begins like an MP3: with an ID3 tag or an MPEG audio frame."""
    # The two layer bits distinguish MPEG audio from ADTS, which has zeros there.
    return head[:3] == b"ID3" or (len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6 != 0)


def _states_frames(audio: AudioPlace) -> bool:
    """Whether an MP3 file has a Xing, Info or VBRI header with its number of frames."""
    tag, start = _head(audio), 0
    if tag[:3] == b"ID3" and len(tag) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    frame = _head(audio, start, 64)
    if len(frame) < 64 or not _is_mpeg_audio(frame):
        return False
    # The side information between frame header and Xing tag has another length for each version and mode.
    mpeg1, mono = frame[1] & 0x18 == 0x18, frame[3] & 0xC0 == 0xC0
    xing = 4 + {(True, True): 17, (True, False): 32, (False, True): 9, (False, False): 17}[mpeg1, mono]
    if frame[xing : xing + 4] in (b"Xing", b"Info"):
        return bool(frame[xing + 7] & 1)
    return frame[36:40] == b"VBRI"


# Decoders


class ArrayDecoder:
    """A waveform in memory as a decoder.

    Args:
        waveform: [samples] or [channels, samples], float or integer.
        rate: sampling rate in Hz.
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


class SoundFileDecoder:
    """Formats that libsndfile reads, with exact seeking.

    Args:
        audio: the file.
        file: the same, opened by soundfile.

    Raises:
        UnreadableAudioError: no samples, or no sampling rate.
    """

    def __init__(self, audio: AudioPlace, file: Any) -> None:
        self.audio = audio
        self.file = file
        self.rate = int(file.samplerate)
        self.channels = int(file.channels)
        self.frames: int | None = int(file.frames)
        if self.rate <= 0 or not self.frames:
            file.close()
            what = "holds no samples" if self.rate > 0 else f"declares a sampling rate of {self.rate} Hz"
            raise UnreadableAudioError(f"{audio}: {what}.")

    def measure(self) -> int:
        """Length in samples per channel."""
        assert self.frames is not None
        return self.frames

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are.

        Raises:
            AudioError: the span cannot be decoded.
        """
        end = self.measure() if count is None else min(self.measure(), start + count)
        blocks = [np.zeros(0, np.float32)]
        position = start
        try:
            if position < end:
                self.file.seek(position)
            while position < end:
                block = self.file.read(min(_BLOCK_FRAMES, end - position), dtype="float32", always_2d=True)
                if not len(block):
                    self.frames = position  # the header announced more
                    break
                blocks.append(_mean_of_channels(block))
                position += len(block)
        except soundfile.SoundFileError as error:
            raise AudioError(f"{self.audio}: damaged at about {position / self.rate:.1f} s.") from error
        return np.concatenate(blocks)

    def close(self) -> None:
        """Release the file."""
        self.file.close()


class FFmpegDecoder:
    """Formats that FFmpeg reads and libsndfile does not: MP3, M4A/AAC, WebM, the sound of videos, and others.

    Positions are exact to the container's time stamps (1 ms in Matroska and WebM, one sample in MP4).

    Args:
        audio: the file, on disk or in memory.

    Raises:
        UnreadableAudioError: not audio, or no audio track that can be decoded.
        AudioError: too many files are open.
    """

    def __init__(self, audio: AudioPlace) -> None:
        self.audio = audio
        self.container = self._open()
        self._fresh = True
        stream = self._stream()
        context = stream.codec_context
        self.rate = int(stream.rate or 0) if context is not None else 0
        self.channels = int(stream.channels or 0) if context is not None else 0
        if self.rate <= 0 or self.channels <= 0:
            self.close()
            raise UnreadableAudioError(f"{audio}: its audio track has no readable codec, rate or channels.")
        self.format = self.container.format.name.split(",")[0]
        self.frames = self._announced_frames(stream)

    def _open(self) -> Any:
        # Only this file: a playlist in disguise must not make FFmpeg open what it names.
        if isinstance(self.audio, AudioBytes):
            place: Any = self.audio.open()
            protocol = "none"
        else:
            place, protocol = f"file:{self.audio}", "file"
        try:
            return av.open(place, options={"protocol_whitelist": protocol}, metadata_errors="replace")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            # Of damaged files FFmpeg also reports that they cannot be read, or that memory does not suffice.
            if isinstance(error, OSError) and error.errno in _NO_MORE_FILES:
                raise cannot_open(f"{self.audio}:", error) from error
            raise UnreadableAudioError(f"{self.audio}: is not audio that libsndfile or FFmpeg can read.") from error

    def _stream(self) -> Any:
        if not self.container.streams.audio:
            self.close()
            raise UnreadableAudioError(f"{self.audio}: holds no audio track.")
        return self.container.streams.audio[0]

    def _rewound(self) -> Any:
        """The stream at its beginning, with a new decoder."""
        if not self._fresh:
            self.container.close()
            self.container = self._open()
        self._fresh = False
        return self._stream()

    def _announced_frames(self, stream: Any) -> int | None:
        """Length by the header; None where there is only an estimate."""
        if self.format not in _TIMED_FORMATS and not (self.format == "mp3" and _states_frames(self.audio)):
            return None
        if stream.duration:
            return round(stream.duration * stream.time_base * self.rate)
        # Matroska and WebM keep the duration of a stream as text in its tags.
        own = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
        if own:
            return round((int(own[1]) * 3600 + int(own[2]) * 60 + Fraction(own[3])) * self.rate)
        return round(Fraction(self.container.duration, 1_000_000) * self.rate) if self.container.duration else None

    def measure(self) -> int:
        """Length in samples per channel; packets are counted, not decoded, where the header does not state it.

        Raises:
            UnreadableAudioError: there are no audio packets.
        """
        if self.frames is None:
            self.frames = self._counted_frames()
        if self.frames <= 0:
            raise UnreadableAudioError(f"{self.audio}: holds no samples.")
        return self.frames

    def _counted_frames(self) -> int:
        """Length by the time stamps of the packets."""
        stream = self._rewound()
        origin, end = stream.start_time or 0, 0
        for packet in self._packets(stream):
            if packet.pts is not None:
                end = max(end, packet.pts - origin + (packet.duration or 0))
        return round(end * stream.time_base * self.rate)

    def _packets(self, stream: Any) -> Iterator[Any]:
        """Packets up to the end of the file, or to where it breaks off."""
        packets = self.container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except (av.error.InvalidDataError, av.error.EOFError):
                return
            if packet is None:
                return
            yield packet

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are.

        Raises:
            AudioError: the span cannot be decoded.
        """
        total = self.measure()
        end = total if count is None else min(total, start + count)
        pieces = self._pieces(start, end, seek=start > _PREROLL_SECONDS * self.rate)
        if pieces is None:
            pieces = self._pieces(start, end, seek=False)
        samples = np.concatenate([np.zeros(0, np.float32), *(pieces or [])])
        if len(samples) < end - start:
            # The header announced more. For a span behind the end, only counting finds where that is.
            self.frames = start + len(samples) if len(samples) else min(start, self._counted_frames())
        return samples

    def _pieces(self, start: int, end: int, seek: bool) -> list[np.ndarray] | None:
        """The span in decoder frames; None if seeking overshot the start."""
        pieces: list[np.ndarray] = []
        for position, samples in self._decoded(start, seek):
            if not pieces and position > start and seek:
                return None
            first = max(0, start - position)
            if first < len(samples):
                pieces.append(samples[first : end - position])
            if position + len(samples) >= end:
                break
        return pieces

    def _decoded(self, start: int, seek: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Positions and mono samples of successive decoder frames, from the beginning or shortly before `start`.

        A packet that cannot be decoded is damage if sound follows it; else the file ends there.
        """
        stream = self._rewound()
        if seek and not self._sought(stream, start):
            stream, seek = self._rewound(), False
        origin = stream.start_time or 0
        position = None if seek else 0
        damage: Exception | None = None
        try:
            for packet in self._packets(stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError as error:
                    if not seek or (position is not None and position >= start):  # else the codec has yet to settle
                        damage = damage or error
                    continue
                for frame in frames:
                    if damage is not None and packet.size:
                        raise damage
                    if position is None:
                        # Without a time stamp the position is unknown: count as overshot, to decode from the beginning.
                        position = round((frame.pts - origin) * frame.time_base * self.rate) if frame.pts else start + 1
                    samples = self._mono(frame)
                    yield position, samples
                    position += len(samples)
        except av.error.FFmpegError as error:
            raise AudioError(f"{self.audio}: damaged at about {(position or start) / self.rate:.1f} s.") from error

    def _sought(self, stream: Any, start: int) -> bool:
        """Go to shortly before a position; False where the container cannot."""
        wanted = Fraction(start, self.rate) - Fraction(_PREROLL_SECONDS)
        try:
            self.container.seek(int(wanted / stream.time_base) + (stream.start_time or 0), stream=stream)
        except av.error.FFmpegError:
            return False
        return True

    def _mono(self, frame: Any) -> np.ndarray:
        if frame.sample_rate != self.rate:
            raise AudioError(f"{self.audio}: changes its sampling rate from {self.rate} to {frame.sample_rate} Hz.")
        samples = frame.to_ndarray()
        # Interleaved formats come as one row [1, samples * channels].
        if not frame.format.is_planar:
            samples = samples.reshape(-1, frame.layout.nb_channels).T
        return mixed_down(samples)

    def close(self) -> None:
        """Release the file."""
        self.container.close()
