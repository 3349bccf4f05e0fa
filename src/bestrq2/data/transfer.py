"""Shards from afar: the audio in a remote tar, in one pass, with patience for networks that fail."""

from __future__ import annotations

import http.client
import logging
import math
import shutil
import socket
import string
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from subprocess import CalledProcessError
from typing import Any, NamedTuple, Self
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlparse, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from bestrq2.data.audio import AUDIO_SUFFIXES
from bestrq2.data.commands import Command
from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.text import counted

logger = logging.getLogger(__name__)

# Answers that may be another one a moment later: timeout, too early, too many requests; and all of the servers' own.
PASSING_ANSWERS = {408, 425, 429}
# What a shell says of a command that it cannot run or does not know.
NOT_RUN = {126, 127}
# Long names and pax records take less; a header that claims more is damaged, and would be read into memory.
HEADER_LIMIT = 1 << 20
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
REST_BLOCK = 1 << 16
# Bytes of the longest recording that is taken into memory.
MEMBER_LIMIT = 1 << 30
# What `tarfile` and the decompressors raise where the bytes make no sense.
DAMAGE = (tarfile.TarError, EOFError, ValueError, TypeError, OverflowError)


@dataclass(frozen=True)
class Patience:
    """How long to bear with a network.

    Attributes:
        waits: seconds before the second, third, ... try; as many tries as these and one more.
        timeout: seconds without a byte after which a connection counts as lost.
        absent: whether to try again where there is no such host, or nothing answers at its port.
    """

    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    timeout: float = 60.0
    absent: bool = True


class TransferError(BestRQ2Error):
    """A URL gave nothing, or broke off.

    Args:
        reason: why.
        lasting: another try would give the same.
        absent: there is no such host, or nothing answers at its port.
    """

    def __init__(self, reason: str, lasting: bool = False, absent: bool = False) -> None:
        super().__init__(reason)
        self.lasting, self.absent = lasting, absent


class Sample(NamedTuple):
    """One piece of encoded audio.

    Attributes:
        name: of the shard and of the member in it.
        content: its bytes.
        problem: why there are none; "" where they are there.
    """

    name: str
    content: bytes
    problem: str = ""


def check_url(url: str) -> None:
    """Pass if there is a way to fetch from this kind of URL.

    Raises:
        ConfigError: there is none, or it needs a program that is not installed.
    """
    from webdataset.gopen import gopen_schemes

    known = sorted({"s3", "file", *gopen_schemes} - {"__default__"})
    scheme = urlparse(url).scheme
    if scheme not in known:
        raise ConfigError(f"{url}: there is no way to fetch from it; known are {', '.join(known)}")
    if scheme == "s3" and shutil.which("aws") is None:
        raise ConfigError(f"{url}: s3:// needs the program 'aws' (the AWS CLI), which is not on the PATH; install it.")


class Transfer:
    """The bytes of a URL, as a file that can be read once; an early end is an error.

    Args:
        url: http and https are fetched here, s3 by the program `aws`, all others by webdataset's `gopen`.
        timeout: seconds without a byte.

    Raises:
        TransferError: it cannot be opened.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.expected: int | None = None
        self.received = 0
        try:
            self.stream = self._open(url, timeout)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _explained(error) from error

    def _open(self, url: str, timeout: float) -> Any:
        scheme = urlparse(url).scheme
        if scheme in ("http", "https"):
            response = urlopen(Request(_encoded(url), headers={"User-Agent": "bestrq2"}), timeout=timeout)
            length = response.headers.get("Content-Length")
            self.expected = int(length) if length else None
            return response
        from webdataset.gopen import Pipe, gopen

        if scheme == "pipe":
            stream = Pipe(url.removeprefix("pipe:"), mode="rb", shell=True, ignore_status=[141], start_new_session=True)
        elif scheme == "s3":
            stream = Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode="rb", start_new_session=True)
        else:
            stream = gopen(url, "rb")
        return Command(stream, timeout) if isinstance(stream, Pipe) else stream

    def read(self, size: int) -> bytes:
        """The next bytes, at most as many as asked for; none at the end.

        Raises:
            TransferError: the connection broke, or the command stalled or failed.
        """
        try:
            content: bytes = self.stream.read(size)
        except (OSError, http.client.HTTPException, CalledProcessError) as error:
            raise _explained(error) from error
        self.received += len(content)
        if not content and self.expected is not None and self.received < self.expected:
            raise TransferError(f"the connection broke after {self.received:,} of {self.expected:,} bytes")
        return content

    def close(self) -> None:
        """Drop the connection, and end the command."""
        with suppress(OSError):
            self.stream.close()


def _encoded(url: str) -> str:
    """A URL in ASCII; what is encoded already stays as it is."""
    parts = urlsplit(url)
    if not parts.netloc.isascii():
        host, colon, port = parts.netloc.partition(":")
        parts = parts._replace(netloc=host.encode("idna").decode() + colon + port)
    return quote(urlunsplit(parts), safe=string.punctuation)


def _explained(error: Exception) -> TransferError:
    if isinstance(error, HTTPError):
        lasting = 400 <= error.code < 500 and error.code not in PASSING_ANSWERS
        return TransferError(f"{error.code} {error.reason}", lasting)
    if isinstance(error, CalledProcessError):
        return TransferError(f"the command ended with exit code {error.returncode}", error.returncode in NOT_RUN)
    if isinstance(error, URLError):
        error = error.reason if isinstance(error.reason, Exception) else error
    if isinstance(error, TimeoutError):
        return TransferError("no answer in time")
    if isinstance(error, FileNotFoundError):
        return TransferError(f"{error.filename} is not there", lasting=True)
    if isinstance(error, ConnectionRefusedError | socket.gaierror):
        return TransferError(f"{error.strerror or error}; check the address, and that its server runs", absent=True)
    return TransferError(
        getattr(error, "strerror", None) or str(error) or type(error).__name__,
        isinstance(error, ValueError | http.client.InvalidURL),
    )


class _EndsEarlyError(tarfile.ReadError):
    """There is no end mark."""


class _GoesOnError(tarfile.ReadError):
    """There is more behind the end mark."""


class _Header(tarfile.TarInfo):
    """A header in a tar; one that is damaged is an error, where `tarfile` alone takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type in EXTENSIONS and info.size > HEADER_LIMIT:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        start = tarfile_.offset
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            if start == 0:
                raise
            raise _EndsEarlyError(str(error)) from error
        except (tarfile.InvalidHeaderError, tarfile.SubsequentHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"no header at byte {start:,}") from error


