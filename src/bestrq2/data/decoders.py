"""Decoders: files, bytes and arrays as mono audio that can be read from any position.

`open_decoder` is the one place that distinguishes formats: libsndfile reads what it seeks exactly (WAV, FLAC, AIFF, AU,
CAF and others), FFmpeg the rest.

Decoders read only the requested span and average channels as they go, so a long file or one of many channels
takes no more memory than the span. Positions and counts are in samples per channel at the file's own rate. A span
equals that span of the whole file, sample for sample, and the whole file is all that can be decoded of it: a file that
ends before its header promised is used as far as it goes, and `shortfall` tells.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import numpy as np
import soundfile

from bestrq2.data.ffmpeg import FFmpegDecoder, id3_size, is_mpeg_audio
from bestrq2.data.places import AudioBytes, AudioPlace, MemoryFile, UnreadableAudioError, bytes_at, place_size
from bestrq2.data.waveforms import check_rate, mixed_down
from bestrq2.errors import AudioError


class Decoder(Protocol):
    """Mono audio that can be read from any position.

    Attributes:
        rate: sampling rate in Hz.
        frames: length in samples per channel; None where only `measure` finds it.
    """

    rate: int
    frames: int | None

    def measure(self) -> int:
        """Length in samples per channel, found by going through the file where its header does not state it."""

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are.

        Raises:
            AudioError: the span cannot be decoded.
        """


def open_decoder(audio: AudioPlace) -> SoundFileDecoder | FFmpegDecoder:
    """Open a file, on disk or in memory; the caller closes the decoder.

    Raises:
        UnreadableAudioError: missing, empty, not a regular file, not audio, without samples, an impossible rate.
        AudioError: it cannot be opened now, for instance because too many files are open.
    """
    size = place_size(audio)
    if size == 0:
        raise UnreadableAudioError(f"{audio}: the file is empty (0 bytes).")
    tag = id3_size(audio)
    # libsndfile tries its MPEG decoder, which writes to the terminal, on whatever is called .mp3.
    if not (is_mpeg_audio(bytes_at(audio, tag, 2)) or str(audio).lower().endswith(".mp3")):
        file = open_soundfile(audio, size, tag)
        if file is not None:
            return SoundFileDecoder(audio, file)
    return FFmpegDecoder(audio)


class ArrayDecoder(Decoder):
    """A waveform in memory as a decoder.

    Args:
        waveform: [samples] or [channels, samples], float or integer.
        rate: sampling rate in Hz.
    """

    def __init__(self, waveform: np.ndarray, rate: int) -> None:
        self.waveform = waveform
        self.rate = rate
        self.frames: int | None = waveform.shape[-1]

    def measure(self) -> int:
        return int(self.waveform.shape[-1])

    def read(self, start: int, count: int | None) -> np.ndarray:
        end = None if count is None else start + count
        return mixed_down(self.waveform[..., start:end])


# libsndfile

_BLOCK_FRAMES = 1 << 18
# The last frame of a FLAC file is looked for in so many bytes: encoders' frames hold 4096 samples.
_FLAC_TAIL = 1 << 16
# Its log says which length of the data the header states, and which it should be.
_LENGTHS = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
# Lengths that programs write which do not know the length yet.
_UNKNOWN_LENGTHS = range(0x7FFF0000, 1 << 64)


def open_soundfile(audio: AudioPlace, size: int, tag: int) -> Any | None:
    """A file, opened by soundfile, if libsndfile reads all of it and seeks exactly; else None.

    Args:
        audio: the file.
        size: its bytes.
        tag: bytes of ID3 tags in front of it.
    """
    # Its MPEG decoder guesses lengths and writes to the terminal. Ogg it seeks with errors of some samples.
    try:
        # Behind a tag, it drops as many bytes at the end of a file in memory.
        file = soundfile.SoundFile(MemoryFile(audio, tag) if isinstance(audio, AudioBytes) else str(audio))
    except (soundfile.SoundFileError, TypeError, ValueError):
        return None
    exact = (
        # Any bytes are RAW if a file is called .au, .snd or the like; of VOC it reads headers of blocks as samples.
        file.format not in ("OGG", "MPEG", "MP3", "RAW", "VOC")
        and not file.subtype.startswith("MPEG")
        and file.seekable()
        and (size <= 1024 or 0 < file.frames < 1 << 62)  # a stream written into a pipe has no length for it
        and (file.format != "FLAC" or _is_whole_flac(file, audio, size, tag))
    )
    if not exact:
        file.close()
        return None
    return file


