"""Folder of a prepared corpus: its shards, the ledger in each, and how far an earlier run got."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bestrq2.data.prepare.cutting import DIGEST_BYTES, KINDS, Piece
from bestrq2.data.prepare.summary import SUMMARY, BandSums, read_summary
from bestrq2.data.rejections import REJECTED_HEADER, SHORTER_HEADER, Shorter
from bestrq2.data.shards.index import index_path, read_index
from bestrq2.errors import ConfigError, DataError

LEDGER = "bestrq2_prepare"
"""Key of the ledger in the metadata of a shard's index."""

REJECTED, SHORTER_LIST = "rejected.csv", "shorter.csv"

_OURS = re.compile(r"shard-\d{6,}\.tar(\.index\.parquet)?|rejected\.csv|shorter\.csv|summary\.json|\..*")
_TEMPORARY = re.compile(r"\.(shard-\d{6,}\.tar(\.index\.parquet)?|summary\.json)\.\d+\.tmp")
_SHARD = re.compile(r"shard-(\d{6,})\.tar")
_JSON_DIGEST_BYTES = 8
_MEMBER = np.dtype(
    [("recording", "<i8"), ("segment", "<i8"), ("content", f"V{DIGEST_BYTES}"), ("metadata", f"V{_JSON_DIGEST_BYTES}")]
)


class Member(NamedTuple):
    """A clip in a shard.

    Attributes:
        recording: number of the recording in the source.
        segment: number of the clip in the recording.
        content: digest of the samples.
        metadata: digest of the JSON.
    """

    recording: int
    segment: int
    content: bytes
    metadata: bytes


def metadata_digest(metadata: Any) -> bytes:
    """Digest of the content of JSON, whatever its layout."""
    return hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=_JSON_DIGEST_BYTES).digest()


def rejected_key(path: str, reason: str) -> str:
    """Key of an entry in the list of rejections, which may name a recording once per dropped segment."""
    return f"{path}\n{reason}"


@dataclass
class Ledger:
    """Counts over a stretch of a source, from after the last clip of one shard to the last clip of the next.

    It is kept in the index of the shard, so that a killed run can continue after the shard.

    Attributes:
        identity: source and options it belongs to.
        sums: sums over the log-mel spectrograms.
        position: (recording, segment) after the stretch.
        clips: number of clips.
        dropped: number of dropped pieces by kind.
        rejected: paths and reasons of dropped pieces.
        shorter: recordings that end before their header promised.
        members: clips, in order.
        samples_in: decoded samples at the new rate.
        samples_kept: samples of clips.
        clipped: clips with samples beyond full scale.
        size: approximate bytes of its lists when written.
    """

    identity: dict[str, Any]
    sums: BandSums
    position: tuple[int, int] = (0, 0)
    clips: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    rejected: list[tuple[str, str]] = field(default_factory=list)
    shorter: list[Shorter] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    samples_in: int = 0
    samples_kept: int = 0
    clipped: int = 0
    size: int = 0

    def keep(self, piece: Piece, metadata: dict[str, Any]) -> None:
        """Count a clip."""
        self.clips += 1
        self.members.append(Member(piece.recording, piece.segment, piece.digest, metadata_digest(metadata)))
        self.sums.merge(BandSums.from_bytes(piece.band_sums))
        self.samples_in += piece.samples
        self.samples_kept += piece.samples
        self.clipped += piece.clipped
        self.size += _MEMBER.itemsize * 4 // 3  # as base64

    def drop(self, piece: Piece) -> None:
        """Count a dropped piece."""
        self.samples_in += piece.samples
        if piece.kind in self.dropped:
            self.dropped[piece.kind] += 1
            self.rejected.append((piece.path, piece.reason))
            self.size += len(json.dumps([piece.path, piece.reason]))

    def note_shorter(self, piece: Piece) -> None:
        """List a recording that ends before its header promised."""
        self.shorter.append(Shorter(piece.path, *json.loads(piece.metadata)))
        self.size += len(json.dumps(self.shorter[-1]))

    def merge(self, later: Ledger) -> None:
        """Add counts and sums of the stretch that follows, without its lists."""
        self.position = later.position
        self.clips += later.clips
        self.sums.merge(later.sums)
        self.samples_in += later.samples_in
        self.samples_kept += later.samples_kept
        self.clipped += later.clipped
        for kind, count in later.dropped.items():
            self.dropped[kind] += count

    def to_extra(self) -> dict[str, str]:
        """The ledger as an entry of an index's metadata."""
        members = np.array([(*of[:2], *map(np.void, of[2:])) for of in self.members], _MEMBER)
        values = {name: value for name, value in vars(self).items() if name not in ("sums", "size")}
        values["members"] = base64.b64encode(members.tobytes()).decode()
        values["band_sums"] = base64.b64encode(self.sums.to_bytes()).decode()
        return {LEDGER: json.dumps(values)}

    @classmethod
    def from_extra(cls, extra: dict[str, str]) -> Ledger:
        """The ledger written by `to_extra`.

        Raises:
            KeyError, ValueError: missing or damaged.
        """
        values = json.loads(extra[LEDGER])
        members = np.frombuffer(base64.b64decode(values.pop("members")), _MEMBER)
        return cls(
            sums=BandSums.from_bytes(base64.b64decode(values.pop("band_sums"))),
            position=tuple(values.pop("position")),
            rejected=[(name, reason) for name, reason in values.pop("rejected")],
            shorter=[Shorter(*one) for one in values.pop("shorter", [])],
            members=[Member(int(r), int(s), c.tobytes(), m.tobytes()) for r, s, c, m in members],
            **values,
        )


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard, numbered from 0."""
    return folder / f"shard-{number:06d}.tar"


def follows(ledger: Ledger, before: Ledger | None) -> bool:
    """Whether all clips of a shard come later in the source than those of the shard before."""
    return bool(ledger.members) and (before is None or ledger.members[0][:2] >= before.position)


def ledgers(folder: Path, shards: int) -> Iterator[Ledger]:
    """Ledgers of the first shards, one in memory at a time.

    Raises:
        ConfigError: a ledger cannot be read, or the size of its tar has changed.
    """
    for number in range(shards):
        yield _ledger(shard_path(folder, number))


def _ledger(shard: Path) -> Ledger:
    # From the index itself: a time stamp of the tar that has changed is no reason to refuse it.
    try:
        index = read_index(index_path(shard))
        size = shard.stat().st_size
        if size != index.stamp.size:
            raise DataError(f"the tar has {size:,} bytes, its index says {index.stamp.size:,}")
        if LEDGER not in index.extra:
            raise ConfigError(f"{shard}: was not made by bestrq2 prepare; name a new or empty folder")
        return Ledger.from_extra(index.extra)
    except DataError as error:
        reason = str(error).partition(";")[0]
    except (KeyError, ValueError, TypeError):
        reason = f"{index_path(shard).name} is damaged"
    raise ConfigError(
        f"{shard}: cannot be continued from ({reason}); move it and all shards after it to another place and run "
        "again, or name a new folder"
    )


def finished_summary(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Summary of the same corpus, if the folder holds it complete; None if it is not complete.

    Args:
        folder: folder of the output.
        wanted: identity of the corpus.

    Raises:
        ConfigError: the folder holds another complete corpus, shards are missing, or the summary cannot be read.
    """
    if not (folder / SUMMARY).exists():
        return None
    summary = read_summary(folder)
    _check_same(folder, summary["made_from"], wanted)
    size = 0
    for number in range(summary["shards"]):
        shard = shard_path(folder, number)
        try:
            size += shard.stat().st_size
        except FileNotFoundError:
            raise ConfigError(
                f"{shard}: is missing from a finished corpus; restore it, or delete {SUMMARY} and the shards after "
                "it and run the same command again"
            ) from None
    if size != summary["bytes"]:
        raise ConfigError(
            f"{folder}: its shards have {size:,} bytes, {SUMMARY} says {summary['bytes']:,}; find the damaged one with "
            "--check"
        )
    return summary


