"""Resolve a --data argument to a source."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.request import url2pathname

from bestrq2.data.audio import AUDIO_SUFFIXES, open_audio
from bestrq2.data.hdf5 import HDF5_SUFFIXES, HDF5Source
from bestrq2.data.hub import PREFIX as HUB_PREFIX
from bestrq2.data.hub import HubSource
from bestrq2.data.mixture import MIXTURE_SUFFIXES, open_mixture
from bestrq2.data.shards.remote import expand_urls, is_remote
from bestrq2.data.shards.shard_source import open_shards
from bestrq2.data.sources import ArraySource, FileSource, PathList, Source
from bestrq2.data.specs import LIST_SUFFIXES, check_keys, read_rows, resolved, split_options
from bestrq2.errors import AudioError, DataError
from bestrq2.progress import Progress, is_first_process
from bestrq2.text import counted

logger = logging.getLogger(__name__)

SOUNDWORLD_CLIPS = 3000
_FORMS = (
    "a folder of audio or of tars, an audio file, a tar, a list, a mixture (.yaml), an HDF5 file (.h5), hub:NAME, "
    "a URL of tars"
)
_LOCAL_URL = "file://"
# What this package writes beside audio and tars.
_OWN = re.compile(r".*\.tar\.index\.parquet|rejected\.csv|shorter\.csv|summary\.json")
# Suffixes that the line about skipped files names.
_SUFFIXES_SHOWN = 12


def open_source(spec: str | Path) -> Source:
    """Resolve a --data argument to a source.

    Args:
        spec: one of

            - a folder (searched recursively for files with an audio suffix, or for tars; hidden ones, with a leading
              dot, are left out), an audio file, or a WebDataset tar;
            - a list of files or of tars (.txt with one path per line, .csv or .tsv with a column "path", .jsonl with a
              key "path", "audio" or "audio_filepath"; relative paths start at the list's folder; tars may be URLs);
            - a pattern such as "shards/train-{000..099}.tar", "shards/*.tar" or "clips/**/*.flac";
            - remote tars: a URL (http, https, s3, gs, hf and others that fsspec knows), or a pattern such as
              "https://host/shard-{000..099}.tar" or "s3://bucket/shard-*.tar"; read through a local cache (`remote`);
            - a mixture of sources (.yaml, see `open_mixture`);
            - an HDF5 file (.h5, .hdf5, see `HDF5Source`), with "?exclude=ROWS.csv" to leave rows out;
            - "hub:NAME" for a dataset of the Hugging Face Hub, with options as in `HubSource`;
            - "soundworld" or "soundworld:N" for N generated clips (3000).

    Returns:
        The source. Its audio files are not opened yet; tars without an index are indexed, remote ones are fetched for
        that.

    Raises:
        ConfigError: an option that this kind of source does not have, or a kind of URL that cannot be fetched here.
        DataError: missing, not reachable, an empty folder or list, neither list nor audio, a pattern that nothing fits,
            or audio files and tars side by side.
    """
    if isinstance(spec, str):
        if spec == "soundworld" or spec.startswith("soundworld:"):
            return _soundworld(spec)
        if spec.startswith(HUB_PREFIX):
            return HubSource(spec)
        if is_remote(spec) and not spec.startswith(_LOCAL_URL):
            return _of_one_kind(expand_urls(spec), spec)
        if spec.startswith(_LOCAL_URL):
            spec = url2pathname(spec.removeprefix(_LOCAL_URL).removeprefix("localhost"))
        spec, options = _options(spec)
        if options:
            return HDF5Source(Path(spec).expanduser(), options["exclude"])
    return _open_path(Path(spec).expanduser())


def absolute_spec(spec: str) -> str:
    """Make the paths in a --data argument absolute; links are not resolved."""
    if spec.startswith(HUB_PREFIX):
        bare, mark, query = spec.removeprefix(HUB_PREFIX).partition("?")
        local = bool(bare) and os.path.exists(os.path.expanduser(bare))
        return f"{HUB_PREFIX}{_absolute(bare)}{mark}{query}" if local else spec
    if spec.partition(":")[0] == "soundworld" or is_remote(spec):
        return spec
    bare, options = _options(spec)
    return _absolute(bare) + (spec[len(bare) :] if options else "")


def _absolute(path: str) -> str:
    """Absolute path; ".." is resolved if that leads to the same place."""
    expanded = Path(path).expanduser()
    if expanded.is_absolute() or os.path.exists(expanded) or not set("{*?[") & set(path):
        plain = Path(os.path.normpath(expanded.absolute()))
        same = os.path.exists(plain) and os.path.exists(expanded) and plain.samefile(expanded)
        return str(plain if same else expanded.absolute())
    # The working folder is not part of the pattern.
    folder = re.sub(r"([\\{}])", r"\\\1", glob.escape(os.getcwd()))
    return f"{folder}/{expanded}"


def local_folder(spec: str) -> Path | None:
    """Local folder that a --data argument names; None for anything else."""
    if spec.startswith(HUB_PREFIX):
        spec = spec.removeprefix(HUB_PREFIX).partition("?")[0]
    elif spec.partition(":")[0] == "soundworld" or is_remote(spec):
        return None
    folder = Path(spec).expanduser()
    return folder if spec and os.path.isdir(folder) else None


def _options(spec: str) -> tuple[str, dict[str, str]]:
    """Split a path from its options; a path that exists as written has none.

    Raises:
        ConfigError: unknown options, or for a kind of source that has none.
    """
    bare = spec.partition("?")[0]
    hdf5 = Path(bare).suffix.lower() in HDF5_SUFFIXES
    known = hdf5 or os.path.exists(os.path.expanduser(bare))
    if bare == spec or not known or os.path.exists(os.path.expanduser(spec)):
        return spec, {}
    bare, options = split_options(spec)
    check_keys(bare, options, ["exclude"] if hdf5 else [])
    return bare, options


def _open_path(path: Path) -> Source:
    name = str(path.absolute())
    try:
        if path.is_dir():
            return _folder_source(path, name)
        if not path.exists():
            if set("{*?[") & set(str(path)):
                return _of_one_kind(_expanded(path), name)
            raise DataError(f"{path} does not exist; give {_FORMS}, or soundworld.")
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}).") from error
    if path.suffix.lower() in MIXTURE_SUFFIXES:
        return open_mixture(path, open_source)
    if path.suffix.lower() in HDF5_SUFFIXES:
        return HDF5Source(path)
    if path.suffix.lower() in LIST_SUFFIXES:
        columns = ("path", "audio", "audio_filepath") if path.suffix.lower() == ".jsonl" else ("path",)
        rows = read_rows(path, [columns], optional=("label",))
        if any(_is_tar(row["path"]) for row in rows):
            listed = [row["path"] for row in rows]
            return _of_one_kind([one if is_remote(one) else str(resolved(path, one)) for one in listed], name)
        labels = [row["label"] for row in rows] if any(row["label"] for row in rows) else None
        return FileSource(name, PathList(str(resolved(path, row["path"])) for row in rows), labels)
    if _is_tar(path.name):
        return _of_one_kind([str(path)], name)
    if path.suffix.lower() not in AUDIO_SUFFIXES:
        try:
            with open_audio(path):
                pass
        except AudioError as error:
            lists = ", ".join(sorted(LIST_SUFFIXES))
            raise DataError(f"{path} is neither audio, nor a tar, nor a list of paths ({lists}).") from error
    return FileSource(name, [path])


def _is_tar(path: str) -> bool:
    return path.lower().endswith(".tar") or is_remote(path)


def _of_one_kind(paths: list[str], name: str) -> Source:
    """Source of paths that are all tars, or all other audio files."""
    tars = sum(map(_is_tar, paths))
    if not tars:
        return FileSource(name, PathList(paths))
    if tars < len(paths):
        other = next(path for path in paths if not _is_tar(path))
        raise DataError(f"{name}: names {counted(tars, 'tar')} and other files ({other}); name the two kinds apart.")
    return open_shards(paths, name)


def _folder_source(folder: Path, name: str) -> Source:
    files, tars, skipped = _listed(folder)
    if files and tars:
        raise DataError(
            f"{folder} holds {counted(len(files), 'audio file')} and {counted(len(tars), 'tar')}; put them into "
            "folders of their own and name the one you mean."
        )
    source = _of_one_kind(tars, name) if tars else FileSource(name, PathList(_needed(folder, files, skipped)))
    log_skipped(folder, skipped)
    return source


def _expanded(pattern: Path) -> list[str]:
    """Expand a pattern of paths: braces name each path, wildcards find existing ones, sorted.

    Raises:
        DataError: nothing fits, or the braces are not balanced.
    """
    from braceexpand import braceexpand

    try:
        spelled = list(braceexpand(str(pattern)))
    except ValueError as error:
        raise DataError(
            f"{pattern}: its braces are not balanced; write for instance train-{{000..099}}.tar."
        ) from error
    paths: list[str] = []
    for path in spelled:
        found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        if not found or not os.path.exists(found[0]):
            raise DataError(f"{path} does not exist, or nothing fits it; check the pattern {pattern}.")
        paths += found
    return paths


def soundworld_count(spec: str, default: int) -> int:
    """Number of clips N of "soundworld:N".

    Raises:
        DataError: N is not a positive whole number.
    """
    number = spec.partition(":")[2] if ":" in spec else str(default)
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise DataError(f"{spec!r} is not a source; expected 'soundworld:N' with a positive whole number N of clips.")
    return int(number)


def _soundworld(spec: str) -> Source:
    count = soundworld_count(spec, SOUNDWORLD_CLIPS)
    from bestrq2.soundworld import SAMPLE_RATE, unlabelled

    return ArraySource(unlabelled(count, seed=0), SAMPLE_RATE, name="soundworld")


def audio_files(folder: Path) -> tuple[list[str], Counter[str]]:
    """All files below a folder with an audio suffix, sorted; hidden ones (leading dot) are left out.

    Folders that are links are entered, each real folder once.

    Returns:
        The files, and the number of skipped ones by suffix (see `log_skipped`).

    Raises:
        DataError: there are none, or the folder cannot be listed.
    """
    files, tars, skipped = _listed(folder)
    if tars:
        skipped[".tar"] += len(tars)
    return _needed(folder, files, skipped), skipped


def log_skipped(folder: Path, skipped: Counter[str]) -> None:
    """Log how many files below a folder were skipped by suffix, in one line, if there are any.

    Args:
        folder: the folder.
        skipped: number of files by suffix, "none" for files without one.
    """
    if not skipped or not is_first_process():
        return
    kinds = [f"{suffix} {count:,}" for suffix, count in sorted(skipped.most_common(_SUFFIXES_SHOWN))]
    if len(skipped) > len(kinds):
        kinds.append(f"and {counted(len(skipped) - len(kinds), 'other suffix')}")
    logger.info("%s: %s skipped by suffix: %s", folder, counted(skipped.total(), "file"), ", ".join(kinds))


class _Listing(NamedTuple):
    """Audio files and tars below a folder, each sorted, and the number of other files by suffix."""

    files: list[str]
    tars: list[str]
    skipped: Counter[str]


def _listed(folder: Path) -> _Listing:
    """Search a folder by suffix; what is no regular file, or a folder that cannot be listed, is rejected when read."""
    with Progress(f"{folder}", unit="files and folders", leave=False) as progress:
        return _search(folder, progress)


def _search(folder: Path, progress: Progress) -> _Listing:
    found: list[str] = []
    tars: list[str] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()

    def is_new(path: str | Path) -> bool:
        """Note a folder by device and inode, which are the same for all its names; False where it is known."""
        try:
            status = os.stat(path)
        except OSError:  # listing it fails, too
            return True
        before = len(seen)
        seen.add((status.st_dev, status.st_ino))
        return len(seen) > before

    def unlisted(error: OSError) -> None:
        if error.filename == str(folder):
            raise DataError(f"{folder} cannot be listed ({error.strerror}); check its permissions.") from error
        logger.warning("%s cannot be listed (%s): what it holds is left out", error.filename, error.strerror)
        found.append(error.filename)

    for known in (folder, *folder.resolve().parents):  # links to them are loops
        is_new(known)
    for parent, folders, names in os.walk(folder, onerror=unlisted, followlinks=True):
        progress.advance(len(folders) + len(names))
        inside = sorted((name for name in folders if not name.startswith(".")), reverse=True)
        folders[:] = [name for name in inside if is_new(os.path.join(parent, name))]
        for name in names:
            path, suffix = os.path.join(parent, name), os.path.splitext(name)[1].lower()
            if name.startswith(".") or _OWN.fullmatch(name):
                continue
            if suffix in AUDIO_SUFFIXES:
                found.append(path)
            elif suffix == ".tar" and os.path.isfile(path):  # reading a pipe would wait for ever
                tars.append(path)
            else:
                skipped[_shown(suffix)] += 1
    return _Listing(sorted(found), sorted(tars), skipped)


def _shown(suffix: str) -> str:
    """A suffix as it is counted and shown: itself if it looks like one, else "none" or "other"."""
    return suffix if re.fullmatch(r"\.[\w~+-]{1,16}", suffix) else "other" if suffix else "none"


def _needed(folder: Path, files: list[str], skipped: Counter[str]) -> list[str]:
    """The audio files below a folder; an error if there are none."""
    if files:
        return files
    if skipped:
        kinds = ", ".join(suffix for suffix, _ in sorted(skipped.items(), key=lambda one: (-one[1], one[0]))[:5])
        raise DataError(
            f"{folder} holds {counted(skipped.total(), 'file')} and none with an audio suffix (found: {kinds}; "
            "expected .wav, .flac, .mp3, .ogg, .m4a and the like)."
        )
    raise DataError(f"{folder} is empty: no files in it or below; put audio files there.")
