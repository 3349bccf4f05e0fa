"""bestrq2 prepare --check: whole corpora pass, and every damage is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from refusing import refused

from bestrq2 import cli
from bestrq2.commands.prepare import prepare
from bestrq2.data.prepare import check
from bestrq2.data.prepare.check import check_prepared
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import folder_lock
from example_sounds import RATE


def test_the_check_passes_what_prepare_wrote(made, damaged, prepared_mixed, capsys, caplog):
    assert check_prepared(made, 2) == json.loads((made / "summary.json").read_text())
    assert check_prepared(prepared_mixed.folder, 2) == prepared_mixed.summary
    caplog.set_level("INFO")
    assert cli.run(["prepare", "anything", str(damaged), "--check", "--num_workers", "1"]) == 0
    assert capsys.readouterr().out == f"{damaged}\n"
    assert f"{damaged}: complete and undamaged; 6 clips, 0.00 of 0.00 hours from 6 recordings" in caplog.text


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def member_at(path: Path, suffix: str) -> int:
    """Where the middle of the first member with that suffix lies."""
    from bestrq2.data.shards.index import build_index

    index = build_index(path)
    offset, length = (
        (index.json_offset, index.json_length) if suffix == "json" else (index.audio_offset, index.audio_length)
    )
    return int(offset[0] + length[0] // 2)


def test_the_check_finds_every_damage(made, damaged, capsys):
    def found() -> str:
        return refused(capsys, "anything", damaged, "--check", "--num_workers", "1")

    tar = damaged / "shard-000001.tar"
    whole = tar.read_bytes()
    flip(tar, member_at(tar, "audio"))
    message = found()
    assert f"{tar}: 0000000" in message
    assert "does not hold the samples" in message or "cannot be decoded" in message
    tar.write_bytes(whole)
    flip(tar, member_at(tar, "json"))
    assert "JSON" in found()
    tar.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in found()
    tar.write_bytes(whole)
    shutil.copyfile(damaged / "shard-000000.tar", tar)
    shutil.copyfile(damaged / "shard-000000.tar.index.parquet", damaged / "shard-000001.tar.index.parquet")
    assert found().startswith(f"{tar}: is not the shard of that number; ")
    index = damaged / "shard-000001.tar.index.parquet"
    index.unlink()
    assert found().startswith(f"{index}: is missing; ")
    index.write_bytes(b"PAR1")
    assert found().startswith(f"{index}: is damaged; ")
    tar.unlink()
    (damaged / "shard-000003.tar").unlink()
    message = found()
    assert f"{tar}: " in message
    assert "(the first of 2 problems)" in message


def test_the_check_compares_with_the_summary(damaged, made, capsys):
    summary = json.loads((damaged / "summary.json").read_text())
    (damaged / "summary.json").write_text(json.dumps({**summary, "clips": 7}))
    message = refused(capsys, "anything", damaged, "--check")
    assert message.startswith("the summary says 7 clips, the shards hold 6")
    (damaged / "summary.json").write_text(json.dumps({**summary, "shards": 3}))
    message = refused(capsys, "anything", damaged, "--check")
    assert "is not one of the 3 shards of the summary (the first of 3 such files); move it away" in message
    (damaged / "summary.json").write_text("{")
    assert "is damaged" in refused(capsys, "anything", damaged, "--check")
    (damaged / "summary.json").unlink()
    assert "is not a finished output of bestrq2 prepare" in refused(capsys, "anything", damaged, "--check")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"recordings": 12}, "the summary says 12 recordings, the shards hold 13"),
        ({"dropped": {"broken": 2, "silent": 3, "too short": 1, "duplicate": 3}}, "the summary says 3 silent ones"),
        ({"hours_in": 1.0}, "the summary says 57,600,000 samples read, the shards hold "),
        ({"clipped": 1}, "the summary says 1 clipped clips, the shards hold 2"),
        ({"log_mel": "mean_db"}, "the summary has another mean_db of the spectrogram than the shards"),
        ({"log_mel": "standard_deviation_db"}, "the summary has another standard_deviation_db of the spectrogram"),
    ],
)
def test_the_check_compares_every_count_and_statistic(prepared_mixed, tmp_path, capsys, value, sentence):
    shutil.copytree(prepared_mixed.folder, tmp_path / "copy")
    summary = prepared_mixed.summary
    if isinstance(name := value.get("log_mel"), str):
        summary["log_mel"][name][5] += 0.01
    else:
        summary |= value
    (tmp_path / "copy" / "summary.json").write_text(json.dumps(summary))
    message = refused(capsys, "anything", tmp_path / "copy", "--check", "--num_workers", "1")
    assert message.startswith(sentence)
    assert "move summary.json to another place and prepare again" in message


def test_the_check_compares_the_list_of_rejections(prepared_mixed, tmp_path, capsys):
    shutil.copytree(prepared_mixed.folder, tmp_path / "copy")
    listing = tmp_path / "copy" / "rejected.csv"
    lines = listing.read_bytes().splitlines(keepends=True)

    def found() -> str:
        return refused(capsys, "anything", tmp_path / "copy", "--check", "--num_workers", "1")

    listing.write_bytes(b"".join(lines[:4] + lines[5:]))
    assert "g-broken.wav (is not audio" in (message := found())
    assert " is not in its place in the list; " in message
    listing.write_bytes(b"".join([*lines, b"other.wav,is silent.\n"]))
    assert found().startswith(f"{listing}: has 1 entries that nothing was dropped for; ")
    listing.unlink()
    assert "f-again.flac (has the same content as " in found()
    listing.write_bytes(b"".join(lines))
    assert check_prepared(tmp_path / "copy", 1) == prepared_mixed.summary


def test_what_is_dropped_after_the_last_shard_passes_the_check(tmp_path, source):
    """Its list is in no shard, since there is no clip to keep it with."""
    shutil.copytree(source, tmp_path / "in")
    for name in ("x.wav", "y.wav"):
        soundfile.write(tmp_path / "in" / name, np.zeros(RATE), RATE)
    made = prepare(str(tmp_path / "in"), tmp_path / "out", shard_size=0.01, num_workers=1)
    assert made["dropped"]["silent"] == 2
    assert check_prepared(tmp_path / "out", 1) == made
    with (tmp_path / "out" / "rejected.csv").open("a") as file:
        file.write("z.wav,is silent.\n")
    with pytest.raises(DataError, match="has 3 entries that nothing was dropped for"):
        check_prepared(tmp_path / "out", 1)


def test_an_interrupted_check_continues(prepared_mixed, tmp_path, monkeypatch):
    shutil.copytree(prepared_mixed.folder, tmp_path / "copy")
    original, read, stopped = check._check_shard, [], []

    def interrupted(tar, *arguments):
        read.append(tar.name)
        if len(read) == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return original(tar, *arguments)

    monkeypatch.setattr(check, "_check_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_prepared(tmp_path / "copy", 0)
    assert check_prepared(tmp_path / "copy", 0) == prepared_mixed.summary
    assert read[3] != "shard-000000.tar"
    assert {*read} == {f"shard-{number:06d}.tar" for number in range(prepared_mixed.summary["shards"])}
    assert not list((tmp_path / "copy").glob(".check*"))
    read.clear()
    check_prepared(tmp_path / "copy", 0)
    assert len(read) == prepared_mixed.summary["shards"]  # a finished check leaves nothing behind


def test_a_folder_that_cannot_be_written_is_checked(made, monkeypatch):
    monkeypatch.setattr(check.os, "access", lambda *_: False)
    before = sorted(path.name for path in made.iterdir())
    assert check_prepared(made, 0)["clips"] == 6
    assert sorted(path.name for path in made.iterdir()) == before


def test_a_folder_lock_can_be_taken_again_after_it_was_let_go(tmp_path):
    for _ in range(2):
        with folder_lock(tmp_path):
            assert (tmp_path / ".lock").exists()
            with pytest.raises(ConfigError, match="another process is writing to it"), folder_lock(tmp_path):
                pass
        assert not (tmp_path / ".lock").exists()


def test_print_config(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(["prepare", "a", "b", "--format", "flac", "--print-config"])
    assert caught.value.code == 0
    assert "format: flac\nsegment_seconds: 30.0\n" in capsys.readouterr().out
