"""Kills, Ctrl-C, full disks, dying workers: finished shards stay, and the same command ends with the same bytes."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bestrq2 import cli
from bestrq2.data import rejections
from bestrq2.data.band_sums import BandSums
from bestrq2.data.prepare import cutting, packing, run
from bestrq2.data.prepare.check import check_prepared
from bestrq2.data.prepare.folder import shard_path
from bestrq2.data.prepare.ledger import LEDGER, Ledger, Member
from bestrq2.data.prepare.options import Options
from bestrq2.data.prepare.run import prepare
from bestrq2.data.shards import writer
from bestrq2.data.shards.building import IndexRows, build_index, index_path
from bestrq2.data.shards.index import Stamp, read_index, write_index
from bestrq2.data.sources import ArraySource
from bestrq2.errors import BestRQ2Error, DataError
from example_sounds import scene

SECOND = {"segment_seconds": 1.0, "shard_size": 0.15}


def start(*arguments, **options) -> multiprocessing.Process:
    """A prepare in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=partial(prepare, *arguments, **options))
    process.start()
    return process


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(mixed, prepared_mixed, prepared_folder, tmp_path, workers):
    prepare(str(mixed), tmp_path / "out", num_workers=workers, **SECOND)
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


def test_a_prepare_killed_at_any_instant_goes_on_to_the_same_bytes(mixed, prepared_folder, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("after", ["index", "tar"])
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
            patch.setattr(packing.ShardWriter, "close", lambda *arguments: killed(close, *arguments))
        process = start(str(mixed), tmp_path / "out", num_workers=1, **SECOND)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("*.tar"))) == (2 if after == "index" else 3)
    prepare(str(mixed), tmp_path / "out", num_workers=1, **SECOND)
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


def test_ctrl_c_leaves_whole_shards_and_says_how_to_go_on(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch
):
    take, capture = packing.Packing.take, []

    def interrupted(self, span):
        take(self, span)
        if span.task.recording == 4:
            capture.append(self.shards)
            raise KeyboardInterrupt

    monkeypatch.setattr(packing.Packing, "take", interrupted)
    arguments = [str(mixed), str(tmp_path / "out"), "--segment_seconds", "1", "--shard_size", "0.15"]
    assert cli.run(["prepare", *arguments]) == 130
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        name for i in range(capture[0]) for name in (f"shard-{i:06d}.tar", f"shard-{i:06d}.tar.index.parquet")
    ]
    monkeypatch.undo()
    assert cli.run(["prepare", *arguments]) == 0
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


