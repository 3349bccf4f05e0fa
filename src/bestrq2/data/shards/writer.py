"""Writer of shards: tars of audio and JSON that appear whole under their names, with an index."""

from __future__ import annotations

import glob
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from bestrq2.data.shards.index import IndexRows, ShardIndex, index_path, stamp_of, write_index
from bestrq2.data.shards.members import HEAD_BYTES, pcm_layout

BUFFER_BYTES = 1 << 20


class ShardWriter:
    """Writer of one shard, which has a hidden temporary name until `close`.

    The same clips give the same bytes: members carry no time and no owner.

    Args:
        path: path of the finished tar; temporary files of a killed writer of the same shard are removed.

    Attributes:
        size: bytes written so far.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        for stale in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
            stale.unlink(missing_ok=True)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb", buffering=BUFFER_BYTES)
        self.size = 0
        self._rows = IndexRows()

    def add(self, key: str, audio: bytes, suffix: str, metadata: dict[str, Any]) -> None:
        """Add a clip: the members KEY.SUFFIX, whose samples lie in one piece, and KEY.json.

        Args:
            key: its name, which no other clip of the shard has: a relative path without a dot.
            audio: a whole audio file.
            suffix: "wav" or "flac".
            metadata: labels, origin and the like, ready for JSON.

        Raises:
            OSError: the disk is full.
        """
        content = json.dumps(metadata, ensure_ascii=False).encode("utf-8", "surrogatepass")
        audio_offset = self._add_member(f"{key}.{suffix}", audio)
        json_offset = self._add_member(f"{key}.json", content)
        layout = pcm_layout(audio[:HEAD_BYTES], len(audio)) if suffix == "wav" else None
        self._rows.add(key, suffix, (audio_offset, len(audio)), (json_offset, len(content)), layout)

    def _add_member(self, name: str, content: bytes) -> int:
        """Offset of the content."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        padding = -len(content) % tarfile.BLOCKSIZE
        self._file.write(header)
        self._file.write(content)
        self._file.write(bytes(padding))
        offset = self.size + len(header)
        self.size = offset + len(content) + padding
        return offset

    def close(self, extra: dict[str, str]) -> ShardIndex:
        """Finish the shard: index and tar appear under their names, whole and synchronised to disk.

        The index comes first: a kill in between leaves an index without a tar, which the next writer replaces, but
        never half a tar or a tar without index.

        Args:
            extra: further texts for the index.

        Raises:
            OSError: the disk is full; no file has its final name then.
        """
        try:
            end = 2 * tarfile.BLOCKSIZE
            self._file.write(bytes(end + -(self.size + end) % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            index = self._rows.index(stamp_of(self._file.fileno()), extra)
            self._file.close()
            write_index(index, index_path(self.path))
            self._temporary.replace(self.path)
        except BaseException:
            self.abandon()
            raise
        return index

    def abandon(self) -> None:
        """Remove the temporary file; files with final names are kept."""
        with suppress(OSError):  # flushing may find the disk full
            self._file.close()
        self._temporary.unlink(missing_ok=True)
