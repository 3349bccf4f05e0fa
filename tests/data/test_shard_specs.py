"""Which tars and files a pattern, a folder or a list stands for."""

from __future__ import annotations

import pytest
from shard_crops import described
from tars import clip, shard

from bestrq2.data.open_source import open_source
from bestrq2.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    "spec", ["{root}/t-{{0..2}}.tar", "{root}/t-*.tar", "{root}/t-[012].tar", "{root}", "{root}/l.txt"]
)
def test_patterns_folders_and_lists_of_tars_are_shards(tmp_path, spec):
    for number in range(3):
        shard(tmp_path / f"t-{number}.tar", [number], seconds=0.2)
    if spec.endswith("l.txt"):
        (tmp_path / "l.txt").write_text("t-0.tar\nt-1.tar\n./t-2.tar\n")
    source = open_source(spec.format(root=tmp_path))
    assert [name.rpartition("/")[2] for name in described(source, tmp_path)] == ["0000.wav", "0001.wav", "0002.wav"]
    assert spec.format(root=tmp_path) in source.name


def test_csv_lists_and_folders_within_folders(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shard(tmp_path / "in" / "deep" / "a.TAR", [1], seconds=0.2)
    shard(tmp_path / "in" / ".hidden.tar", [2], seconds=0.2)
    (tmp_path / "in" / "notes.txt").touch()
    assert described(open_source(tmp_path / "in"), tmp_path) == ["in/deep/a.TAR/0001.wav"]
    (tmp_path / "l.csv").write_text("path,label\nin/deep/a.TAR,x\n")
    assert len(open_source(tmp_path / "l.csv")) == 1


def test_patterns_of_audio_files_are_files(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.flac").write_bytes(clip(seed=number, kind="FLAC"))
    assert described(open_source(str(tmp_path / "*.flac")), tmp_path) == ["0.flac", "1.flac", "2.flac"]
    assert described(open_source(str(tmp_path / "{2,0}.flac")), tmp_path) == ["2.flac", "0.flac"]


def test_what_is_wrong_with_patterns_and_mixtures_is_named(tmp_path):
    shard(tmp_path / "t-0.tar", [0], seconds=0.2)
    for spec, reason in [
        ("t-{0..1}.tar", r"t-1\.tar does not exist, or nothing fits it; check the pattern .*t-\{0\.\.1\}\.tar"),
        ("u-*.tar", r"u-\*\.tar does not exist, or nothing fits it"),
        ("t-{0..1.tar", "braces are not balanced"),
    ]:
        with pytest.raises(DataError, match=reason):
            open_source(str(tmp_path / spec))
    (tmp_path / "l.txt").write_text("t-0.tar\nt-1.tar\n")
    with pytest.raises(DataError, match=r"t-1\.tar: the shard does not exist; check the list or pattern"):
        open_source(tmp_path / "l.txt")
    (tmp_path / "a.wav").write_bytes(clip())
    with pytest.raises(
        DataError, match="holds 1 audio file and 1 tar; put them into folders of their own and name the"
    ):
        open_source(tmp_path)
    (tmp_path / "l.txt").write_text("t-0.tar\na.wav\n")
    with pytest.raises(DataError, match=r"names 1 tar and other files \(.*a\.wav\); name the two kinds apart"):
        open_source(tmp_path / "l.txt")
