"""What went into a shard and what was dropped on the way: kept with the shard, so that a killed run can go on."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bestrq2.data.band_sums import BandSums
from bestrq2.data.prepare.cutting import DIGEST_BYTES, Clip, Drop

# Key of the index's metadata.
LEDGER = "bestrq2_prepare"
KINDS = ("broken", "silent", "too short", "duplicate")
_JSON_DIGEST_BYTES = 8
_MEMBER = np.dtype(
    [
        ("recording", "<i8"),
        ("segment", "<i8"),
        ("content", f"V{DIGEST_BYTES}"),
        ("metadata", f"V{_JSON_DIGEST_BYTES}"),
    ]
)


class Member(NamedTuple):
    """A clip in a shard.

    Attributes:
        recording: its number in the source.
        segment: which one of the recording.
        content: digest of its samples.
        metadata: digest of its JSON.
    """

    recording: int
    segment: int
    content: bytes
    metadata: bytes


def metadata_digest(metadata: Any) -> bytes:
    """Digest of what JSON says, however it is laid out."""
    return hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=_JSON_DIGEST_BYTES).digest()


def rejected_key(name: str, reason: str) -> str:
    """What the list of rejections holds once: a recording may be there several times, for several segments of it."""
    return f"{name}\n{reason}"


@dataclass
class Ledger:
    """Counts over a stretch of a source, from after the last clip of a shard to the last one of the next.

    Attributes:
        identity: the source and the options it belongs to.
        sums: of the log-mel spectrograms.
        position: (recording, segment) after the stretch.
        clips: how many.
        dropped: how often, by kind.
        rejected: names and reasons.
        members: its clips, in order.
        samples_in: decoded samples at the new rate.
        samples_kept: samples of clips.
        clipped: clips with samples beyond full scale.
        size: about how many bytes its lists take when written.
    """

    identity: dict[str, Any]
    sums: BandSums
    position: tuple[int, int] = (0, 0)
    clips: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    rejected: list[tuple[str, str]] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    samples_in: int = 0
    samples_kept: int = 0
    clipped: int = 0
    size: int = 0

    def keep(self, recording: int, clip: Clip) -> None:
        """Count a clip."""
        self.clips += 1
        self.members.append(Member(recording, clip.segment, clip.digest, metadata_digest(clip.metadata)))
        self.sums.merge(BandSums.from_bytes(clip.sums))
        self.samples_in += clip.samples
        self.samples_kept += clip.samples
        self.clipped += clip.clipped
        self.size += _MEMBER.itemsize * 4 // 3

    def drop(self, name: str, drop: Drop) -> None:
        """Count what was dropped."""
        self.samples_in += drop.samples
        if drop.kind:
            self.dropped[drop.kind] += 1
            self.rejected.append((name, drop.reason))
            self.size += len(json.dumps([name, drop.reason]))

    def merge(self, later: Ledger) -> None:
        """Add the counts and sums of the stretch that follows; its lists are left out."""
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
        values = {
            "identity": self.identity,
            "position": self.position,
            "clips": self.clips,
            "dropped": self.dropped,
            "rejected": self.rejected,
            "samples_in": self.samples_in,
            "samples_kept": self.samples_kept,
            "clipped": self.clipped,
            "members": base64.b64encode(members.tobytes()).decode(),
            "band_sums": base64.b64encode(self.sums.to_bytes()).decode(),
        }
        return {LEDGER: json.dumps(values)}

    @classmethod
    def from_extra(cls, extra: dict[str, str]) -> Ledger:
        """The ledger that `to_extra` wrote.

        Raises:
            KeyError, ValueError: there is none, or it is damaged.
        """
        values = json.loads(extra[LEDGER])
        members = np.frombuffer(base64.b64decode(values.pop("members")), _MEMBER)
        return cls(
            sums=BandSums.from_bytes(base64.b64decode(values.pop("band_sums"))),
            position=tuple(values.pop("position")),
            rejected=[(name, reason) for name, reason in values.pop("rejected")],
            members=list(_unpacked(members)),
            **values,
        )


def _unpacked(members: np.ndarray) -> Iterator[Member]:
    for recording, segment, content, metadata in members:
        yield Member(int(recording), int(segment), content.tobytes(), metadata.tobytes())
