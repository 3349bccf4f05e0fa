"""Downloads by the harness: each trouble is one sentence, and nothing half is left."""

from __future__ import annotations

import sys
import tempfile
import types
import zipfile
from pathlib import Path

import pytest

from bestrq2.data.tar_labels import MARKER
from bestrq2.errors import ConfigError, DataError
from bestrq2.evaluate.xares.downloading import download
from bestrq2.files import folder_lock


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


def config(**changes):
    return types.SimpleNamespace(
        **{"name": "toy", "private": False, "zenodo_id": "123", "env_root": None, "pretrained_dependencies": None}
        | changes
    )


def test_what_is_there_is_not_downloaded_again(tmp_path, harness):
    download(config(), tmp_path)
    download(config(), tmp_path)
    assert harness.calls == 1


def test_temporary_files_lie_with_the_data_and_go_at_the_end(tmp_path, harness):
    (tmp_path / "toy" / ".partial").mkdir(parents=True)
    (tmp_path / "toy" / ".partial" / "123.zip").write_bytes(b"half of an earlier download")
    seen = []

    def act(folder):
        seen.append((tempfile.gettempdir(), sorted(Path(tempfile.gettempdir()).iterdir())))

    harness.act, before = act, tempfile.gettempdir()
    download(config(), tmp_path)
    assert seen == [(str(tmp_path / "toy" / ".partial"), [])]
    assert tempfile.gettempdir() == before
    assert not (tmp_path / "toy" / ".partial").exists()


def test_a_damaged_archive_is_deleted_so_that_the_next_call_gets_it_anew(tmp_path, harness):
    def act(folder):
        (folder / "123.zip").write_text("<html>429 Too Many Requests</html>")
        raise zipfile.BadZipFile("File is not a zip file")

    harness.act = act
    with pytest.raises(DataError, match=r"123\.zip: what Zenodo sent is no whole archive, and is deleted; run the"):
        download(config(), tmp_path)
    assert not (tmp_path / "toy" / "123.zip").exists()
    assert not (tmp_path / "toy" / MARKER).exists()


def test_a_failing_connection_is_one_sentence_with_a_way_by_hand(tmp_path, harness):
    def act(folder):
        raise ConnectionError("Max retries exceeded with url: /api/records/123\nmore")

    harness.act = act
    with pytest.raises(DataError) as caught:
        download(config(), tmp_path)
    assert "record 123 of Zenodo cannot be downloaded (zenodo.org cannot be reached); run the" in str(caught.value)
    assert f"put its tars into {tmp_path / 'toy'} and name {tmp_path} in --data" in str(caught.value)


def test_what_a_task_needs_from_the_hub_is_named(tmp_path, harness, monkeypatch):
    def refuse(self, config):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(sys.modules["xares.task"].XaresTask, "__init__", refuse)
    with pytest.raises(
        DataError, match=r"^the task needs bert:tokenizer, which cannot be fetched from .* hub \(We could"
    ):
        download(config(pretrained_dependencies=["bert:tokenizer"]), tmp_path)


@pytest.mark.parametrize("changes", [{"private": True}, {"zenodo_id": None}])
def test_data_that_are_not_public_are_not_asked_for(tmp_path, harness, changes):
    with pytest.raises(DataError, match="its data are not public; put their tars into"):
        download(config(**changes), tmp_path)
    assert harness.calls == 0


def test_two_processes_do_not_download_the_same(tmp_path, harness):
    (tmp_path / "toy").mkdir()
    with folder_lock(tmp_path / "toy"), pytest.raises(ConfigError, match="another process is writing to it"):
        download(config(), tmp_path)
    assert harness.calls == 0
