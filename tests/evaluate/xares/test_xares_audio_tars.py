"""Tars of a task are found, checked and lent."""

from __future__ import annotations

import os

import pytest
from xares_toy_tasks import write_tars

from bestrq2.data.tar_labels import MARKER
from bestrq2.errors import DataError
from bestrq2.evaluate.xares.audio_tars import find_audio_tars, lend

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
    with pytest.raises(DataError, match=r"delete .* and run the command again to download it anew"):
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


def test_lent_tars_are_links_and_the_folder_of_the_data_stays_as_it_was(tmp_path, folder):
    before = sorted(folder.iterdir())
    tars = find_audio_tars(folder, SPLITS, downloaded=False)
    lend(tars.paths, tmp_path / "work")
    lend(tars.paths, tmp_path / "work")
    assert (tmp_path / "work" / MARKER).exists()
    assert (tmp_path / "work" / "train-000000.tar").read_bytes() == (folder / "train-000000.tar").read_bytes()
    assert sorted(folder.iterdir()) == before