def _is_whole_flac(file: Any, audio: AudioPlace, size: int, tag: int) -> bool:
    """Whether a FLAC file ends where its header says; libsndfile reads nothing behind, nor a block that breaks off."""
    if not file.frames:
        return True
    try:
        file.seek(file.frames - 1)
        if len(file.read(1, dtype="float32")) != 1:
            return False
        file.seek(0)
    except soundfile.SoundFileError:
        return False
    return _flac_end(bytes_at(audio, max(0, size - _FLAC_TAIL), _FLAC_TAIL), bytes_at(audio, tag, 26)) <= file.frames


def _flac_end(tail: bytes, head: bytes) -> int:
    """Position behind the last FLAC frame that begins in some last bytes of a file (RFC 9639, section 9.1), or 0."""
    block = int.from_bytes(head[10:12], "big")  # largest block of the stream information, behind "fLaC" and a header
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        header = tail[at : at + 16]
        # two bytes of a compressed frame may look like a sync code; a block size of code 0 is reserved
        if len(header) < 16 or header[1] & 0xFE != 0xF8 or header[3] & 1 or not header[2] >> 4:
            continue
        length = max(1, 8 - (header[4] ^ 0xFF).bit_length())  # bytes of the number, coded as in UTF-8
        if header[4] < 0x80:
            number = header[4]
        else:
            number = header[4] & (0x7F >> length)
            for byte in header[5 : 4 + length]:
                number = number << 6 | byte & 0x3F
        code, end = header[2] >> 4, 4 + length
        extra = {6: 1, 7: 2}.get(code, 0)
        samples = int.from_bytes(header[end : end + extra], "big") + 1 if extra else _flac_block(code)
        end += extra + {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
        if end < len(header) and _crc8(header[:end]) == header[end]:
            return (number if header[1] & 1 else number * block) + samples
    return 0


def _flac_block(code: int) -> int:
    return 192 if code == 1 else 576 << (code - 2) if code < 6 else 256 << (code - 8)


def _crc8(content: bytes) -> int:
    value = 0
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ (0x07 if value & 0x80 else 0)) & 0xFF
    return value


class SoundFileDecoder(Decoder):
    """Audio that libsndfile decodes, with exact seeking.

    Args:
        audio: the file.
        file: the same, opened by `open_soundfile`.

    Raises:
        UnreadableAudioError: no samples, or an impossible sampling rate.
    """

    def __init__(self, audio: AudioPlace, file: Any) -> None:
        self.audio = audio
        self.file = file
        self.rate = int(file.samplerate)
        self.frames: int | None = int(file.frames)
        try:
            check_rate(self.rate)
            if not self.frames:
                raise UnreadableAudioError(f"{audio}: holds no samples.")
        except UnreadableAudioError:
            file.close()
            raise

    def measure(self) -> int:
        assert self.frames is not None
        return self.frames

    def shortfall(self) -> tuple[float, float] | None:
        """Seconds that the header announced and seconds that there are; None if the file is not shorter."""
        lengths = _LENGTHS.search(self.file.extra_info)
        if not lengths or not 0 < int(lengths[2]) < int(lengths[1]) or int(lengths[1]) in _UNKNOWN_LENGTHS:
            return None
        found = self.measure() / self.rate
        return found * int(lengths[1]) / int(lengths[2]), found

    def read(self, start: int, count: int | None) -> np.ndarray:
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
            first, last = position / self.rate, min(end, position + _BLOCK_FRAMES) / self.rate
            raise AudioError(f"{self.audio}: damaged between {first:.1f} and {last:.1f} s.") from error
        return np.concatenate(blocks)

    def close(self) -> None:
        """Release the file."""
        self.file.close()


def _mean_of_channels(block: np.ndarray) -> np.ndarray:
    """Mean over channels of float32 [samples, channels]."""
    if block.shape[1] == 1:
        return block[:, 0]
    if block.shape[1] == 2:  # the usual case: numpy is slow at reducing a short last axis
        return (block[:, 0] + block[:, 1]) / np.float32(2)
    return block.mean(axis=1, dtype=np.float32)
