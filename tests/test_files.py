"""Files on disk are the old ones or the new ones, whatever goes wrong in between."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.files import disk_errors, whole_file, write_bytes, write_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_renamed_only_when_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_write_leaves_the_old_file(tmp_path, error, existed):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old")

    def write() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == (["a.txt"] if existed else [])
    assert not existed or path.read_text() == "old"


def test_text_and_bytes_are_written_unchanged(tmp_path):
    write_text(tmp_path / "t", "süß ♪\n")
    assert (tmp_path / "t").read_bytes() == "süß ♪\n".encode()
    write_text(tmp_path / "t", os.fsdecode(b"odd \xff name"))
    assert (tmp_path / "t").read_text() == "odd ? name"
    write_bytes(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"


def test_contents_are_synchronised_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("synchronised"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("named"), replace(self, target))[1])
    write_text(tmp_path / "a.txt", "new")
    assert events == ["synchronised", "named"]


def fill_with(text: str):
    def fill(folder: Path) -> None:
        folder.mkdir()
        (folder / "one").write_text(text)
        (folder / "two").write_text(text)

    return fill


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "model"
    write_folder(path, fill_with("old"))
    (path / "extra").write_text("only in the old one")
    write_folder(path, fill_with("new"))
    assert names(tmp_path) == ["model"]
    assert names(path) == ["one", "two"]
    assert (path / "one").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_folder(tmp_path, error):
    path = tmp_path / "model"
    write_folder(path, fill_with("old"))

    def broken(folder: Path) -> None:
        folder.mkdir()
        (folder / "one").write_text("half")
        raise error

    with pytest.raises(error):
        write_folder(path, broken)
    assert names(tmp_path) == ["model"]
    assert (path / "two").read_text() == "old"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    def fill(folder: Path) -> None:
        folder.mkdir()
        save_file({"one": torch.ones(2)}, folder / "model.safetensors")  # made private by safetensors
        (folder / "config.json").write_text("{}")

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "model", fill)
        with whole_file(tmp_path / "model" / "reference.safetensors") as temporary:
            save_file({"one": torch.ones(2)}, temporary)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(["model.safetensors", "config.json", "reference.safetensors"], 0o666 & ~umask)


def test_a_full_disk_is_recognised_behind_an_error_of_safetensors(tmp_path):
    def full(folder: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(BestRQ2Error, match="the disk is full"), disk_errors(tmp_path / "out"):
        write_folder(tmp_path / "out", full)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_of_one_sentence(tmp_path, number):
    message = r"out: the disk is full; .*free space and run the command again"
    with pytest.raises(BestRQ2Error, match=message) as error, disk_errors(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert not isinstance(error.value, ConfigError)


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP]
)
def test_an_unwritable_path_is_an_error_of_one_sentence(tmp_path, number):
    message = r"^/some/file: cannot be written \(.+\); name another output$"
    with pytest.raises(ConfigError, match=message), disk_errors(tmp_path / "out"):
        raise OSError(number, os.strerror(number), "/some/file")
    with pytest.raises(ConfigError, match="out: cannot be written"), disk_errors(tmp_path / "out"):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ConnectionError), disk_errors(tmp_path):
        raise ConnectionError(errno.ECONNRESET, "gone")
    with pytest.raises(ValueError, match="wrong"), disk_errors(tmp_path):
        raise ValueError("wrong")
