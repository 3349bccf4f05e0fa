"""One pass over a corpus: spans in order, shares that cover everything once, parts that survive, workers that end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestrq2.data.corpus_pass import Workers, choose_workers, make_parts, this_process
from bestrq2.data.parts import CorpusJob, Part, PartsFolder, Process, part_of
from bestrq2.data.sources import ArraySource
from bestrq2.data.spans import Span, SpanStream, Stretch, Task, sample_reader
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from example_sounds import RATE, scene

SPANS = [1, 3, 1, 1, 5, 2, 1]


def read(task: Task) -> Span:
    """Spans of made-up recordings, of which some take longer than others."""
    time.sleep(0.002 * (task.recording % 3))
    content = np.full(4, 10 * task.recording + task.number)
    return Span(task.recording, task.number, str(task.recording), content, 600.0, SPANS[task.recording])


class Numbers(CorpusJob):
    """Rows with the number in each span."""

    identity = {"what": "numbers"}  # noqa: RUF012
    block = 3

    def __init__(self) -> None:
        self.read = read

    def __len__(self) -> int:
        return len(SPANS)

    def describe(self, recording: int) -> str:
        return f"recording {recording}"

    def part(self, spans: list[Span]) -> Part:
        return part_of(spans, pa.table({"number": [int(span.content[0]) for span in spans]}), [])


EVERYTHING = [10 * recording + number for recording, spans in enumerate(SPANS) for number in range(spans)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ahead", [1, 1 << 20])
def test_spans_come_in_order_whatever_the_workers_and_the_memory(monkeypatch, workers, ahead):
    monkeypatch.setattr("bestrq2.data.spans._AHEAD_BYTES", ahead)
    with SpanStream(read, [Stretch((0, 0), 4), Stretch((4, 2), 7)], workers) as stream:
        found = [int(span.content[0]) for span in stream]
    assert found == [number for number in EVERYTHING if number not in (40, 41)]


def test_parts_end_with_their_block_or_after_half_an_hour(tmp_path):
    parts = list(make_parts(Numbers(), [Stretch((0, 0), 7)], Workers(2), label="test", unit="recordings"))
    # Spans last ten minutes.
    expected = [
        ((0, 0), (1, 2)),
        ((1, 2), (3, 0)),
        ((3, 0), (4, 2)),
        ((4, 2), (5, 0)),
        ((5, 0), (6, 0)),
        ((6, 0), (7, 0)),
    ]
    assert [(part.start, part.stop) for part in parts] == expected
    assert sum(part.recordings for part in parts) == pytest.approx(7)


def test_a_job_killed_after_any_part_continues_there(tmp_path):
    job, blocks = Numbers(), lambda: Numbers().blocks(Process())
    for stop in range(7):
        folder = PartsFolder(tmp_path / str(stop))
        with folder.held(0):
            for turn in range(2):
                stretches = folder.missing(blocks())
                for number, part in enumerate(make_parts(job, stretches, Workers(), label="test", unit="files")):
                    if turn == 0 and number == stop:
                        break
                    folder.write(part, job.identity)
            assert folder.missing(blocks()) == []
            rows = [number for part in folder.read_all(blocks()) for number in part.rows["number"].to_pylist()]
        assert rows == EVERYTHING


def test_a_lost_or_damaged_part_is_noticed(tmp_path):
    job, folder = Numbers(), PartsFolder(tmp_path / "parts")
    with folder.held(0):
        for part in make_parts(job, folder.missing(job.blocks(Process())), Workers(), label="test", unit="files"):
            folder.write(part, job.identity)
        files = sorted(folder.path.glob("part*"))
        files[3].write_bytes(files[3].read_bytes()[:100])
        with pytest.raises(DataError, match="is damaged; delete it and run the same command again"):
            list(folder.read_all(job.blocks(Process())))
        files[3].unlink()
        assert folder.missing(job.blocks(Process())) == [Stretch((4, 2), 6)]
        with pytest.raises(ConfigError, match=r"holds parts of another .*\(different: what\)"):
            folder.check({"what": "letters"})


@given(st.integers(0, 400), st.integers(1, 5), st.lists(st.tuples(st.integers(0, 400), st.integers(1, 90)), max_size=8))
def test_shares_cover_what_is_missing_once(count, world_size, lengths):
    """Finished parts count as far as they follow the start of their block without a gap."""
    job = Numbers()
    job.block = 64
    type(job).__len__ = lambda _: count
    finished = {(start, 0): (min(start + length, count, start // 64 * 64 + 64), 0) for start, length in lengths}
    finished = {start: stop for start, stop in finished.items() if start < stop}
    folder = PartsFolder(Path("/absent"))
    folder.finished = lambda: finished
    missing = set()
    for start in range(0, count, 64):
        position = start
        while (position, 0) in finished and position < start + 64:
            position = finished[position, 0][0]
        missing |= set(range(position, min(start + 64, count)))
    found = []
    for rank in range(world_size):
        for (first, span), stop in folder.missing(job.blocks(Process(rank, world_size))):
            assert span == 0
            assert first // 64 == (stop - 1) // 64
            assert first // 64 % world_size == rank
            found += range(first, stop)
    type(job).__len__ = lambda _: len(SPANS)
    assert sorted(found) == sorted(missing)


def test_samples_of_a_long_recording_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr("bestrq2.data.spans.SPAN_SECONDS", 1.0)
    waveform = scene(int(3.5 * RATE))
    source = ArraySource([waveform, waveform[:0].reshape(1, 0)], RATE)
    with SpanStream(sample_reader(source, RATE), [Stretch((0, 0), 2)], 0) as stream:
        spans = list(stream)
    assert [(span.recording, span.number, span.spans) for span in spans[:4]] == [(0, number, 4) for number in range(4)]
    assert np.array_equal(np.concatenate([span.content for span in spans[:4]]), waveform)
    assert sum(span.seconds for span in spans) == 3.5
    assert "is empty" in spans[4].problem


def test_a_worker_that_dies_is_one_sentence_that_names_the_recording():
    def dying(task: Task) -> Span:
        if task.recording == 3:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return read(task)

    message = r"a worker process died \(SIGKILL\) while it read recording 3; if memory ran out use fewer"
    stream = SpanStream(dying, [Stretch((0, 0), 7)], 2, "recording {}".format)
    with pytest.raises(BestRQ2Error, match=message) as caught, stream:
        list(stream)
    assert type(caught.value) is BestRQ2Error  # exit code 1


def test_workers_leave_signals_of_a_scheduler_to_the_main_process():
    """A scheduler sends them to all processes of a job."""

    def signalled(task: Task) -> Span:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(task)

    with SpanStream(signalled, [Stretch((0, 0), 7)], 2) as stream:
        assert len(list(stream)) == sum(SPANS)


def test_an_error_of_the_source_as_a_whole_ends_the_pass():
    def gone(task: Task) -> Span:
        raise DataError("the file of all recordings cannot be opened.")

    for workers in (0, 1):
        stream = SpanStream(gone, [Stretch((0, 0), 7)], workers)
        with pytest.raises(DataError, match="the file of all recordings cannot be opened"), stream:
            list(stream)


def test_workers_end_with_a_killed_main_process(start_python):
    """They are asleep in a task and cannot notice it themselves."""
    code = (
        "import os, time\n"
        "from bestrq2.data.spans import SpanStream, Stretch\n"
        "def sleep(task):\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    time.sleep(60)\n"
        "with SpanStream(sleep, [Stretch((0, 0), 9)], 2) as stream:\n"
        "    list(stream)\n"
    )
    child = start_python(["-c", code])
    child.wait_until(lambda: child.stdout.count("\n") >= 2)
    workers = [int(line) for line in child.stdout.split()]
    child.send_signal(signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.02)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_numbers_of_workers_and_ranks_that_make_no_sense_are_refused(monkeypatch):
    assert choose_workers(None, most=1).num_workers == 1
    with pytest.raises(ConfigError, match="num_workers is -1; it must be 0 or more"):
        choose_workers(-1)
    with pytest.raises(ConfigError, match="ray_actors is 2; it must be 1 or more, and requires --ray"):
        choose_workers(1, None, 2)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"RANK=2 WORLD_SIZE=2: expected numbers, RANK < WORLD_SIZE"):
        this_process()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="start one process, without torchrun"):
        choose_workers(1, "local")
    assert choose_workers(1).process == Process(1, 2)


def test_closing_a_pass_ends_its_workers():
    before = set(multiprocessing.active_children())
    made = make_parts(Numbers(), [Stretch((0, 0), 7)], Workers(2), label="test", unit="recordings")
    next(made)
    assert len(set(multiprocessing.active_children()) - before) == 2
    made.close()
    assert set(multiprocessing.active_children()) <= before
