"""Refusals of bestrq2 prepare: one sentence each, and no foreign file is touched."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from refusing import refused

from bestrq2 import cli
from bestrq2.commands.prepare import prepare
from bestrq2.data.open_source import open_source
from bestrq2.data.prepare import run
from example_sounds import RATE, scene


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("format", "mp3", "format must be one of wav, flac, got mp3"),
        ("sampling_rate", "0", "sampling_rate is 0; expected 1000 to 768000 Hz."),
        ("segment_seconds", "0.1", "segment_seconds is 0.1; it must be at least min_seconds (0.5), or null"),
        ("segment_seconds", ".nan", "segment_seconds is nan; it must be at least"),
        ("min_seconds", "-1", "min_seconds is -1.0; it must be positive."),
        ("shard_size", "0", "shard_size is 0.0; it must be positive."),
        ("num_workers", "-1", "num_workers is -1; it must be 0 or more"),
        ("num_workers", "many", "num_workers: "),
        ("rate", "8000", "there is no setting '--rate'"),
    ],
)
def test_bad_settings_are_refused(source, tmp_path, capsys, setting, value, sentence):
    assert refused(capsys, source, tmp_path / "out", f"--{setting}", value).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_impossible_outputs_are_refused(source, tmp_path, capsys):
    (tmp_path / "file").write_text("notes")
    assert refused(capsys, source, tmp_path / "file") == f"{tmp_path / 'file'}: is a file; name a folder"
    assert "cannot be written" in refused(capsys, source, tmp_path / "file" / "out")
    assert "does not exist" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "full").mkdir()
    for name in ("notes.txt", "b.wav", "c", "d"):
        (tmp_path / "full" / name).touch()
    message = refused(capsys, source, tmp_path / "full")
    assert message == f"{tmp_path / 'full'}: holds other files (b.wav, c, d and 1 more); name a new or empty folder"
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["b.wav", "c", "d", "notes.txt"]


def test_an_output_within_its_source_is_refused_before_anything_is_written(source, made, tmp_path, capsys, monkeypatch):
    shutil.copytree(source, tmp_path / "audio")
    (tmp_path / "tars").mkdir()
    shutil.copyfile(made / "shard-000000.tar", tmp_path / "tars" / "0.tar")
    (tmp_path / "link").symlink_to(tmp_path / "audio")
    monkeypatch.chdir(tmp_path / "audio")
    for folder, output in (("audio", "audio/shards"), ("tars", "tars/a/b"), ("tars", "tars"), ("audio", "link/out")):
        message = refused(capsys, tmp_path / folder, tmp_path / output)
        assert message.startswith(f"{tmp_path / output}: is inside the source {tmp_path / folder}, ")
    assert refused(capsys, ".", "out").startswith("out: is inside the source ., ")
    assert len(list((tmp_path / "audio").iterdir())) == 6
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["0.tar"]
    assert prepare("../audio", Path("../audio-shards"), num_workers=1)["clips"] == 6


def test_a_source_without_usable_audio_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(b"no audio" * 100)
    soundfile.write(tmp_path / "in" / "b.wav", np.zeros(RATE), RATE)
    message = refused(capsys, tmp_path / "in", tmp_path / "out")
    assert message == (
        f"{tmp_path / 'in'}: not one of 2 recordings could be used; the first, {tmp_path / 'in' / 'a.wav'}, is not "
        'audio that libsndfile or FFmpeg can read (in all 1 "is not audio that libsndfile or FFmpeg can read", 1 "is '
        f'silent"); see {tmp_path / "out" / "rejected.csv"}'
    )
    assert len((tmp_path / "out" / "rejected.csv").read_text().splitlines()) == 3
    soundfile.write(tmp_path / "in" / "b.wav", scene(RATE, 1), RATE)
    assert prepare(str(tmp_path / "in"), tmp_path / "out", num_workers=1)["clips"] == 1


def test_another_corpus_is_not_mixed_in(source, made, damaged, tmp_path, capsys):
    format = json.loads((made / "summary.json").read_text())["format"]
    options = ["--shard_size", "0.01", "--format", format]
    for finished in (True, False):
        if not finished:
            (damaged / "summary.json").unlink()
        message = refused(capsys, source, damaged, *options, "--segment_seconds", "20", "--sampling_rate", "8000")
        assert "(sampling_rate was 16000, is 8000; segment_seconds was 30.0, is 20.0)" in message
        message = refused(capsys, source / "1.wav", damaged, *options)
        assert f"(source was {source}, is {source / '1.wav'}; recordings was 6, is 1)" in message
    assert cli.run(["prepare", str(source), str(damaged), *options]) == 0
    assert (damaged / "summary.json").read_bytes() == (made / "summary.json").read_bytes()


def test_missing_and_foreign_shards_are_refused(source, made, damaged, capsys):
    options = ["--shard_size", "0.01", "--format", json.loads((made / "summary.json").read_text())["format"]]
    (damaged / "summary.json").unlink()
    (damaged / "shard-000002.tar.index.parquet").unlink()
    assert "shard-000002.tar: cannot be continued from" in refused(capsys, source, damaged, *options)
    (damaged / "shard-000001.tar").unlink()
    assert "shard-000001.tar: is missing, later shards exist" in refused(capsys, source, damaged, *options)


def options_of(made: Path) -> list[str]:
    """The options that `made` was made with."""
    return ["--shard_size", "0.01", "--format", json.loads((made / "summary.json").read_text())["format"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_refused_run_changes_no_file(source, made, damaged, capsys):
    (damaged / "summary.json").unlink()
    for name in (".notes.tmp", ".shard-000000.tar.123.tmp", ".cache"):
        (damaged / name).write_text("mine")
    before = contents(damaged)
    assert "holds a corpus made from something else" in refused(capsys, source, damaged, "--sampling_rate", "8000")
    assert contents(damaged) == before
    for index in damaged.glob("*.index.parquet"):
        index.unlink()
    before = contents(damaged)
    message = refused(capsys, source, damaged, *options_of(made))
    shard = damaged / "shard-000000.tar"
    assert message == f"{shard}: was not made by bestrq2 prepare; name a new or empty folder"
    open_source(damaged)  # writes an index, without our ledger
    assert message == refused(capsys, source, damaged, *options_of(made))
    assert contents(damaged).items() >= before.items()


def test_only_temporaries_of_its_own_are_removed(source, made, damaged):
    (damaged / "summary.json").unlink()
    names = (".notes.tmp", ".cache", ".shard-000007.tar.123.tmp", ".shard-000007.tar.index.parquet.123.tmp")
    for name in names:
        (damaged / name).write_text("half")
    assert cli.run(["prepare", str(source), str(damaged), *options_of(made)]) == 0
    assert {name for name in names if (damaged / name).exists()} == {".notes.tmp", ".cache"}


def test_a_foreign_list_is_left_alone(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rejected.csv").write_text("applicant,why\n")
    message = refused(capsys, source, tmp_path / "out")
    assert message == f"{tmp_path / 'out'}: holds other files (rejected.csv); name a new or empty folder"
    assert (tmp_path / "out" / "rejected.csv").read_text() == "applicant,why\n"


def test_a_finished_corpus_that_lost_a_shard_is_not_called_complete(source, made, damaged, capsys):
    shard = damaged / "shard-000002.tar"
    content = shard.read_bytes()
    shard.unlink()
    message = refused(capsys, source, damaged, *options_of(made))
    assert message == (
        f"{shard}: is missing from a finished corpus; restore it, or delete summary.json and the shards after it "
        "and run the same command again"
    )
    shard.write_bytes(content[:-512])
    message = refused(capsys, source, damaged, *options_of(made))
    assert message.startswith(f"{damaged}: its shards have ")
    assert message.endswith("; find the damaged one with --check")
    shard.unlink()
    for path in [damaged / "summary.json", *sorted(damaged.glob("shard-*.tar"))[2:]]:
        path.unlink()
    assert cli.run(["prepare", str(source), str(damaged), *options_of(made)]) == 0
    assert (damaged / "summary.json").read_bytes() == (made / "summary.json").read_bytes()


@pytest.mark.parametrize("lost", ["clips", "dropped", "hours_in", "shards", "sampling_rate", "log_mel"])
def test_a_summary_that_lacks_a_value_is_refused(source, made, damaged, capsys, lost):
    summary = json.loads((damaged / "summary.json").read_text())
    summary.pop(lost)
    (damaged / "summary.json").write_text(json.dumps(summary))
    sentence = f"{damaged / 'summary.json'}: lacks {lost!r}; move it away and repeat the command that made it"
    assert refused(capsys, source, damaged, *options_of(made)) == sentence
    assert refused(capsys, "anything", damaged, "--check") == sentence


def test_the_spelling_of_the_source_changes_nothing(source, made, tmp_path, monkeypatch, caplog):
    """From another working folder, relative, through a parent: the same corpus; metadata holds absolute paths."""
    caplog.set_level("INFO")
    (tmp_path / "[x] {a,b}" / "in").mkdir(parents=True)
    folder = tmp_path / "[x] {a,b}"
    for number in range(2):
        soundfile.write(folder / "in" / f"{number}.wav", scene(RATE, number), RATE)
    (folder / "list.txt").write_text("in/1.wav\nin/0.wav\n")
    spellings = {
        "folder": [(".", "in"), (".", "./in/"), ("in", "."), ("in", "../in"), ("/", str(folder / "in"))],
        "list": [(".", "list.txt"), ("in", "../list.txt")],
        "file": [(".", "in/0.wav"), ("in", "0.wav")],
        "pattern": [(".", "in/*.wav"), (".", "in/{0,1}.wav"), ("in", "?.wav")],
    }
    for kind, of_kind in spellings.items():
        for start, spec in of_kind:
            monkeypatch.chdir(folder / start)
            output = tmp_path / f"{kind} {len(spec) if kind == 'pattern' else ''}"
            prepare(spec, output, num_workers=1)
            for clip in prepared_json(output):
                assert Path(clip["path"]).parent == folder / "in"
    assert sum("is complete already" in record.getMessage() for record in caplog.records) == 6


def prepared_json(folder: Path) -> list[dict[str, object]]:
    with tarfile.open(folder / "shard-000000.tar") as tar:
        return [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]


def test_a_finished_corpus_is_not_made_again(source, made, monkeypatch):
    monkeypatch.setattr(run, "_pack", lambda *_: pytest.fail("made again"))
    summary = json.loads((made / "summary.json").read_text())
    assert prepare(str(source), made, format=summary["format"], shard_size=0.01) == summary