def test_ctrl_c_in_a_terminal_ends_all_processes_with_one_line(tmp_path):
    """The signal reaches the whole group, as a terminal sends it."""
    output = tmp_path / "out"
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "long.flac", np.tile(scene(480_000, 1), 20), 44_100)
    for number in range(400):
        (tmp_path / "in" / f"m{number}.flac").symlink_to("long.flac")
    command = [
        sys.executable,
        "-c",
        "from bestrq2.cli import main; main()",
        "prepare",
        *map(str, (tmp_path / "in", output)),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not list(output.glob(".shard*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    remedy = "run the same command again to continue"
    assert [line for line in err.splitlines() if line and not line.startswith("prepare: ")] == [
        f"bestrq2 prepare: interrupted: 0 finished shards stay in {output}; {remedy}"
    ]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left
    assert [path.name for path in output.iterdir()] in ([], ["rejected.csv"])


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch, capsys
):
    add = writer.ShardWriter.add

    def full(self, key, *arguments):
        if int(key[:8]) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, key, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "add", full)
        arguments = ["prepare", str(mixed), str(tmp_path / "out"), "--segment_seconds", "1", "--shard_size", "0.15"]
        assert cli.run(arguments) == 1
    assert "the disk is full; what was written before is whole" in capsys.readouterr().err
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

    arguments = ["prepare", str(mixed), str(tmp_path / "out"), "--segment_seconds", "1", "--shard_size", "0.15"]
    with monkeypatch.context() as patch:
        patch.setattr(rejections.RejectionLog, "_write", full)
        assert cli.run(arguments) == 1
    assert "the disk is full; what was written before is whole" in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.json").exists()
    assert cli.run(arguments) == 0
    assert prepared_folder(tmp_path / "out").contents == prepared_mixed.contents


def test_a_worker_that_dies_is_one_sentence_that_names_the_recording(mixed, tmp_path, monkeypatch):
    read_span = cutting.read_span

    def killed(decoder, *arguments):
        if decoder.rate == 8000:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return read_span(decoder, *arguments)

    monkeypatch.setattr(cutting, "read_span", killed)
    message = f"a worker process died (SIGKILL) while it read {mixed / 'e-narrow.wav'}; if memory ran out use fewer"
    with pytest.raises(BestRQ2Error, match=re.escape(message)) as caught:
        prepare(str(mixed), tmp_path / "out", num_workers=2, **SECOND)
    assert type(caught.value) is BestRQ2Error  # exit code 1


def test_an_error_nobody_thought_of_costs_its_recording_only(mixed, tmp_path, monkeypatch, prepared_folder):
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
    assert re.fullmatch(
        r"cannot be used \(ZeroDivisionError: no such length, in test_interruption\.py line \d+\)\.", reason
    )


def test_a_source_that_is_gone_ends_the_run_with_its_sentence(mixed, tmp_path, monkeypatch):
    def gone(*_):
        raise DataError("the file of all recordings cannot be opened.")

    monkeypatch.setattr(cutting, "read_span", gone)
    with pytest.raises(DataError, match="the file of all recordings cannot be opened"):
        prepare(str(mixed), tmp_path / "out", num_workers=1, **SECOND)


def test_only_one_run_writes_to_a_folder(mixed, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "_pack", lambda *_: time.sleep(60))
        process = start(str(mixed), output, num_workers=1, **SECOND)
    while not (output / ".lock").exists() or not (output / ".lock").read_text():
        time.sleep(0.01)
    assert cli.run(["prepare", str(mixed), str(output)]) == 2
    sentence = f"another process is writing to it (pid {process.pid}); wait or name another folder"
    assert sentence in capsys.readouterr().err
    process.kill()
    process.join()
    prepare(str(mixed), output, num_workers=1, **SECOND)
    assert not (output / ".lock").exists()


def test_a_shard_is_closed_before_its_ledger_grows_too_long(
    mixed, prepared_mixed, prepared_folder, tmp_path, monkeypatch
):
    """Many tiny clips, or many drops: the index could not be read again beyond some 100 MB."""
    monkeypatch.setattr(packing, "_LEDGER_BYTES", 300)
    prepare(str(mixed), tmp_path / "whole", num_workers=2, segment_seconds=1.0)
    whole = prepared_folder(tmp_path / "whole")
    assert whole.audio == prepared_mixed.audio
    assert whole.rejected == prepared_mixed.rejected
    assert len(whole.tars) > 4
    sizes = [len(read_index(index_path(tar)).extra[LEDGER]) for tar in whole.tars]
    assert max(sizes) < min(sizes) + 1500
    check_prepared(tmp_path / "whole", 1)
    close = packing.Packing._close
    for stop in range(1, len(whole.tars), 2):

        def stopped(self, stop=stop):
            close(self)
            if self.shards == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(packing.Packing, "_close", stopped)
            with pytest.raises(KeyboardInterrupt):
                prepare(str(mixed), tmp_path / "out", num_workers=1, segment_seconds=1.0)
    prepare(str(mixed), tmp_path / "out", num_workers=1, segment_seconds=1.0)
    assert prepared_folder(tmp_path / "out").contents == whole.contents


def test_resuming_takes_little_memory_a_clip(tmp_path):
    """Ledgers are read one by one, and of each clip and each drop no more than a hash stays."""
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
    source = ArraySource([scene(16_000, 1)], 16_000)
    tracemalloc.start()
    with packing.Packing(tmp_path, source, options, {"source": "many"}, shards) as resumed:
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


def test_a_long_recording_is_continued_within(tmp_path, prepared_folder, monkeypatch):
    """A shard ends in the middle of a recording, in the middle of a span, and at the end of one."""
    rate = 1000
    soundfile.write(tmp_path / "long.wav", scene(2500 * rate, 1), rate)
    settings = {"sampling_rate": rate, "segment_seconds": 50.0, "shard_size": 0.45, "num_workers": 2}
    prepare(str(tmp_path / "long.wav"), tmp_path / "whole", **settings)
    whole = prepared_folder(tmp_path / "whole")
    assert len(whole.tars) == 10  # of five clips; twelve clips are a span
    close = packing.Packing._close
    for stop in (1, 3, 8):

        def stopped(self, stop=stop):
            close(self)
            if self.shards == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(packing.Packing, "_close", stopped)
            with pytest.raises(KeyboardInterrupt):
                prepare(str(tmp_path / "long.wav"), tmp_path / "out", **settings)
    prepare(str(tmp_path / "long.wav"), tmp_path / "out", **settings)
    assert prepared_folder(tmp_path / "out").contents == whole.contents
