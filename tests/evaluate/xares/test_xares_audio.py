"""Audio of X-ARES tasks: tars are found, checked and linked; each failure of a download is one sentence."""

from __future__ import annotations

import os
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import pytest
from xares_toy_tasks import write_tars

from bestrq2.data.tar_labels import MARKER
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.xares.audio import download, find_audio_tars, link_tars
from bestrq2.files import folder_lock

SPLITS = {"train": "train*.tar", "test": "test*.tar"}


@pytest.fixture
def folder(tmp_path):
    return write_tars(tmp_path, "toy")


def test_whole_tars_are_found_with_their_labelled_clips(folder):
    found = find_audio_tars(folder, SPLITS, downloaded=False)
    assert [path.name for path in found.paths] == ["test-000000.tar", "train-000000.tar"]
    assert found.clips == 28


def test_patterns_with_braces_need_every_tar(folder):
    assert len(find_audio_tars(folder, {"train": "{train,test}-000000.tar"}, downloaded=False).paths) == 2
    with pytest.raises(DataError, match=r"no tar of the split 'train'"):
        find_audio_tars(folder, {"train": "train-00000{0..1}.tar"}, downloaded=False)


def test_a_missing_folder_is_named_with_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder; it should hold train\*\.tar, test\*\.tar"):
        find_audio_tars(tmp_path / "nowhere", SPLITS, downloaded=False)


def test_a_split_without_tars_is_named_with_what_is_there(folder):
    sentence = r"no tar of the split 'valid': it should be called valid\*\.tar, there are test-000000\.tar, train-"
    with pytest.raises(DataError, match=sentence):
        find_audio_tars(folder, {**SPLITS, "valid": "valid*.tar"}, downloaded=False)
    with pytest.raises(DataError, match=r"delete .* and run the command again"):
        find_audio_tars(folder, {"valid": "valid*.tar"}, downloaded=True)


@pytest.mark.parametrize("share", [0.3, 0.97])
def test_a_half_downloaded_tar_is_refused(folder, share):
    tar = folder / "test-000000.tar"
    os.truncate(tar, int(share * tar.stat().st_size) // 512 * 512)
    with pytest.raises(DataError, match=r"test-000000\.tar: the tar is truncated"):
        find_audio_tars(folder, SPLITS, downloaded=False)


def test_what_is_no_tar_is_refused(folder):
    (folder / "train-000001.tar").write_text("<html>Too many requests</html>" * 100)
    with pytest.raises(DataError, match=r"train-000001\.tar: is not a tar"):
        find_audio_tars(folder, SPLITS, downloaded=False)


def test_other_audio_has_another_digest(tmp_path, folder):
    digest = find_audio_tars(folder, SPLITS, downloaded=False).digest
    assert find_audio_tars(write_tars(tmp_path / "same", "toy"), SPLITS, downloaded=False).digest == digest
    assert find_audio_tars(write_tars(tmp_path / "other", "toy", seed=1), SPLITS, downloaded=False).digest != digest


def test_linked_tars_are_links_and_the_folder_of_the_data_stays_as_it_was(tmp_path, folder):
    before = sorted(folder.iterdir())
    tars = find_audio_tars(folder, SPLITS, downloaded=False)
    link_tars(tars.paths, tmp_path / "work")
    link_tars(tars.paths, tmp_path / "work")
    assert (tmp_path / "work" / MARKER).exists()
    assert (tmp_path / "work" / "train-000000.tar").read_bytes() == (folder / "train-000000.tar").read_bytes()
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def harness(monkeypatch):
    """Stands for the harness; `harness.act` is what its download does."""
    stand_in = types.SimpleNamespace(act=lambda folder: None, calls=0)

    class XaresTask:
        def __init__(self, config):
            self.folder = Path(config.env_root) / config.name

        def download_audio_tar(self):
            stand_in.calls += 1
            stand_in.act(self.folder)
            (self.folder / MARKER).touch()

    monkeypatch.setitem(sys.modules, "xares", types.ModuleType("xares"))
    module = types.ModuleType("xares.task")
    module.XaresTask = XaresTask
    monkeypatch.setitem(sys.modules, "xares.task", module)
    return stand_in


def toy_config(**changes):
    return types.SimpleNamespace(
        **{"name": "toy", "private": False, "zenodo_id": "123", "env_root": None, "pretrained_dependencies": None}
        | changes
    )


def test_what_is_there_is_not_downloaded_again(tmp_path, harness):
    download(toy_config(), tmp_path)
    download(toy_config(), tmp_path)
    assert harness.calls == 1


def test_temporary_files_lie_with_the_data_and_go_at_the_end(tmp_path, harness):
    (tmp_path / "toy" / ".partial").mkdir(parents=True)
    (tmp_path / "toy" / ".partial" / "123.zip").write_bytes(b"half of an earlier download")
    seen = []

    def act(folder):
        seen.append((tempfile.gettempdir(), sorted(Path(tempfile.gettempdir()).iterdir())))

    harness.act, before = act, tempfile.gettempdir()
    download(toy_config(), tmp_path)
    assert seen == [(str(tmp_path / "toy" / ".partial"), [])]
    assert tempfile.gettempdir() == before
    assert not (tmp_path / "toy" / ".partial").exists()


def test_a_damaged_archive_is_deleted_so_that_the_next_call_gets_it_anew(tmp_path, harness):
    def act(folder):
        (folder / "123.zip").write_text("<html>429 Too Many Requests</html>")
        raise zipfile.BadZipFile("File is not a zip file")

    harness.act = act
    with pytest.raises(DataError, match=r"123\.zip: the download is not a whole archive and was deleted; run the"):
        download(toy_config(), tmp_path)
    assert not (tmp_path / "toy" / "123.zip").exists()
    assert not (tmp_path / "toy" / MARKER).exists()


def test_a_failing_connection_is_one_sentence_with_a_way_by_hand(tmp_path, harness):
    def act(folder):
        raise ConnectionError("Max retries exceeded with url: /api/records/123\nmore")

    harness.act = act
    with pytest.raises(DataError) as caught:
        download(toy_config(), tmp_path)
    assert "record 123 of Zenodo cannot be downloaded (zenodo.org cannot be reached); run the" in str(caught.value)
    assert f"put its tars into {tmp_path / 'toy'} and name {tmp_path} in --data" in str(caught.value)


def test_what_a_task_needs_from_the_hub_is_named(tmp_path, harness, monkeypatch):
    def refuse(self, config):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(sys.modules["xares.task"].XaresTask, "__init__", refuse)
    with pytest.raises(
        DataError, match=r"^the task needs bert:tokenizer, which cannot be fetched from .* hub \(We could"
    ):
        download(toy_config(pretrained_dependencies=["bert:tokenizer"]), tmp_path)


@pytest.mark.parametrize("changes", [{"private": True}, {"zenodo_id": None}])
def test_data_that_are_not_public_are_not_asked_for(tmp_path, harness, changes):
    with pytest.raises(DataError, match="its data are not public; put their tars into"):
        download(toy_config(**changes), tmp_path)
    assert harness.calls == 0


def test_two_processes_do_not_download_the_same(tmp_path, harness):
    (tmp_path / "toy").mkdir()
    with folder_lock(tmp_path / "toy"), pytest.raises(ConfigError, match="another process is writing to it"):
        download(toy_config(), tmp_path)
    assert harness.calls == 0
