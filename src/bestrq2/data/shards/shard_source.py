"""WebDataset tars as a source, local or remote: any clip at any time; of plain PCM only the bytes of the crop."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.data.audio import errors_named, open_audio
from bestrq2.data.decoders import Decoder
from bestrq2.data.order import Parts
from bestrq2.data.places import AudioBytes, UnreadableAudioError
from bestrq2.data.shards import remote
from bestrq2.data.shards.files import TarFiles
from bestrq2.data.shards.index import IndexRows, ShardIndex, joined, load_index, problem_of
from bestrq2.data.shards.members import BadShardError
from bestrq2.data.sources import RemoteShard, Source, Stamp
from bestrq2.data.waveforms import check_rate, to_float32
from bestrq2.errors import BestRQ2Error, DataError
from bestrq2.progress import Progress
from bestrq2.text import counted

logger = logging.getLogger(__name__)

# Bytes of the longest JSON that is read: the description of a clip takes less than any file called .json may have.
_MOST_JSON = 1 << 24


@dataclass
class PcmDecoder(Decoder):
    """Decoder of 16-bit mono PCM in a tar; only what is asked for is read.

    Attributes:
        files: contents of the tars.
        tar: number of the tar.
        start: offset of the first sample, in bytes from the tar's beginning.
        frames: number of samples.
        rate: sampling rate in Hz.
    """

    files: TarFiles
    tar: int
    start: int
    frames: int | None
    rate: int

    def measure(self) -> int:
        assert self.frames is not None
        return self.frames

    def samples(self, start: int, count: int | None) -> np.ndarray:
        """int16 [samples] from `start`, `count` of them (None: all).

        Raises:
            UnreadableAudioError: the tar differs from the one that was indexed.
        """
        end = self.measure() if count is None else min(self.measure(), start + count)
        return self.files.read(self.tar, self.start + 2 * start, 2 * max(0, end - start)).view("<i2")

    def read(self, start: int, count: int | None) -> np.ndarray:
        return to_float32(self.samples(start, count))


class Int16Decoder(PcmDecoder):
    """Decoder that leaves 16-bit PCM as it is."""

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono int16 [samples] from `start`; see `samples`."""
        return self.samples(start, count)


@dataclass(frozen=True)
class TarMember(AudioBytes):
    """An audio file within a tar; only what the decoder asks for is read.

    Attributes:
        files: contents of the tars.
        tar: number of the tar.
        start: offset of the file, in bytes from the tar's beginning.
        length: its length in bytes.
    """

    files: TarFiles
    tar: int
    start: int
    length: int

    @property
    def size(self) -> int:
        return self.length

    def read_into(self, buffer: Any, position: int) -> int:
        piece = memoryview(buffer)[: max(0, self.length - position)]
        try:
            if len(piece):
                self.files.read_into(piece, self.tar, self.start + position)
        except BestRQ2Error as error:  # of the tar, or of the network; C code cannot pass it on
            self.failures.append(error)
            return 0
        return len(piece)