class Shard:
    """The audio of one remote tar, read forwards; members without an audio suffix, and hidden ones, are passed over.

    A connection that breaks is made again and read up to where it was.

    Args:
        url: of the tar.
        patience: with the network.

    Attributes:
        whole: audio members that were read, to their last byte.
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
        self._members: Iterator[Sample] = iter(())

    def window(self, number: int, clips: int, size: float = math.inf) -> tuple[int, list[Sample]]:
        """The window that holds an audio member: the number of its first member, and its members.

        Windows follow one another from the first member on; each ends with the member that makes it so many clips or
        bytes, whichever comes first. There are no members if the shard ended before.

        Args:
            number: of the member; not before the window given last.
            clips: members in a window; the same in every call.
            size: bytes in a window; the same in every call.
        """
        while True:
            first = self.whole
            samples = self._next_window(clips, size)
            if not samples or number < first + len(samples):
                return first, samples

    def _next_window(self, clips: int, size: float) -> list[Sample]:
        samples: list[Sample] = []
        held, tries, reached = 0, 0, self.whole
        while len(samples) < clips and held < size and not self.ended:
            try:
                samples.append(self._next())
                self.whole += 1
                held += len(samples[-1].content)
            except StopIteration:
                self.ended = True
            except TransferError as error:
                self.close()
                tries, reached = (0 if self.whole > reached else tries), self.whole
                self._wait(error, tries)
                tries += 1
            except DAMAGE as error:
                self.ended, self.damage = True, self._described(error)
        if self.ended:
            self.close()
        return samples

    def _described(self, error: Exception) -> str:
        if isinstance(error, _EndsEarlyError):
            return f"ends early, after {counted(self.whole, 'whole recording')}"
        if isinstance(error, _GoesOnError):
            some = counted(self.whole, "recording")
            return f"goes on behind its end mark, after {some}: damaged, or several tars joined by cat"
        return f"is damaged after {counted(self.whole, 'whole recording')} ({error})"

    def _next(self) -> Sample:
        if self._transfer is None:
            self._transfer = Transfer(self.url, self.patience.timeout)
            self._members = self._read(self._transfer, self.whole)
        return next(self._members)

    def _read(self, transfer: Any, known: int) -> Iterator[Sample]:
        """All audio members but the first `known` ones."""
        text: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
        with tarfile.open(fileobj=transfer, mode="r|*", tarinfo=_Header, **text) as tar:
            stream: Any = tar.fileobj
            passed = 0
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]
                if member.isreg() and self._is_audio(member.name):
                    passed += 1
                    if passed > known:
                        yield self._sample(stream, member)
            # A damaged header of zeros looks like the end mark, and so does that of the first of two tars joined.
            while block := stream.read(REST_BLOCK):
                if block.count(0) != len(block):
                    raise _GoesOnError

    def _sample(self, stream: Any, member: tarfile.TarInfo) -> Sample:
        name = f"{self.url}/{member.name}"
        if member.issparse():
            return Sample(name, b"", "is stored as a sparse file; pack it without holes")
        if member.size > MEMBER_LIMIT:
            return Sample(name, b"", f"holds {member.size:,} bytes, {MEMBER_LIMIT:,} is the most; cut it into parts")
        stream.seek(member.offset_data)
        content = stream.read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return Sample(name, content)

    def _is_audio(self, name: str) -> bool:
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if suffix in AUDIO_SUFFIXES and not path.name.startswith("."):
            return True
        self.others.add(suffix or "none")
        return False

    def _wait(self, error: TransferError, tries: int) -> None:
        pointless = error.lasting or (error.absent and not self.patience.absent)
        if pointless or tries >= len(self.patience.waits):
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