def count_finished(folder: Path, wanted: dict[str, Any]) -> int:
    """Number of shards that an earlier run finished; nothing is written or deleted.

    Args:
        folder: folder of the output.
        wanted: identity of the run that continues it.

    Raises:
        ConfigError: the folder holds other files or another corpus, or a shard is missing.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in names if not _OURS.fullmatch(name) or not _is_listing(folder, name)]
    if foreign:
        raise ConfigError(f"{folder}: holds other files ({_few(foreign)}); name a new or empty folder")
    numbers = sorted(int(match[1]) for name in names if (match := _SHARD.fullmatch(name)))
    if numbers and not any(_has_ledger(shard_path(folder, number)) for number in numbers):
        raise ConfigError(
            f"{shard_path(folder, numbers[0])}: was not made by bestrq2 prepare; name a new or empty folder"
        )
    for number, found in enumerate(numbers):
        if number != found:
            raise ConfigError(
                f"{shard_path(folder, number)}: is missing, later shards exist; restore it, or name a new folder"
            )
    before: Ledger | None = None
    for number, ledger in enumerate(ledgers(folder, len(numbers))):
        _check_same(folder, ledger.identity, wanted)
        if not follows(ledger, before):
            raise ConfigError(f"{shard_path(folder, number)}: is not the shard of that number; name a new folder")
        before = ledger
    return len(numbers)


def remove_temporaries(folder: Path) -> None:
    """Delete incomplete files."""
    for entry in list(folder.iterdir()):
        if _TEMPORARY.fullmatch(entry.name):
            entry.unlink()


def _is_listing(folder: Path, name: str) -> bool:
    """Whether a file named like a list of recordings is one; True for other names."""
    header = {REJECTED: REJECTED_HEADER, SHORTER_LIST: SHORTER_HEADER}.get(name)
    if header is None:
        return True
    with (folder / name).open("rb") as file:
        return file.read(len(header)) in (header, b"")


def _has_ledger(shard: Path) -> bool:
    with suppress(DataError):
        return LEDGER in read_index(index_path(shard)).extra
    return False


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [
        f"{name} was {found.get(name)}, is {value}"
        for name, value in wanted.items()
        if found.get(name) != value and name != "names"
    ]
    if not different and found.get("names") != wanted["names"]:
        different = ["the recordings have other names"]
    if different:
        raise ConfigError(
            f"{folder}: holds a corpus made from something else ({'; '.join(different)}); name another folder, or "
            "repeat the command that made it"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
