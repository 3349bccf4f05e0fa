"""Decoders: one mono view of any audio, whatever reads it. libsndfile first, FFmpeg (PyAV) where that cannot.

MP3 goes to FFmpeg too: libsndfile's decoder guesses the length of files without a header for it, and writes notes to
stderr when it seeks in sound ones.

Each decodes only the asked-for span and averages channels as it goes, so a long or many-channelled file costs no more
memory than the span. Positions and counts are in frames (samples per channel) at the file's own rate.
"""

from __future__ import annotations

import errno
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from bestrq2.data.completeness import declared_bytes, is_mpeg_audio
from bestrq2.data.decoder import (
    ArrayDecoder,
    AudioBytes,
    AudioPlace,
    Decoder,
    UnreadableAudioError,
    mixed_down,
    to_float32,
    truncated,
)
from bestrq2.data.ffmpeg import AvDecoder
from bestrq2.errors import AudioError

__all__ = [
    "ArrayDecoder",
    "AudioBytes",
    "AudioPlace",
    "Decoder",
    "SoundFileDecoder",
    "UnreadableAudioError",
    "cannot_open",
    "is_passing",
    "mixed_down",
    "open_decoder",
    "to_float32",
]

BLOCK_FRAMES = 1 << 18
# libsndfile's log of headers that promise more than the file holds; the sizes of 2 GB and more are those that writers
# into a pipe leave behind (0x7FFFF000, 0x80000000, 0xFFFFFFFF).
PROMISE = re.compile(r"^\s*(?:data|SSND|BODY|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
PIPED_BYTES = 0x7FFF0000
# Too many open files, no memory, and disks or servers that fail for a while: no fault of the audio.
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
PASSING = (*NO_MORE_FILES, errno.ENOMEM, errno.EIO, errno.ESTALE)


def is_passing(error: OSError) -> bool:
    """Whether the same may work a moment later."""
    return error.errno in PASSING


def cannot_open(what: object, error: OSError) -> AudioError:
    """The sentence that something cannot be opened; an UnreadableAudioError unless another try may do better."""
    kind = AudioError if is_passing(error) else UnreadableAudioError
    return kind(f"{what} cannot be opened ({error.strerror or error}).")


def open_decoder(audio: AudioPlace) -> Decoder:
    """Decoder for a file, on disk or in memory; the caller closes it.

    Raises:
        UnreadableAudioError: missing, empty, truncated, not a regular file, or not audio.
        AudioError: it cannot be opened now, for instance because too many files are open.
    """
    size = audio.size if isinstance(audio, AudioBytes) else _regular_size(audio)
    if size == 0:
        raise UnreadableAudioError(f"{audio}: the file is empty (0 bytes).")
    try:
        declared = declared_bytes(audio)
        mpeg = is_mpeg_audio(audio)
    except OSError as error:
        raise cannot_open(f"{audio}:", error) from error
    if declared is not None and declared > size:
        raise truncated(audio, f"its headers promise {declared:,} bytes, {size:,} are there")
    # libsndfile's MPEG decoder writes to the terminal when it meets what is not MPEG.
    if mpeg or str(audio).lower().endswith((".mp3", ".mp2")):
        return FFmpegDecoder(audio, verified=declared is not None)
    try:
        file = soundfile.SoundFile(audio.open() if isinstance(audio, AudioBytes) else str(audio))
    except (soundfile.SoundFileError, TypeError, ValueError):
        return FFmpegDecoder(audio, verified=declared is not None)
    # A stream written into a pipe has no length for libsndfile, and bytes of any kind are RAW to it if they are called
    # .au, .snd or the like.
    if file.format in ("MP3", "RAW") or (size > 1024 and not 0 < file.frames < 1 << 62):
        file.close()
        return FFmpegDecoder(audio, verified=declared is not None)
    return SoundFileDecoder(audio, file)


def _regular_size(path: Path) -> int:
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


class FFmpegDecoder(AvDecoder):
    """What FFmpeg reads, where a file that it may not open for now is not taken for one that is no audio."""

    def _open(self) -> Any:
        try:
            return super()._open()
        except UnreadableAudioError as error:
            # Of damaged files FFmpeg says too that they could not be read, or that memory does not suffice.
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in NO_MORE_FILES:
                raise cannot_open(f"{self.audio}:", cause) from cause
            raise


def _mean_of_channels(block: np.ndarray) -> np.ndarray:
    """float32 [samples, channels] to [samples]; two channels, the usual case, without numpy's slow short reduction."""
    if block.shape[1] == 1:
        return block[:, 0]
    if block.shape[1] == 2:
        return (block[:, 0] + block[:, 1]) / np.float32(2)
    return block.mean(axis=1, dtype=np.float32)


class SoundFileDecoder:
    """What libsndfile reads: WAV, FLAC, Ogg, Opus, AIFF, AU, CAF and others, with exact seeking."""

    def __init__(self, audio: AudioPlace, file: Any) -> None:
        self.audio = audio
        self.file = file
        self.rate = int(file.samplerate)
        self.channels = int(file.channels)
        self.frames: int | None = int(file.frames)
        try:
            self._check()
        except UnreadableAudioError:
            file.close()
            raise

    def _check(self) -> None:
        if self.rate <= 0:
            raise UnreadableAudioError(f"{self.audio}: declares a sampling rate of {self.rate} Hz.")
        if not self.frames:
            raise UnreadableAudioError(f"{self.audio}: holds no samples.")
        log = self.file.extra_info
        for promised, present in ((int(p), int(f)) for p, f in PROMISE.findall(log)):
            if present + 64 < promised < PIPED_BYTES:
                raise truncated(self.audio, f"its headers promise {promised:,} bytes, {present:,} are there")
        if "truncated file" in log:
            raise truncated(self.audio, "its headers promise more than is there")
        if self.file.format == "FLAC":
            self._check_end()

    def _check_end(self) -> None:
        try:
            self.file.seek(self.measure() - 1)
            found = len(self.file.read(1, dtype="float32"))
            self.file.seek(0)
        except soundfile.SoundFileError:
            found = 0
        if not found:
            raise truncated(self.audio, f"its header promises {self.frames:,} samples, the last of them are missing")

    def measure(self) -> int:
        """Length in samples per channel."""
        assert self.frames is not None
        return self.frames

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`, `count` of them (None: all) or as many as there are.

        Raises:
            AudioError: the span cannot be decoded or is not there.
        """
        end = self.measure() if count is None else min(self.measure(), start + count)
        blocks = [np.zeros(0, np.float32)]
        position = start
        try:
            if position < end:
                self.file.seek(position)
            while position < end:
                block = self.file.read(min(BLOCK_FRAMES, end - position), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(_mean_of_channels(block))
                position += len(block)
        except soundfile.SoundFileError as error:
            raise AudioError(f"{self.audio}: damaged at about {position / self.rate:.1f} s.") from error
        if position < end:
            promised = f"its header promises {self.frames:,} samples"
            raise truncated(self.audio, f"{promised}, {position:,} could be decoded")
        return np.concatenate(blocks)

    def close(self) -> None:
        """Release the file."""
        self.file.close()
