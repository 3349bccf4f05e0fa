"""What prepare refuses to do, and the check of what it has done: one sentence each, exit code 2."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bestrq2 import cli
from bestrq2.data.opening import open_source
from bestrq2.data.prepare import run
from bestrq2.data.prepare.check import check_prepared
from bestrq2.data.prepare.run import prepare
from bestrq2.data.progress import Progress
from bestrq2.errors import ConfigError, DataError
from bestrq2.files import folder_lock
from example_sounds import RATE, scene


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", scene(RATE, number), RATE)
    return folder


@pytest.fixture(scope="module", params=["wav", "flac"])
def made(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "out"
    prepare(str(source), output, format=request.param, shard_size=0.01, num_workers=2)
    return output


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy to damage; time stamps are not copied, which is no damage."""
    shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copyfile)
    return tmp_path / "copy"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.run(["prepare", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bestrq2 prepare: ")
    return lines[0].removeprefix("bestrq2 prepare: ")


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("format", "mp3", "format is 'mp3'; expected wav or flac."),
        ("sampling_rate", "0", "sampling_rate is 0; expected 1000 to 768000 Hz."),
        ("segment_seconds", "0.1", "segment_seconds is 0.1; it must be at least min_seconds (0.5), or null"),
        ("segment_seconds", ".nan", "segment_seconds is nan; it must be at least"),
        ("min_seconds", "-1", "min_seconds is -1.0; it must be positive."),
        ("shard_size", "0", "shard_size is 0.0; it must be positive."),
        ("num_workers", "0", "num_workers is 0; it must be 1 or more."),
        ("num_workers", "many", "num_workers: "),
        ("rate", "8000", "there is no setting '--rate'"),
    ],
)
def test_bad_settings(source, tmp_path, capsys, setting, value, sentence):
    assert refused(capsys, source, tmp_path / "out", f"--{setting}", value).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be(source, tmp_path, capsys):
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
        assert message.startswith(f"{tmp_path / output}: lies in the source {tmp_path / folder}, ")
    assert refused(capsys, ".", "out").startswith("out: lies in the source ., ")
    assert len(list((tmp_path / "audio").iterdir())) == 6
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["0.tar"]
    assert prepare("../audio", Path("../audio-shards"), num_workers=1)["clips"] == 6


def test_a_source_without_anything_to_use(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(b"no audio" * 100)
    soundfile.write(tmp_path / "in" / "b.wav", np.zeros(RATE), RATE)
    message = refused(capsys, tmp_path / "in", tmp_path / "out")
    assert (
        message == f"{tmp_path / 'in'}: not one of 2 recordings could be used; see {tmp_path / 'out' / 'rejected.csv'}"
    )
    assert len((tmp_path / "out" / "rejected.csv").read_text().splitlines()) == 3
    soundfile.write(tmp_path / "in" / "b.wav", scene(RATE, 1), RATE)
    assert prepare(str(tmp_path / "in"), tmp_path / "out", num_workers=1)["clips"] == 1


def test_a_stream_is_refused(made, tmp_path, capsys):
    assert "is a stream, which only pretraining reads" in refused(
        capsys, f"pipe:cat {made}/shard-000000.tar", tmp_path / "out"
    )


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


def test_shards_that_went_missing_or_are_not_ours(source, made, damaged, capsys):
    options = ["--shard_size", "0.01", "--format", json.loads((made / "summary.json").read_text())["format"]]
    (damaged / "summary.json").unlink()
    (damaged / "shard-000002.tar.index.parquet").unlink()
    assert "shard-000002.tar: cannot be continued from" in refused(capsys, source, damaged, *options)
    (damaged / "shard-000001.tar").unlink()
    assert "shard-000001.tar: is missing, later shards are there" in refused(capsys, source, damaged, *options)


def options_of(made: Path) -> list[str]:
    """The options that `made` was made with."""
    return ["--shard_size", "0.01", "--format", json.loads((made / "summary.json").read_text())["format"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_refused_run_touches_nothing_and_names_a_new_folder_for_tars_of_others(source, made, damaged, capsys):
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


def test_a_list_that_is_not_of_prepare_is_left_alone(source, tmp_path, capsys):
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
        f"{shard}: is missing from a finished corpus; bring it back, or delete summary.json and the shards after it "
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
def test_a_summary_that_lost_a_value_is_one_sentence(source, made, damaged, capsys, lost):
    summary = json.loads((damaged / "summary.json").read_text())
    summary.pop(lost)
    (damaged / "summary.json").write_text(json.dumps(summary))
    sentence = f"{damaged / 'summary.json'}: has lost {lost!r}; move it away and run the command it was made by again"
    assert refused(capsys, source, damaged, *options_of(made)) == sentence
    assert refused(capsys, "anything", damaged, "--check") == sentence


def test_how_the_source_is_spelled_changes_nothing(source, made, tmp_path, monkeypatch, caplog):
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


def test_the_check_passes_what_prepare_wrote(made, damaged, prepared_mixed, capsys, caplog):
    assert check_prepared(made, 2) == json.loads((made / "summary.json").read_text())
    assert check_prepared(prepared_mixed.folder, 2) == prepared_mixed.summary
    caplog.set_level("INFO")
    assert cli.run(["prepare", "anything", str(damaged), "--check", "--num_workers", "1"]) == 0
    assert capsys.readouterr().out == f"{damaged}\n"
    assert f"{damaged}: whole; 6 clips, 0.00 of 0.00 hours from 6 recordings" in caplog.text


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def member_at(path: Path, suffix: str) -> int:
    """Where the middle of the first member with that suffix lies."""
    from bestrq2.data.shards.building import build_index

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
    assert "is none of the 3 shards of the summary (the first of 3 such files); move it away" in message
    (damaged / "summary.json").write_text("{")
    assert "is damaged" in refused(capsys, "anything", damaged, "--check")
    (damaged / "summary.json").unlink()
    assert "is no finished output of bestrq2 prepare" in refused(capsys, "anything", damaged, "--check")


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
    assert " is not in its place there; " in message
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


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    with Progress("prepare", 200, "files", done=100, lines_every_seconds=0) as progress:
        progress._started -= 10
        progress.show(150, 1.5)
    line = capsys.readouterr().err
    assert line == "prepare: 150/200 files, 5 files/s, 1.50 h of audio, 00:10 left\n"


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
