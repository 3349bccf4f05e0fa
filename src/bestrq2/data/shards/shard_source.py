"""Clips of local WebDataset tars as a source: any clip at any time, and of plain PCM only the bytes of the crop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from tqdm import tqdm

from bestrq2.data.audio import errors_named, open_audio, random_crop
from bestrq2.data.decoders import AudioBytes, Decoder, MemoryFile, UnreadableAudioError, to_float32
from bestrq2.data.shards.building import IndexRows, load_index, problem_of
from bestrq2.data.shards.index import ShardIndex, Stamp, joined
from bestrq2.data.shards.maps import TarMaps
from bestrq2.data.shards.members import BadShardError
from bestrq2.data.sources import Source
from bestrq2.errors import AudioError, DataError
from bestrq2.text import counted

logger = logging.getLogger(__name__)


@dataclass
class PcmDecoder:
    """16-bit mono PCM in a tar, seen as a decoder; only what is asked for is read.

    Attributes:
        maps: contents of the tars.
        tar: the number of its tar.
        start: of the first sample, in bytes from the tar's beginning.
        frames: number of samples.
        rate: Hz.
    """

    maps: TarMaps
    tar: int
    start: int
    frames: int | None
    rate: int
    channels: int = 1

    def measure(self) -> int:
        """Length in samples."""
        assert self.frames is not None
        return self.frames

    def samples(self, start: int, count: int | None, part: Callable[[int, int, int], np.ndarray]) -> np.ndarray:
        """int16 [samples] from `start`.

        Args:
            start: first sample.
            count: samples; None for all that follow.
            part: `TarMaps.view` or `TarMaps.copied`.

        Raises:
            UnreadableAudioError: the tar is not the one that was indexed any more.
        """
        end = self.measure() if count is None else min(self.measure(), start + count)
        return part(self.tar, self.start + 2 * start, 2 * max(0, end - start)).view("<i2")

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono float32 [samples] from `start`; see `samples`."""
        return to_float32(self.samples(start, count, self.maps.copied))

    def close(self) -> None:
        """Nothing to release."""


class Int16Decoder(PcmDecoder):
    """16-bit PCM, seen where it lies."""

    def read(self, start: int, count: int | None) -> np.ndarray:
        """Mono int16 [samples] from `start`, in the map: to be used at once."""
        return self.samples(start, count, self.maps.view)


@dataclass(frozen=True)
class TarMember(AudioBytes):
    """An audio file within the map of a tar, read in place.

    Attributes:
        maps: contents of the tars.
        tar: the number of its tar.
    """

    maps: TarMaps
    tar: int

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """The member as an open file, which ends where the tar turns out to have become shorter."""
        return cast(BinaryIO, _MemberFile(self))


class _MemberFile(MemoryFile):
    def __init__(self, member: TarMember) -> None:
        super().__init__(member)
        self._member = member

    def readinto(self, buffer: Any) -> int:
        try:
            self._member.maps[self._member.tar]
        except AudioError:
            return 0  # libsndfile knows no errors of files; `ShardSource.opened` finds out
        return super().readinto(buffer)