@dataclass(frozen=True)
class ShardSource(Source):
    """Clips of tars; `open_shards` makes it. It can be pickled, and used in forked and spawned processes.

    Attributes:
        name: origin of the clips.
        tars: paths or URLs of the shards.
        starts: int64 [tars + 1], number of the first clip of each.
        index: index of all clips in a row.
        files: contents of the tars.
    """

    name: str
    tars: tuple[str, ...]
    starts: np.ndarray
    index: ShardIndex
    files: TarFiles = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def _tar(self, clip: int) -> int:
        return int(self.starts.searchsorted(clip, side="right")) - 1

    def describe(self, index: int) -> str:
        """The tar's path and the member's name, such as "train/000001.tar/clip17.wav"; of an unusable tar its path."""
        tar = self.tars[self._tar(index)]
        return f"{tar}/{self.index.member(index)}" if self.index.audio_offset[index] else tar

    def parts(self) -> Parts:
        return Parts(self.starts, np.array([stamp.size for stamp in self.files.stamps], np.int64))

    def is_remote(self) -> bool:
        return any(map(remote.is_remote, self.tars))

    def remote_shard(self, index: int) -> RemoteShard | None:
        tar = self._tar(index)
        url = self.tars[tar]
        return RemoteShard(url, self.files.stamps[tar].size) if remote.is_remote(url) else None

    def _check(self, index: int) -> None:
        """Check that the index states no problem of a clip.

        Raises:
            UnreadableAudioError: it cannot; the sentence does not name the clip yet.
        """
        problem = self.index.problem[index]
        if problem:
            raise UnreadableAudioError(f"{self.index.problems[problem]}.")

    def _pcm(self, index: int, decoder: type[PcmDecoder]) -> PcmDecoder:
        """A decoder of that kind for a clip of plain PCM."""
        self._check(index)
        frames, rate = int(self.index.frames[index]), int(self.index.sampling_rate[index])
        check_rate(rate)
        return decoder(self.files, self._tar(index), int(self.index.pcm_offset[index]), frames, rate)

    def member(self, index: int) -> TarMember:
        """The audio file of a clip.

        Raises:
            AudioError: it cannot be used.
        """
        with errors_named(self.describe(index)):
            self._check(index)
        start, length = int(self.index.audio_offset[index]), int(self.index.audio_length[index])
        return TarMember(self.describe(index), b"", self.files, self._tar(index), start, length)

    @contextmanager
    def opened(self, index: int) -> Iterator[Decoder]:
        following = self._tar(index) + 1
        if following < len(self.tars) and remote.is_remote(self.tars[following]):
            # Whole recordings are mostly read in their order.
            remote.fetch_soon(self.tars[following])
        with self._decoder(index) as decoder:
            yield decoder

    @contextmanager
    def _decoder(self, index: int) -> Iterator[Decoder]:
        with errors_named(self.describe(index)):
            if self.index.sampling_rate[index]:
                yield self._pcm(index, PcmDecoder)
                return
            with open_audio(self.member(index)) as decoder:
                yield decoder

    def metadata(self, index: int) -> dict[str, Any]:
        """The clip's JSON member; empty where there is none, or where it is not a JSON object; see `json`."""
        found = self.json(index)
        return found if isinstance(found, dict) else {}

    def json(self, index: int) -> Any:
        """Content of the clip's JSON member; None where there is none, or where it is not JSON.

        Raises:
            UnreadableAudioError: the tar differs from the one that was indexed.
        """
        start, length = int(self.index.json_offset[index]), int(self.index.json_length[index])
        if not 0 < length <= _MOST_JSON:
            return None
        with errors_named(self.describe(index)):
            content = self.files.read(self._tar(index), start, length)
        try:
            return json.loads(content.tobytes().decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            return None

    @contextmanager
    def unconverted(self, index: int, sampling_rate: int) -> Iterator[Decoder]:
        if self.index.sampling_rate[index] != sampling_rate:
            with self._decoder(index) as decoder:
                yield decoder
            return
        try:
            yield self._pcm(index, Int16Decoder)
        except Exception:
            with errors_named(self.describe(index)):  # only here: describing every clip takes time
                raise

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        index = self.index
        known = (index.sampling_rate > 0) | (index.problem > 0)
        return np.where(known, index.frames, -1), index.sampling_rate.astype(np.int64)

    def stamp(self, index: int) -> Stamp:
        """Tar and member, and size and time of change of the tar."""
        stamp = self.files.stamps[self._tar(index)]
        return Stamp(os.path.abspath(self.describe(index)), stamp.size, stamp.mtime_ns)


def open_shards(tars: Sequence[str | Path], name: str) -> ShardSource:
    """Open the clips of tars, in the order of the tars and within them; tars without an index are indexed first.

    A bad tar does not stop a job if others are good. Of one that breaks off, truncated or damaged, the whole clips
    before that are used; an empty one, or what is not a tar, gives none. Either has one more entry in the source,
    behind its clips, which is rejected with the reason like a bad file. Second clips of the same key in a tar, and
    others that cannot be used, are rejected in the same way.

    Args:
        tars: paths or URLs of the tars.
        name: origin of the clips, for messages.

    Raises:
        DataError: a tar is missing or cannot be opened or fetched, or not one of them is good.
    """
    paths = tuple(str(tar) for tar in tars)
    if not paths:
        raise DataError(f"{name}: no tars there; give at least one.")
    indices: list[ShardIndex] = []
    bad: list[str] = []
    for path, found in zip(paths, _indices(paths), strict=True):
        if isinstance(found, BadShardError):
            bad.append(str(found))
            rows = IndexRows()
            rows.add_damage(problem_of(found, path))
            found = rows.index()
        elif isinstance(found, BestRQ2Error):
            raise found
        indices.append(found)
    if len(bad) == len(indices):
        more = f" (and none of the other {len(bad) - 1:,} tars can be used either)" if len(bad) > 1 else ""
        raise DataError(bad[0].removesuffix(".") + more + ".")
    starts = np.cumsum([0, *map(len, indices)], dtype=np.int64)
    files = TarFiles(paths, [index.stamp for index in indices], [index.checksum() for index in indices])
    source = ShardSource(name, paths, starts, joined(indices), files)
    _warn_of_problems(source)
    return source


def _indices(paths: Sequence[str]) -> Iterator[ShardIndex | BestRQ2Error]:
    """Index of each tar, or why there is none."""
    urls = iter(remote.shard_indexes([path for path in paths if remote.is_remote(path)]))
    local = sum(not remote.is_remote(path) for path in paths)
    with Progress("index", local, "tars", leave=False, shown=local > 1) as progress:
        for path in paths:
            if remote.is_remote(path):
                yield next(urls)
                continue
            try:
                yield load_index(Path(path))
            except BestRQ2Error as error:
                yield error
            progress.advance()


def _warn_of_problems(source: ShardSource) -> None:
    index = source.index
    damages = index.damages()
    clips = np.flatnonzero(index.problem)
    clips = clips[index.audio_offset[clips] > 0]
    for found, parts, total in (
        (damages, " out, whole or in part", counted(len(source.tars), "tar")),
        (clips, " out", counted(len(index), "clip")),
    ):
        if len(found):
            first = f"{source.describe(int(found[0]))}: {index.problems[index.problem[found[0]]]}"
            logger.warning("%s: %d of %s left%s; first: %s", source.name, len(found), total, parts, first)
