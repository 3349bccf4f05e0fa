"""Remote shards: a local cache of whole tars with a size limit, which several processes may share.

fsspec fetches them: http(s) always, s3, gs, hf and others where their package is installed. A shard is in the cache
under the hash of its URL, with its index beside it; indexes stay when tars are evicted, so a corpus is indexed once.
Cached shards are not compared with the remote ones again: a changed shard needs a new name.

Environment variables:
    BESTRQ2_CACHE: folder of the cache; ~/.cache/bestrq2 by default.
    BESTRQ2_SHARD_CACHE_GB: size limit of the cached tars in GB; 20 by default.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib
import logging
import os
import tarfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from bestrq2.data.order import WINDOW_BYTES, Order
from bestrq2.data.shards.index import INDEX_SUFFIX, ShardIndex, load_index, stored_index
from bestrq2.data.shards.members import BadShardError, begins_tar
from bestrq2.data.sources import LoaderError, RemoteShard
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.files import cache_folder, is_full, whole_file
from bestrq2.progress import Progress

logger = logging.getLogger(__name__)

DEFAULT_GB = 20.0
# Retries of a transfer: seconds before the second, third, ... attempt.
WAITS = (1.0, 2.0, 4.0, 8.0)
# Seconds without a connection, or without a byte, after which an attempt has failed (http).
CONNECT_SECONDS, READ_SECONDS = 30.0, 60.0
# An attempt has failed, too, if fewer bytes than these arrive in READ_SECONDS.
LEAST_BYTES = 60_000
# Seconds between two looks at a transfer.
_WATCH_SECONDS = 0.2
# Shards fetched at once while a corpus is indexed, or ahead of training.
INDEXED_AT_ONCE, AHEAD_AT_ONCE = 8, 4
# Places in the order that are looked through for remote shards, where few recordings are remote.
_PLACES_AHEAD = 200_000
# 408, 425 and 429 (timeout, too early, too many requests) may be another answer a moment later; other 4xx are final.
PASSING_ANSWERS = (408, 425, 429)
# Compressed tars are unpacked into the cache: first bytes, and the module of the standard library that reads them.
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma"}
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
PACKAGES |= {"hf": "huggingface_hub", "http": "aiohttp requests", "https": "aiohttp requests"}


class UnreachableError(LoaderError):
    """A shard cannot be fetched; the run stops, and can be resumed."""


class TransferError(UnreachableError):
    """A shard cannot be fetched at the moment, because a network, a server or a disk fails."""

    exit_code = 1


def is_remote(spec: str) -> bool:
    """Whether a text is a URL."""
    return "://" in spec


def expand_urls(pattern: str) -> list[str]:
    """URLs that a pattern stands for: braces name each; wildcards are looked up where the server lists files.

    Raises:
        ConfigError: unbalanced braces.
        DataError: nothing fits a wildcard.
    """
    from braceexpand import braceexpand

    try:
        spelled = list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise ConfigError(f"{pattern}: a brace is not closed; write for instance shard-{{000..099}}.tar") from error
    urls: list[str] = []
    for url in spelled:
        protocol = urlsplit(url).scheme
        if "*" not in url or protocol in ("http", "https"):
            urls.append(url)
            continue
        system, path = _file_system(url)
        try:
            found = sorted(system.glob(path))
        except Exception as error:
            raise DataError(f"{url} cannot be listed ({_failure(error)[0]}).") from error
        if not found:
            raise DataError(f"{url}: nothing fits this pattern.")
        urls += [f"{protocol}://{str(name).removeprefix(f'{protocol}://')}" for name in found]
    return urls


def cached_path(url: str) -> Path:
    """Path of a shard in the cache, whether it is there or not."""
    name = PurePosixPath(urlsplit(url).path).name[-60:] or "shard.tar"
    digest = hashlib.blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache_folder() / "remote" / f"{digest}-{name}"


def cache_limit() -> int:
    """Size limit of the cache in bytes.

    Raises:
        ConfigError: BESTRQ2_SHARD_CACHE_GB is not a positive number.
    """
    text = os.environ.get("BESTRQ2_SHARD_CACHE_GB") or str(DEFAULT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e9:
        raise ConfigError(f"BESTRQ2_SHARD_CACHE_GB is {text!r}; it must be a positive number of GB")
    return int(limit * 1e9)


def open_shard(url: str, waits: Sequence[float] | None = None) -> FileIO:
    """A cached shard, open for reading and locked against eviction until it is closed; fetched if it is not there.

    Args:
        url: address of the shard.
        waits: as for `fetch`.

    Raises:
        UnreachableError: it cannot be fetched.
    """
    while True:
        path = fetch(url, waits)
        # Another process may evict it between the two calls.
        with suppress(FileNotFoundError):
            file = FileIO(str(path))
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file.fileno(), fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()


def fetch(url: str, waits: Sequence[float] | None = None) -> Path:
    """Fetch a shard into the cache unless it is there.

    Only one process fetches it; others wait for that one.

    Args:
        url: address of the shard.
        waits: seconds before the second, third, ... attempt; `WAITS` by default.

    Returns:
        Its path in the cache; it appears there whole.

    Raises:
        ConfigError: there is no way to fetch from this kind of URL here.
        UnreachableError: every attempt failed.
    """
    path = cached_path(url)
    if _touch(path):
        return path
    with _cache_errors(path), _locked(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            _download(url, path, WAITS if waits is None else waits)
            _evict(path, cache_limit())
    return path


def _touch(path: Path) -> bool:
    """Set the time of access, by which shards are evicted; False where there is no such file."""
    try:
        changed = path.stat().st_mtime_ns  # stays as it is: it belongs to the index
    except (FileNotFoundError, NotADirectoryError):
        return False
    with suppress(OSError):  # another user's file, or evicted just now
        os.utime(path, ns=(time.time_ns(), changed))
    return True


@contextmanager
def _cache_errors(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        remedy = "lower BESTRQ2_SHARD_CACHE_GB, or set" if is_full(error) else "set"
        raise TransferError(
            f"{path.parent}: the cache of remote shards cannot be written ({error.strerror or error}); {remedy} "
            "BESTRQ2_CACHE to another folder, and resume the run."
        ) from error


@contextmanager
def _locked(name: Path) -> Iterator[None]:
    """An exclusive lock between processes."""
    with name.open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Processes forked meanwhile have a copy of the descriptor, which would keep the lock.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _evict(kept: Path, limit: int) -> None:
    """Remove shards, the least recently used first, until the rest is within the limit; `kept` and open ones stay."""
    with _locked(kept.with_name(".evict.lock")):
        entries = []
        for entry in os.scandir(kept.parent):
            with suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(".tmp") and time.time() - status.st_mtime > 86_400:
                    os.unlink(entry.path)  # of a process that was killed
                elif not entry.name.startswith(".") and not entry.name.endswith(INDEX_SUFFIX):
                    entries.append((status.st_atime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= limit:
                return
            if path != str(kept) and _unused(path):
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size


def _unused(path: str) -> bool:
    """Whether no process has a shard open."""
    try:
        with FileIO(path) as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks; what is open stays readable
        return True


def _download(url: str, path: Path, waits: Sequence[float]) -> None:
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    for pause in (*waits, None):
        try:
            with whole_file(path) as temporary:
                _transfer(url, temporary, begins_tar)
            return
        except Exception as error:
            if isinstance(error, ConfigError) or (isinstance(error, OSError) and is_full(error)):
                raise
            reason, final = _failure(error)
            if final or pause is None:
                kind = UnreachableError if final else TransferError
                raise kind(f"{url} cannot be fetched: {reason}.") from error
            logger.warning("%s: %s; trying again in %g s", url, reason, pause)
        time.sleep(pause)


def _transfer(url: str, target: Path, is_wanted: Callable[[bytes], bool]) -> None:
    """Copy a remote file to a path, unpacked; only its beginning where `is_wanted(first bytes)` is False."""
    system, path = _file_system(url)
    limit = max(cache_limit(), int(DEFAULT_GB * 1e9))
    if getattr(system, "async_impl", False):
        transfer = asyncio.run_coroutine_threadsafe(system._get_file(path, str(target)), system.loop)
        _watch(transfer, target, is_wanted, limit)
    else:
        system.get_file(path, str(target))
    start = _head(target)
    for magic, module in COMPRESSED.items():
        if start.startswith(magic):
            packed = target.with_name(f"{target.name}.packed.tmp")
            target.replace(packed)
            try:
                with importlib.import_module(module).open(packed) as source, target.open("wb") as plain:
                    while block := source.read(1 << 20):
                        plain.write(block)
                        _check_size(plain.tell(), limit)
            finally:
                packed.unlink(missing_ok=True)


def _watch(transfer: Future[None], target: Path, is_wanted: Callable[[bytes], bool], limit: int) -> None:
    """Wait for a transfer, and cancel it where it need not or will not come to its end.

    Raises:
        TimeoutError: fewer than `LEAST_BYTES` arrived in `READ_SECONDS`.
        ValueError: more than `limit` bytes arrived.
    """
    before, deadline, is_known = 0, time.monotonic() + READ_SECONDS, False
    try:
        while not wait([transfer], _WATCH_SECONDS).done:
            size = target.stat().st_size if target.exists() else 0
            if size >= tarfile.BLOCKSIZE and not is_known:
                if not is_wanted(_head(target)):
                    return
                is_known = True
            _check_size(size, limit)
            if time.monotonic() > deadline:
                if size - before < LEAST_BYTES:
                    raise TimeoutError
                before, deadline = size, time.monotonic() + READ_SECONDS
        transfer.result()
    finally:
        transfer.cancel()


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"it has more than {limit / 1e9:g} GB; raise BESTRQ2_SHARD_CACHE_GB if that is right")


def _head(path: Path) -> bytes:
    """First block of a file."""
    with path.open("rb") as file:
        return file.read(tarfile.BLOCKSIZE)


def _file_system(url: str) -> tuple[Any, str]:
    """File system of fsspec, and the path in it.

    Raises:
        ConfigError: there is none for this kind of URL, or its package is not installed.
    """
    from fsspec.core import url_to_fs

    protocol = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        # The default is 5 minutes for a whole file.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        headers = {"User-Agent": "bestrq2"}
        options = {"client_kwargs": {"timeout": timeout, "headers": headers, "trace_configs": [_redirects()]}}
    try:
        system, path = url_to_fs(url, **options)
        return system, path
    except ImportError as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package else str(error).rstrip(".")
        raise ConfigError(f"{url}: {protocol}:// needs a package that is not installed; {remedy}") from error
    except ValueError as error:
        known = ", ".join(sorted({"http", "https", "s3", "gs", "hf", "file"}))
        raise ConfigError(f"{url}: there is no way to fetch from {protocol}://; known are {known}") from error


@cache
def _redirects() -> Any:
    """Configuration of aiohttp that checks redirects."""
    import aiohttp

    async def check(session: Any, context: Any, request: Any) -> None:
        check_redirect(str(request.url), request.response.headers.get("Location", ""))

    checking = aiohttp.TraceConfig()
    checking.on_request_redirect.append(check)
    return checking


def check_redirect(url: str, location: str) -> None:
    """Check that a redirect leads neither from https to a connection in the clear, nor to another kind of URL.

    Raises:
        ValueError: it does.
    """
    before, after = urlsplit(url).scheme, urlsplit(location).scheme or urlsplit(url).scheme
    if after not in ("https", before):
        raise ValueError(f"its server redirects to {location[:200]!r}, which is not {before}")


def _failure(error: Exception) -> tuple[str, bool]:
    """Why a transfer failed, and whether another attempt would give the same."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError):
        return "404 Not Found", True
    if isinstance(error, PermissionError):
        return f"access denied ({error}); check the credentials", True
    if isinstance(status, int):
        reason = getattr(error, "message", "") or str(error)
        return f"{status} {reason}".strip(), 400 <= status < 500 and status not in PASSING_ANSWERS
    if isinstance(error, TimeoutError):
        return "no answer in time", False
    if isinstance(error, ValueError):
        return str(error).rstrip("."), True
    if type(error).__name__ == "ClientPayloadError":  # of aiohttp, which only http needs
        return "the connection broke", False
    inner = getattr(error, "os_error", None)
    if isinstance(inner, OSError):  # no such host, or nothing answers at its port
        code = inner.errno or 0  # below 0 for errors of look-ups
        reason = os.strerror(code) if code > 0 else inner.strerror
        return f"{reason}; check the address, and that its server runs", False
    reason = getattr(error, "strerror", None) or str(error)
    return " ".join(str(reason).split()).rstrip(".") or type(error).__name__, False


