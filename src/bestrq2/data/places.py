"""Places of audio: a file on disk, or the bytes of one in memory, opened and measured alike."""

from __future__ import annotations

import errno
import io
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypeAlias, cast

from bestrq2.errors import AudioError, BestRQ2Error

# Too many open files, no memory, and disks or servers that fail for a while: not the fault of the audio.
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
_PASSING = (*NO_MORE_FILES, errno.ENOMEM, errno.EIO, errno.ESTALE)


class UnreadableAudioError(AudioError):
    """A recording of which no crop can be used."""


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
        skipped: bytes at the beginning that are left out.
    """

    def __init__(self, audio: AudioBytes, skipped: int = 0) -> None:
        super().__init__()
        # FFmpeg guesses formats by suffix too, and takes other names for addresses.
        self.name = f"audio{PurePosixPath(audio.name).suffix}"
        self._audio = audio
        self._skipped = skipped
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in bytes, counted from the start, from here, or from the end; never before the start."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._audio.size - self._skipped}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = self._audio.read_into(buffer, self._skipped + self._position)
        self._position += count
        return count


def place_size(audio: AudioPlace) -> int:
    """Length in bytes of a file in memory, or of a regular file on disk.

    Raises:
        UnreadableAudioError: missing, or not a regular file, for instance a folder, a pipe or a device.
        AudioError: it cannot be looked at now.
    """
    if isinstance(audio, AudioBytes):
        return audio.size
    try:
        status = audio.stat()
    except FileNotFoundError:
        raise UnreadableAudioError(f"{audio}: the file does not exist.") from None
    except OSError as error:
        raise cannot_open(f"{audio}:", error) from error
    except ValueError as error:
        raise UnreadableAudioError(f"{audio}: cannot be opened ({error}).") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise UnreadableAudioError(f"{audio}: is {kind}, expected an audio file.")
    return status.st_size


def bytes_at(audio: AudioPlace, start: int, count: int) -> bytes:
    """Some bytes of a file; fewer where it ends."""
    try:
        with audio.open("rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise cannot_open(f"{audio}:", error) from error


def is_passing(error: OSError) -> bool:
    """Whether an error is temporary, so that a retry may succeed."""
    return error.errno in _PASSING


def cannot_open(what: object, error: OSError) -> AudioError:
    """The error for something that cannot be opened; an UnreadableAudioError unless another try may do better."""
    kind = AudioError if is_passing(error) else UnreadableAudioError
    return kind(f"{what} cannot be opened ({error.strerror or error}).")
