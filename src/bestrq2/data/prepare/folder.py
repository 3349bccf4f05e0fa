"""The folder of a prepared corpus: what may lie in it, and how far an earlier run came."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bestrq2.data.prepare.cutting import printable
from bestrq2.data.prepare.ledger import LEDGER, Ledger
from bestrq2.data.prepare.options import Options
from bestrq2.data.prepare.summary import SUMMARY, read_summary
from bestrq2.data.rejections import HEADER
from bestrq2.data.shards.building import index_path
from bestrq2.data.shards.index import read_index
from bestrq2.data.sources import Source
from bestrq2.errors import ConfigError, DataError
from bestrq2.progress import Progress

REJECTED = "rejected.csv"
_OURS = re.compile(r"shard-\d{6,}\.tar(\.index\.parquet)?|rejected\.csv|summary\.json|\..*")
_NAMES_SHOWN = 1000  # at a time
_TEMPORARY = re.compile(r"\.(shard-\d{6,}\.tar(\.index\.parquet)?|summary\.json)\.\d+\.tmp")
_SHARD = re.compile(r"shard-(\d{6,})\.tar")


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard, numbered from 0."""
    return folder / f"shard-{number:06d}.tar"


def identity(source: Source, options: Options) -> dict[str, Any]:
    """What a prepared corpus is made from, ready for JSON: the source with a hash of all its names, and the options."""
    digest = hashlib.blake2b(digest_size=16)
    with Progress("prepare reads names", len(source), "files") as progress:
        for number, name in enumerate(source.names()):
            digest.update(os.fsencode(name) + b"\n")
            if not number % _NAMES_SHOWN:
                progress.show(number)
    return {
        "source": printable(source.name),
        "recordings": len(source),
        "names": digest.hexdigest(),
        **options.as_dict(),
    }


def finished_summary(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of the same corpus, if the folder holds it complete; None if it is not complete.

    Raises:
        ConfigError: the folder is complete with another corpus, or its summary cannot be read.
    """
    if not (folder / SUMMARY).exists():
        return None
    summary = read_summary(folder)
    _check_same(folder, summary["made_from"], wanted)
    _check_there(folder, summary)
    return summary


def _check_there(folder: Path, summary: dict[str, Any]) -> None:
    size = 0
    for number in range(summary["shards"]):
        shard = shard_path(folder, number)
        try:
            size += shard.stat().st_size
        except FileNotFoundError:
            raise ConfigError(
                f"{shard}: is missing from a finished corpus; bring it back, or delete {SUMMARY} and the shards after "
                "it and run the same command again"
            ) from None
    if size != summary["bytes"]:
        raise ConfigError(
            f"{folder}: its shards have {size:,} bytes, {SUMMARY} says {summary['bytes']:,}; find the damaged one with "
            "--check"
        )


def count_finished(folder: Path, wanted: dict[str, Any]) -> int:
    """Number of shards that an earlier run finished; what it left half done is deleted, once all else is in order.

    Args:
        folder: of the output.
        wanted: identity of the run that wants to go on.

    Raises:
        ConfigError: the folder holds other files, another corpus, or a shard is missing; nothing was deleted.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in names if not _OURS.fullmatch(name) or (name == REJECTED and not _is_listing(folder))]
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
                f"{shard_path(folder, number)}: is missing, later shards are there; bring it back, or name a new folder"
            )
    before: Ledger | None = None
    for number, ledger in enumerate(ledgers(folder, len(numbers))):
        _check_same(folder, ledger.identity, wanted)
        if not follows(ledger, before):
            raise ConfigError(f"{shard_path(folder, number)}: is not the shard of that number; name a new folder")
        before = ledger
    for name in names:
        if _TEMPORARY.fullmatch(name):
            (folder / name).unlink()
    return len(numbers)


def ledgers(folder: Path, shards: int) -> Iterator[Ledger]:
    """Ledgers of the first shards, each read when its turn comes.

    Raises:
        ConfigError: one cannot be read, or its tar is not as it was.
    """
    for number in range(shards):
        yield _ledger(shard_path(folder, number))


def _is_listing(folder: Path) -> bool:
    """Whether the list of rejected recordings is one."""
    with (folder / REJECTED).open("rb") as file:
        return file.read(len(HEADER)) in (HEADER, b"")


def follows(ledger: Ledger, before: Ledger | None) -> bool:
    """Whether a shard may come after another one: all its clips come later in the source."""
    return bool(ledger.members) and (before is None or ledger.members[0][:2] >= before.position)


def _has_ledger(shard: Path) -> bool:
    with suppress(DataError):
        return LEDGER in read_index(index_path(shard)).extra
    return False


def _ledger(shard: Path) -> Ledger:
    """The ledger of a shard, read from the index itself: it holds whatever happened to the tar's time stamp."""
    try:
        index = read_index(index_path(shard))
        size = shard.stat().st_size
        if size != index.stamp.size:
            raise DataError(f"the tar has {size:,} bytes, its index knows of {index.stamp.size:,}")
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