def shard_index(url: str, waits: Sequence[float] | None = None) -> ShardIndex:
    """Index of a remote shard: that of the cache, else the one beside the shard, else the shard is fetched and indexed.

    Raises:
        BadShardError: the shard is not a tar with audio.
        UnreachableError: it cannot be fetched.
    """
    path = cached_path(url)
    place = path.with_name(path.name + INDEX_SUFFIX)
    if (stored := stored_index(place)) is not None:
        return stored
    if "?" not in url:
        with suppress(Exception):
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(place) as temporary:
                _transfer(url + INDEX_SUFFIX, temporary, lambda head: head.startswith(b"PAR1"))
            if (stored := stored_index(place)) is not None:
                return stored
    with open_shard(url, waits):
        try:
            return load_index(path)
        except BadShardError as error:
            raise type(error)(str(error).replace(str(path), url)) from error


def shard_indexes(urls: Sequence[str]) -> Iterator[ShardIndex | BestRQ2Error]:
    """Load the indexes of shards, several at once, in their order; an error in place of an index that is missing.

    A shard without an index is fetched, so this takes as long as the download where nothing is indexed yet. The first
    shard is tried once only, so that a mistyped address is noticed at once.
    """

    def one(number: int) -> ShardIndex | BestRQ2Error:
        try:
            return shard_index(urls[number], None if number else ())
        except BestRQ2Error as error:
            return error

    results: list[Future[ShardIndex | BestRQ2Error]] = [Future() for _ in urls]
    waiting = deque(range(1, len(urls)))

    def work() -> None:
        with suppress(IndexError):
            while True:
                number = waiting.popleft()
                results[number].set_result(one(number))

    yield one(0)
    # Threads of a pool would keep an interrupted program alive until their downloads are done.
    for _ in range(min(INDEXED_AT_ONCE, len(waiting))):
        threading.Thread(target=work, daemon=True).start()
    try:
        with Progress("index", len(urls), "shards", done=1, leave=False) as progress:
            for result in results[1:]:
                yield result.result()
                progress.advance()
    finally:
        waiting.clear()