@dataclass(frozen=True)
class ShardSource(Source):
    """Clips of tars; `open_shards` makes it. It can be pickled, and used in forked and spawned processes.

    Attributes:
        name: where they come from.
        tars: the shards' paths, as they were given.
        starts: int64 [tars + 1], the number of the first clip of each.
        index: of all clips in a row.
        maps: contents of the tars.
    """

    name: str
    tars: tuple[str, ...]
    starts: np.ndarray
    index: ShardIndex
    maps: TarMaps = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def _tar(self, clip: int) -> int:
        return int(self.starts.searchsorted(clip, side="right")) - 1

    def describe(self, index: int) -> str:
        """The tar's path and the member's name, such as "train/000001.tar/clip17.wav"; of an unusable tar its path."""
        tar = self.tars[self._tar(index)]
        return f"{tar}/{self.index.member(index)}" if self.index.audio_offset[index] else tar

    def _check(self, index: int) -> None:
        """Pass if a clip can be used as far as the index knows.

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
        return decoder(self.maps, self._tar(index), int(self.index.pcm_offset[index]), frames, rate)

    def member(self, index: int) -> TarMember:
        """The audio file of a clip, in the map of its tar.

        Raises:
            AudioError: it cannot be used, or not now.
        """
        self._check(index)
        start, tar = int(self.index.audio_offset[index]), self._tar(index)
        content = memoryview(self.maps[tar])[start : start + int(self.index.audio_length[index])]
        return TarMember(self.describe(index), content, self.maps, tar)

    @contextmanager
    def opened(self, index: int) -> Iterator[Decoder]:
        """A decoder for one clip; see `Source.opened`."""
        with errors_named(self.describe(index)):
            if self.index.sampling_rate[index]:
                yield self._pcm(index, PcmDecoder)
                return
            member = self.member(index)
            try:
                with open_audio(member) as decoder:
                    yield decoder
            except AudioError:
                self.maps[member.tar]  # raises if the tar is to blame
                raise

    def metadata(self, index: int) -> dict[str, Any]:
        """The clip's JSON member; empty where there is none, or where it is no JSON object; see `json`."""
        found = self.json(index)
        return found if isinstance(found, dict) else {}

    def json(self, index: int) -> Any:
        """What the clip's JSON member says; None where there is none, or where it is no JSON.

        Raises:
            UnreadableAudioError: the tar is not the one that was indexed any more.
        """
        start, length = int(self.index.json_offset[index]), int(self.index.json_length[index])
        if not length:
            return None
        with errors_named(self.describe(index)):
            content = self.maps.copied(self._tar(index), start, length)
        try:
            return json.loads(content.tobytes().decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            return None

    def read(self, index: int, sampling_rate: int, rng: np.random.Generator, max_seconds: float) -> np.ndarray:
        """A random crop of one clip; see `Source.read`. Of plain PCM at the wanted rate, int16 in its tar's map."""
        if self.index.sampling_rate[index] != sampling_rate:
            return super().read(index, sampling_rate, rng, max_seconds)
        try:
            return random_crop(self._pcm(index, Int16Decoder), rng, sampling_rate, max_seconds)
        except AudioError as error:
            raise type(error)(f"{self.describe(index)}: {error}") from error


def open_shards(paths: Sequence[Path], name: str) -> ShardSource:
    """The clips of tars, in the order of the tars and within them; tars without an index are indexed first.

    A bad tar does not stop a job if others are good. Of one that breaks off, truncated or damaged, the whole clips
    before that are used; an empty one, or what is no tar, gives none. Either has one more entry in the source, behind
    its clips, which is rejected with the reason like a bad file. Second clips of the same key in a tar, and others that
    cannot be used, are rejected in the same way.

    Args:
        paths: the tars.
        name: where they come from.

    Raises:
        DataError: a tar is missing or cannot be opened, or not one of them is good.
    """
    indices: list[ShardIndex] = []
    bad: list[str] = []
    for path in tqdm(paths, desc="index", unit="tar", disable=None, leave=False, delay=1.0):
        try:
            indices.append(load_index(path))
        except BadShardError as error:
            bad.append(str(error))
            rows = IndexRows()
            rows.add_damage(problem_of(error, path))
            indices.append(rows.index(Stamp(0, 0), {}))
    if not indices:
        raise DataError(f"{name}: no tars there; give at least one.")
    if len(bad) == len(indices):
        more = f" (and none of the other {len(bad) - 1:,} tars can be used either)" if len(bad) > 1 else ""
        raise DataError(bad[0].removesuffix(".") + more + ".")
    whole, tars = joined(indices), tuple(str(path) for path in paths)
    source = ShardSource(
        name,
        tars,
        np.cumsum([0, *map(len, indices)], dtype=np.int64),
        whole,
        TarMaps(tars, [index.stamp for index in indices], [index.checksum() for index in indices]),
    )
    damages = whole.damages()
    if len(damages):
        first = f"{source.describe(int(damages[0]))}: {whole.problems[whole.problem[damages[0]]]}"
        logger.warning(
            "%s: %d of %s left out, whole or in part; first: %s",
            name,
            len(damages),
            counted(len(indices), "tar"),
            first,
        )
    clips = np.flatnonzero(whole.problem)
    clips = clips[whole.audio_offset[clips] > 0]
    if len(clips):
        first = f"{source.describe(int(clips[0]))}: {whole.problems[whole.problem[clips[0]]]}"
        logger.warning("%s: %d of %s left out; first: %s", name, len(clips), counted(len(whole), "clip"), first)
    return source
