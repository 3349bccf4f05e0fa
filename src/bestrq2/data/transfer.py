"""Shards from afar: the audio in a remote tar, in one pass, with patience for networks that fail."""

from __future__ import annotations

import http.client
import logging
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from bestrq2.data.audio import AUDIO_SUFFIXES
from bestrq2.errors import BestRQ2Error, ConfigError

logger = logging.getLogger(__name__)

# Answers that may be another one a moment later: timeout, too early, too many requests; and all of the servers' own.
PASSING_ANSWERS = {408, 425, 429}
# What a shell says of a command that it cannot run or does not know.
NOT_RUN = {126, 127}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\x00\x00\x80")
END_OF_ARCHIVE = bytes(512)


@dataclass(frozen=True)
class Patience:
    """How long to bear with a network.

    Attributes:
        waits: seconds before the second, third, ... try; as many tries as these and one more.
        timeout: seconds without a byte after which a connection counts as lost.
    """

    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    timeout: float = 60.0


class TransferError(BestRQ2Error):
    """A URL gave nothing, or broke off.

    Args:
        reason: why.
        lasting: another try would give the same.
    """

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        # webdataset rewrites the arguments of errors that pass through it
        self.reason, self.lasting = reason, lasting

    def __str__(self) -> str:
        return self.reason


class Sample(NamedTuple):
    """One piece of encoded audio.

    Attributes:
        name: of the shard and of the member in it.
        content: its bytes.
    """

    name: str
    content: bytes


def check_url(url: str) -> None:
    """Pass if there is a way to fetch from this kind of URL.

    Raises:
        ConfigError: there is none.
    """
    from webdataset.gopen import gopen_schemes

    known = sorted({"s3", "file", *gopen_schemes} - {"__default__"})
    if urlparse(url).scheme not in known:
        raise ConfigError(f"{url}: there is no way to fetch from it; known are {', '.join(known)}")