class FetchAhead:
    """Fetches the remote shards that training needs next, in threads, while it uses those of the present window.

    Args:
        order: order of the rows; not used elsewhere.
        shards_of: remote shards of a row, from its epoch and number.
        start: place in the order from which on rows are used.
    """

    def __init__(self, order: Order, shards_of: Callable[[int, int], Iterable[RemoteShard]], start: int) -> None:
        self._order, self._shards_of, self._place = order, shards_of, start
        self._position = start
        self._moved, self._ended = threading.Event(), False
        self._slots = threading.Semaphore(AHEAD_AT_ONCE)
        threading.Thread(target=self._run, daemon=True).start()

    def advance(self, position: int) -> None:
        """Report the place in the order that is used next."""
        self._position = position
        self._moved.set()

    def end(self) -> None:
        """Stop fetching."""
        self._ended = True
        self._moved.set()

    def _run(self) -> None:
        # Shards that are needed after the present place, and those of this window and the next.
        ahead: deque[tuple[int, int]] = deque()
        seen: OrderedDict[str, int] = OrderedDict()
        while not self._ended:
            while ahead and ahead[0][0] < self._position:
                ahead.popleft()
            if sum(size for _, size in ahead) >= WINDOW_BYTES or self._place - self._position > _PLACES_AHEAD:
                self._moved.wait(10.0)
                self._moved.clear()
                continue
            for shard in self._shards_of(*self._order(self._place)):
                if shard.url not in seen:
                    ahead.append((self._place, shard.size))
                    self._slots.acquire()
                    threading.Thread(target=self._fetch, args=(shard.url,), daemon=True).start()
                    while seen and sum(seen.values()) + shard.size > 2 * WINDOW_BYTES:
                        seen.popitem(last=False)
                seen[shard.url] = shard.size
                seen.move_to_end(shard.url)
            self._place += 1

    def _fetch(self, url: str) -> None:
        try:
            fetch(url)
        except BestRQ2Error as error:
            # The process that reads the shard tries again, and reports the error.
            logger.debug("%s", error)
        finally:
            self._slots.release()


_coming: set[str] = set()


def fetch_soon(url: str) -> None:
    """Fetch a shard in a thread, such as the one after that which is being read; one thread for each shard."""

    def work() -> None:
        with suppress(BestRQ2Error):
            fetch(url)
        _coming.discard(url)

    if url not in _coming and not cached_path(url).exists():
        _coming.add(url)
        threading.Thread(target=work, daemon=True).start()
