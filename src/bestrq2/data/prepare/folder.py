"""The folder of a prepared corpus: what may lie in it, and how far an earlier run came."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

from bestrq2.data.prepare.ledger import LEDGER, Ledger
from bestrq2.data.prepare.options import Options
from bestrq2.data.prepare.summary import SUMMARY, read_summary
from bestrq2.data.shards.building import index_path
from bestrq2.data.shards.index import read_index
from bestrq2.data.sources import Source
from bestrq2.errors import ConfigError, DataError

REJECTED = "rejected.csv"
_OURS = re.compile(r"shard-\d{6,}\.tar(\.index\.parquet)?|rejected\.csv|summary\.json|\..*")
_SHARD = re.compile(r"shard-(\d{6,})\.tar")


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard, numbered from 0."""
    return folder / f"shard-{number:06d}.tar"


def identity(source: Source, options: Options) -> dict[str, Any]:
    """What a prepared corpus is made from, ready for JSON: the source with a hash of all its names, and the options."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(source)):
        digest.update(os.fsencode(source.describe(index)) + b"\n")
    name = os.fsencode(source.name).decode("utf-8", "backslashreplace")
    return {"source": name, "recordings": len(source), "names": digest.hexdigest(), **options.as_dict()}


def finished_summary(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of the same corpus, if the folder holds it complete; None if it is not complete.

    Raises:
        ConfigError: the folder is complete with another corpus, or its summary cannot be read.
    """
    if not (folder / SUMMARY).exists():
        return None
    summary = read_summary(folder)
    _check_same(folder, summary["made_from"], wanted)
    return summary


def finished_shards(folder: Path, wanted: dict[str, Any]) -> list[Ledger]:
    """Ledgers of the shards that an earlier run finished; what it left half done is deleted.

    Args:
        folder: of the output.
        wanted: identity of the run that wants to go on.

    Raises:
        ConfigError: the folder holds other files, another corpus, or a shard is missing.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise ConfigError(f"{folder}: holds other files ({_few(foreign)}); name a new or empty folder")
    for name in names:
        if name.startswith(".") and name.endswith(".tmp"):
            (folder / name).unlink()
    numbers = sorted(int(match[1]) for name in names if (match := _SHARD.fullmatch(name)))
    for number, found in enumerate(numbers):
        if number != found:
            raise ConfigError(
                f"{shard_path(folder, number)}: is missing, later shards are there; bring it back, or delete "
                f"{folder} and begin anew"
            )
    ledgers = [_ledger(folder, shard_path(folder, number), wanted) for number in numbers]
    for number, (before, ledger) in enumerate(itertools.pairwise(ledgers), 1):
        if not follows(ledger, before):
            raise ConfigError(f"{shard_path(folder, number)}: is not the shard of that number; delete {folder}")
    return ledgers


def follows(ledger: Ledger, before: Ledger | None) -> bool:
    """Whether a shard may come after another one: all its clips come later in the source."""
    return bool(ledger.members) and (before is None or ledger.members[0][:2] >= before.position)


def _ledger(folder: Path, shard: Path, wanted: dict[str, Any]) -> Ledger:
    """The ledger of a shard, read from the index itself: it holds whatever happened to the tar's time stamp."""
    try:
        index = read_index(index_path(shard))
        size = shard.stat().st_size
        if size != index.stamp.size:
            raise DataError(f"the tar has {size:,} bytes, its index knows of {index.stamp.size:,}")
        if LEDGER not in index.extra:
            raise ConfigError(f"{shard}: was not made by bestrq2 prepare; name a new or empty folder")
        ledger = Ledger.from_extra(index.extra)
    except (DataError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{shard}: cannot be continued from ({error}); delete it and all shards after it, and run again"
        ) from error
    _check_same(folder, ledger.identity, wanted)
    return ledger


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
            "repeat the command it was made by"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