class Transfer:
    """The bytes of a URL, as a file that can be read once; an early end is an error.

    Args:
        url: http and https are fetched here, s3 by the program `aws`, all others by webdataset's `gopen`.
        timeout: seconds.

    Raises:
        TransferError: it cannot be opened.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.expected: int | None = None
        self.received = 0
        self.head = self.tail = b""
        try:
            self.stream = self._open(url, timeout)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _explained(error) from error

    def _open(self, url: str, timeout: float) -> Any:
        scheme = urlparse(url).scheme
        if scheme in ("http", "https"):
            response = urlopen(Request(url, headers={"User-Agent": "bestrq2"}), timeout=timeout)
            length = response.headers.get("Content-Length")
            self.expected = int(length) if length else None
            return response
        from webdataset.gopen import Pipe, gopen

        if scheme == "s3":
            return Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode="rb")
        return gopen(url, "rb")

    def read(self, size: int) -> bytes:
        """The next bytes, at most as many as asked for; none at the end.

        Raises:
            TransferError: the connection broke, or the command failed.
        """
        try:
            # The pipe under webdataset's `Pipe`: its own `read` loses the last bytes of a command that failed.
            content: bytes = getattr(self.stream, "stream", self.stream).read(size)
            if not content and hasattr(self.stream, "wait_for_child"):
                self.stream.wait_for_child()
        except (OSError, http.client.HTTPException) as error:
            raise _explained(error, getattr(getattr(self.stream, "proc", None), "returncode", None)) from error
        self.received += len(content)
        if not content and self.expected is not None and self.received < self.expected:
            raise TransferError(f"the connection broke after {self.received:,} of {self.expected:,} bytes")
        self.head = self.head or content[:6]
        self.tail = (self.tail + content)[-512:]
        return content

    @property
    def ended_early(self) -> bool:
        """Whether a tar, read to its end, stopped before the mark of its end."""
        return not self.head.startswith(COMPRESSED) and self.tail != END_OF_ARCHIVE

    def close(self) -> None:
        """Drop the connection; a command that still wrote is not to blame for it."""
        with suppress(OSError):
            self.stream.close()


def _explained(error: Exception, code: int | None = None) -> TransferError:
    if isinstance(error, HTTPError):
        lasting = 400 <= error.code < 500 and error.code not in PASSING_ANSWERS
        return TransferError(f"{error.code} {error.reason}", lasting)
    if code is not None:
        return TransferError(f"the command ended with exit code {code}", code in NOT_RUN)
    if isinstance(error, URLError):
        error = error.reason if isinstance(error.reason, Exception) else error
    if isinstance(error, TimeoutError):
        return TransferError("no answer in time")
    if isinstance(error, FileNotFoundError):
        return TransferError(f"{error.filename} is not there", lasting=True)
    return TransferError(
        getattr(error, "strerror", None) or str(error) or type(error).__name__, type(error) is ValueError
    )


class Shard:
    """The audio of one remote tar, read forwards; members without an audio suffix, and hidden ones, are passed over.

    A connection that breaks is made again and read up to where it was.

    Args:
        url: of the tar.
        patience: with the network.

    Attributes:
        whole: audio members that have gone by, to their last byte.
        ended: there is no more to come; then `whole` is their number.
        failure: why it could not be read to its end; None where it was.
        damage: what is wrong with the tar itself, like an early end; None where nothing is.
        others: suffixes of the members passed over.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience = url, patience
        self.whole = 0
        self.ended = False
        self.failure: TransferError | None = None
        self.damage: str | None = None
        self.others: set[str] = set()
        self._transfer: Transfer | None = None
        self._members: Iterator[dict[str, Any]] = iter(())
        self._begun = self._first = 0

    def window(self, first: int, size: int) -> list[Sample]:
        """Audio members number `first` to `first + size - 1` (fewer at the end), none of which came before."""
        samples: list[Sample] = []
        tries = 0
        while len(samples) < size and not self.ended:
            self._first, before = first + len(samples), self.whole
            try:
                samples.append(self._next())
                self._note_whole()
            except StopIteration:
                self._note_whole()
                self.ended = True
                if self._transfer is not None and self._transfer.ended_early:
                    self.damage = f"ends early, after {self.whole} whole recordings"
            except (tarfile.TarError, EOFError) as error:
                plain = str(error).partition(" @ ")[0]  # webdataset adds the object that it read from
                self.ended, self.damage = True, f"is damaged after {self.whole} whole recordings ({plain})"
            except TransferError as error:
                self.close()
                tries = 0 if self.whole > before else tries
                self._wait(error, tries)
                tries += 1
        if self.ended:
            self.close()
        return samples

    def _next(self) -> Sample:
        if self._transfer is None:
            from webdataset.tariterators import tar_file_iterator

            self._transfer = Transfer(self.url, self.patience.timeout)
            self._begun = 0
            self._members = tar_file_iterator(self._transfer, skip_meta=None, select_files=self._wanted)
        member = next(self._members)
        return Sample(f"{self.url}/{member['fname']}", member["data"])

    def _note_whole(self) -> None:
        self.whole = max(self.whole, self._begun)

    def _wanted(self, name: str) -> bool:
        """Called for every member before its content is fetched."""
        self._note_whole()
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if suffix not in AUDIO_SUFFIXES or path.name.startswith("."):
            self.others.add(suffix or "none")
            return False
        self._begun += 1
        return self._begun > self._first

    def _wait(self, error: TransferError, tries: int) -> None:
        if error.lasting or tries >= len(self.patience.waits):
            self.failure, self.ended = error, True
            return
        wait = self.patience.waits[tries]
        logger.warning("%s: %s; trying again in %g s", self.url, error, wait)
        time.sleep(wait)

    def close(self) -> None:
        """Drop the connection; the next window makes it again."""
        if self._transfer is not None:
            self._transfer.close()
        self._transfer, self._members = None, iter(())
