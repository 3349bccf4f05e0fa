"""Kills, Ctrl-C, full disks, several processes: finished shards stay, and the same command ends with the same bytes."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import cli
from bestrq2.commands.prepare import prepare
from bestrq2.data import rejections
from bestrq2.data.prepare import cutting, run
from bestrq2.data.prepare.check import check_prepared
from bestrq2.data.prepare.cutting import Options
from bestrq2.data.prepare.folder import LEDGER, Ledger, Member, shard_path
from bestrq2.data.prepare.summary import BandSums
from bestrq2.data.shards import writer
from bestrq2.data.shards.index import IndexRows, Stamp, build_index, index_path, read_index, write_index
from example_sounds import scene

SECOND = {"segment_seconds": 1.0, "shard_size": 0.15}
FLAGS = ["--segment_seconds", "1", "--shard_size", "0.15"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """Parts of two recordings at most."""
    monkeypatch.setattr("bestrq2.data.parts.BLOCK", 2)


def start(*arguments, environment=(), **options) -> multiprocessing.Process:
    """A prepare in a process of its own."""

    def act() -> None:
        torch.set_num_threads(1)
        os.environ.update(dict(environment))
        prepare(*arguments, **options)

    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    return process


@pytest.mark.parametrize("workers", [0, 3])
def test_the_number_of_workers_changes_no_byte(mixed, prepared_mixed, prepared_folder, tmp_path, workers):
    prepare(str(mixed), tmp_path / "out", num_workers=workers, **SECOND)
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


@pytest.mark.slow
def test_a_prepare_killed_at_any_instant_continues_to_the_same_bytes(mixed, prepared_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting.Options, "segments_per_span", 2)
    prepare(str(mixed), tmp_path / "whole", num_workers=1, **SECOND)
    read_span = cutting.read_span

    def slowly(*arguments):
        time.sleep(0.03)
        return read_span(*arguments)

    monkeypatch.setattr(cutting, "read_span", slowly)  # no instant of the run shall be missed
    output = tmp_path / "out"
    delays = np.random.default_rng(0).uniform(0.15, 0.5, 20)
    finished: dict[str, tuple[int, int]] = {}
    kills = 0
    for delay in delays:
        process = start(str(mixed), output, num_workers=2, **SECOND)
        process.join(delay)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        for tar in output.glob("*.tar"):
            build_index(tar)  # whole
            stamp = (tar.stat().st_ino, tar.stat().st_mtime_ns)
            assert finished.setdefault(tar.name, stamp) == stamp  # never written again
        if (output / "summary.json").exists():
            break
    assert kills >= 3
    monkeypatch.setattr(cutting, "read_span", read_span)
    prepare(str(mixed), output, num_workers=2, **SECOND)
    found = prepared_folder(output)
    assert found.contents == prepared_folder(tmp_path / "whole").contents
    assert all(tar.stat().st_mtime_ns == finished[tar.name][1] for tar in found.tars if tar.name in finished)


@pytest.mark.parametrize("after", ["index", pytest.param("tar", marks=pytest.mark.slow)])
def test_a_kill_around_the_end_of_a_shard_loses_nothing(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch, after
):
    written: list[Path] = []

    def killed(function, *arguments):
        function(*arguments)
        written.append(arguments)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        if after == "index":
            patch.setattr(writer, "write_index", partial(killed, writer.write_index))
        else:
            close = writer.ShardWriter.close
            patch.setattr(run.ShardWriter, "close", lambda *arguments: killed(close, *arguments))
        process = start(str(mixed), tmp_path / "out", num_workers=0, **SECOND)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("*.tar"))) == (2 if after == "index" else 3)
    prepare(str(mixed), tmp_path / "out", num_workers=0, **SECOND)
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


@pytest.mark.parametrize("killed", [False, True])
def test_processes_share_the_work_and_the_last_one_packs(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch, killed
):
    """Started by torchrun; a kill while the shards are packed costs no part."""
    output = tmp_path / "out"
    shared = partial(start, str(mixed), output, num_workers=0, **SECOND)
    for rank in (2, 0, 1):
        with monkeypatch.context() as patch:
            if killed and rank == 1:
                close = run.Packing._close
                patch.setattr(
                    run.Packing,
                    "_close",
                    lambda self, close=close: close(self) if self.shards < 2 else os.kill(os.getpid(), signal.SIGKILL),
                )
            process = shared(environment={"RANK": str(rank), "WORLD_SIZE": "3"})
            process.join()
        assert process.exitcode == (-signal.SIGKILL if killed and rank == 1 else 0)
    if killed:
        assert len(list(output.glob("*.tar"))) == 2
        monkeypatch.setattr(cutting, "read_span", lambda *_: pytest.fail("read again"))
        prepare(str(mixed), output, num_workers=0, **SECOND)  # with another number of processes
    assert prepared_folder(output).contents == prepared_mixed.contents
    assert not list(output.glob(".parts"))


def test_ctrl_c_leaves_whole_shards_and_says_how_to_continue(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch, capsys
):
    take, capture = run.Packing.take, []

    def interrupted(self, rows):
        take(self, rows)
        if self.position[0] >= 4:
            capture.append(self.shards)
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Packing, "take", interrupted)
    arguments = ["prepare", str(mixed), str(tmp_path / "out"), *FLAGS]
    assert cli.run(arguments) == 130
    message = f"{capture[0]} finished shards stay in {tmp_path / 'out'}; run the same command again to continue"
    assert message in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        name for i in range(capture[0]) for name in (f"shard-{i:06d}.tar", f"shard-{i:06d}.tar.index.parquet")
    ]
    monkeypatch.undo()
    assert cli.run(arguments) == 0
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


def test_a_signal_while_a_shard_is_opened_leaves_no_file(mixed, tmp_path, monkeypatch):
    def interrupted():
        assert list((tmp_path / "out").glob(".shard*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "IndexRows", interrupted)
    assert cli.run(["prepare", str(mixed), str(tmp_path / "out"), *FLAGS]) == 130
    assert not list((tmp_path / "out").iterdir())


def test_ctrl_c_in_a_terminal_ends_all_processes_with_one_line(tmp_path, start_cli):
    """The signal reaches the whole group, as a terminal sends it."""
    output = tmp_path / "out"
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "long.flac", np.tile(scene(480_000, 1), 20), 44_100)
    for number in range(400):
        (tmp_path / "in" / f"m{number}.flac").symlink_to("long.flac")
    child = start_cli(["prepare", str(tmp_path / "in"), str(output)])
    child.wait_until(lambda: list(output.glob(".shard*")))
    os.killpg(child.pid, signal.SIGINT)
    finished = child.finish(20)
    assert (finished.returncode, finished.stdout) == (130, "")
    remedy = "run the same command again to continue"
    assert [
        line for line in finished.stderr.splitlines() if line and not line.startswith(("prepare: ", str(tmp_path)))
    ] == [f"bestrq2 prepare: interrupted: 0 finished shards stay in {output}; {remedy}"]
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)  # no worker is left
    assert [path.name for path in output.iterdir()] in ([], ["rejected.csv"])


def test_a_full_disk_is_one_sentence_and_the_run_can_continue(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch, capsys
):
    add = writer.ShardWriter.add

    def full(self, key, *arguments):
        if int(key[:8]) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, key, *arguments)

    arguments = ["prepare", str(mixed), str(tmp_path / "out"), *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "add", full)
        assert cli.run(arguments) == 1
    assert "the disk is full; finished files are whole" in capsys.readouterr().err
    tars = list((tmp_path / "out").glob("*.tar"))
    assert tars
    assert all(len(build_index(tar)) for tar in tars)
    assert cli.run(arguments) == 0
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


def test_a_corpus_is_finished_only_with_its_whole_list_of_rejections(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch, capsys
):
    """The disk has room for the last shard, but not for the last entries of the list."""
    write = rejections.RejectionLog._write

    def full(self):
        if self.path.exists():
            self._warned = True
        else:
            write(self)

    arguments = ["prepare", str(mixed), str(tmp_path / "out"), *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(rejections.RejectionLog, "_write", full)
        assert cli.run(arguments) == 1
    assert "the disk is full; finished files are whole" in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.json").exists()
    assert cli.run(arguments) == 0
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


def test_an_unforeseen_error_costs_its_recording_only(tmp_path, monkeypatch, prepared_folder):
    digest = cutting.content_digest

    def wrong(samples):
        if not len(samples) % 8001:
            raise ZeroDivisionError("no such length")
        return digest(samples)

    monkeypatch.setattr(cutting, "content_digest", wrong)
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", scene((16_000, 16_002, 17_000)[number], number), 16_000)
    (tmp_path / "list.txt").write_text("0.wav\n1.wav\n2.wav\n")
    prepare(str(tmp_path / "list.txt"), tmp_path / "out", num_workers=1)
    found = prepared_folder(tmp_path / "out")
    assert [Path(entry["path"]).name for entry in found.json.values()] == ["0.wav", "2.wav"]
    ((name, reason),) = found.rejected
    assert name == "1.wav"
    assert reason.startswith("cannot be used (ZeroDivisionError: no such length")


def test_only_one_run_writes_to_a_folder(mixed, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "_pack", lambda *_: time.sleep(60))
        process = start(str(mixed), output, num_workers=0, **SECOND)
    while not (output / ".lock").exists() or not (output / ".lock").read_text():
        time.sleep(0.01)
    assert cli.run(["prepare", str(mixed), str(output)]) == 2
    sentence = f"another process is writing to it (pid {process.pid}); wait or name another folder"
    assert sentence in capsys.readouterr().err
    process.kill()
    process.join()
    prepare(str(mixed), output, num_workers=0, **SECOND)
    assert not (output / ".lock").exists()


def stopped_after(monkeypatch, shards: int, *arguments, **settings) -> None:
    """A prepare that is interrupted right after it finished that many shards."""
    close = run.Packing._close

    def stopped(self):
        close(self)
        if self.shards == shards:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.Packing, "_close", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(*arguments, **settings)


def test_a_shard_is_closed_before_its_ledger_grows_too_long(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch
):
    """Many tiny clips, or many drops: the index could not be read again beyond some 100 MB."""
    monkeypatch.setattr(run, "_LEDGER_BYTES", 300)
    settings = {"num_workers": 0, "segment_seconds": 1.0}
    prepare(str(mixed), tmp_path / "whole", **settings)
    whole = prepared_folder(tmp_path / "whole")
    assert whole.audio == prepared_mixed.audio
    assert whole.rejected == prepared_mixed.rejected
    assert len(whole.tars) > 4
    sizes = [len(read_index(index_path(tar)).extra[LEDGER]) for tar in whole.tars]
    assert max(sizes) < min(sizes) + 1500
    check_prepared(tmp_path / "whole", 0)
    for shards in (1, 4):
        stopped_after(monkeypatch, shards, str(mixed), tmp_path / "out", **settings)
    prepare(str(mixed), tmp_path / "out", **settings)
    assert prepared_folder(tmp_path / "out").contents == whole.contents


def test_resuming_takes_little_memory_per_clip(tmp_path):
    """Ledgers are read one by one, and only a hash of each clip and each drop stays in memory."""
    options = Options(16_000, "wav", 30.0, 0.5, 500.0)
    shards, clips = 8, 1500
    for number in range(shards):
        ledger = Ledger({"source": "many"}, BandSums(options.num_mel_bands), ((number + 1) * clips, 0), clips)
        for recording in range(number * clips, (number + 1) * clips):
            digest = hashlib.blake2b(str(recording).encode(), digest_size=16).digest()
            ledger.members.append(Member(recording, 0, digest, digest[:8]))
            ledger.rejected.append((f"/a/long/folder/of/recordings/{recording:012d}.wav", "is silent all the way."))
        shard_path(tmp_path, number).touch()
        write_index(IndexRows().index(Stamp(0, 0), ledger.to_extra()), index_path(shard_path(tmp_path, number)))
    soundfile.write(tmp_path / "one.wav", scene(16_000, 1), 16_000)
    job = run.PrepareJob(str(tmp_path / "one.wav"), options)
    tracemalloc.start()
    with run.Packing(tmp_path, job, shards) as resumed:
        kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert resumed.totals.clips == shards * clips
    assert resumed.position == (shards * clips, 0)
    assert kept < 350 * shards * clips  # bytes; a clip and a drop each
    assert most - kept < 1600 * clips  # a single ledger at a time
    assert len((tmp_path / "rejected.csv").read_text().splitlines()) == 1 + shards * clips


@pytest.mark.slow
def test_an_index_with_a_ledger_of_a_million_entries_is_read(tmp_path):
    index = IndexRows().index(Stamp(1, 2), {LEDGER: "entry" * 16_000_000})
    write_index(index, tmp_path / "i.parquet")
    assert read_index(tmp_path / "i.parquet").extra == index.extra


def test_a_long_recording_is_continued_in_its_middle(tmp_path, prepared_folder, monkeypatch):
    """A shard ends in the middle of a span, and at the end of one."""
    rate = 1000
    soundfile.write(tmp_path / "long.wav", scene(1250 * rate, 1), rate)
    settings = {"sampling_rate": rate, "segment_seconds": 50.0, "shard_size": 0.25, "num_workers": 0}
    prepare(str(tmp_path / "long.wav"), tmp_path / "whole", **settings)
    whole = prepared_folder(tmp_path / "whole")
    assert len(whole.tars) == 9  # of three clips; six clips are a span
    for shards in (1, 2, 5):
        stopped_after(monkeypatch, shards, str(tmp_path / "long.wav"), tmp_path / "out", **settings)
    prepare(str(tmp_path / "long.wav"), tmp_path / "out", **settings)
    assert prepared_folder(tmp_path / "out").contents == whole.contents
