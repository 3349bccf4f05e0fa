"""`bestrq2 embed MODEL -`: samples from a pipe to frames as JSON lines."""

from __future__ import annotations

import io
import json
import os
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bestrq2
from bestrq2 import cli
from example_sounds import scene


def pcm(samples: int) -> np.ndarray:
    return np.round(32767 * scene(samples)).astype("<i2")


@pytest.fixture
def stream(start_cli, model) -> Any:
    """Starts the command on a pipe; returns the process and the open end of the pipe."""

    def start(**options: Any) -> tuple[Any, Any]:
        read, write = os.pipe()
        child = start_cli(["embed", model, "-", "--rate", "8000", "--device", "cpu"], stdin=read, **options)
        os.close(read)
        return child, open(write, "wb", buffering=0)

    return start


def test_frames_are_written_while_samples_arrive(stream, model):
    samples = pcm(60_001)
    content = samples.tobytes()
    child, pipe = stream()
    with pipe:
        for start in range(0, 80_000, 4_999):  # pieces end within samples
            pipe.write(content[start : min(start + 4_999, 80_000)])
        # Of 5 s, all but the last 2.8 s are final.
        child.wait_until(lambda: child.stdout.count("\n") == 4)
        pipe.write(content[80_000:-1])
    finished = child.finish()
    assert finished.returncode == 0
    assert "reading 16-bit mono samples at 8000 Hz; frames follow 2.77 s behind" in finished.stderr
    assert "ended within a 16-bit sample" in finished.stderr
    lines = list(map(json.loads, finished.stdout.splitlines()))
    whole = bestrq2.load(model, "cpu").embed(samples[:-1], 8_000)
    np.testing.assert_allclose([line["embedding"] for line in lines], whole.frames[0], atol=1e-5)
    np.testing.assert_allclose([line["time"] for line in lines], whole.timestamps[0], atol=1e-6)


def test_a_reader_that_stops_ends_the_command_quietly(stream):
    read, write = os.pipe()
    child, pipe = stream(stdout=write)
    os.close(write)
    os.close(read)
    with pipe:
        pipe.write(pcm(30_000).tobytes())
    finished = child.finish()
    assert finished.returncode == 128 + signal.SIGPIPE
    assert finished.stderr.splitlines()[-1].startswith("reading 16-bit mono samples")


def test_ctrl_c_ends_the_command_after_a_whole_line(stream):
    child, pipe = stream()
    with pipe:
        pipe.write(pcm(30_000).tobytes())
        child.wait_until(lambda: child.stdout.count("\n"))
        child.send_signal(signal.SIGINT)
        finished = child.finish()
    assert finished.returncode == 128 + signal.SIGINT
    assert finished.stderr.splitlines()[-2:] == ["", "bestrq2 embed: interrupted"]
    assert all(len(json.loads(line)["embedding"]) == 32 for line in finished.stdout.splitlines())


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ([], b"", "there is no audio to embed: the stream holds no samples"),
        ([], b"\0", "there is no audio to embed: the stream holds no samples"),
        ([], b"RIFF\0\0\0\0WAVEfmt ", "standard input is an audio file, not samples"),
        ([], None, "there are no samples on standard input"),
        (["--rate", "16"], b"\0\0", "rate must be from 100 to 10000000 Hz, got 16"),
        (["--output", "x.parquet"], b"\0\0", "--output does not go with samples from standard input"),
        (["--pooling", "max"], b"\0\0", "--pooling does not go with samples from standard input"),
        (["--num-workers", "2"], b"\0\0", "--num-workers does not go with samples from standard input"),
        (["--phases", "99"], b"\0\0", "phases must be a whole number from 1 to 16"),
    ],
)
def test_what_cannot_be_streamed_is_refused_in_one_sentence(model, monkeypatch, capsys, flags, content, message):
    file = SimpleNamespace(buffer=io.BytesIO(content or b""), isatty=lambda: content is None)
    monkeypatch.setattr("sys.stdin", file)
    assert cli.run(["embed", str(model), "-", "--device", "cpu", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"bestrq2 embed: {message}" in captured.err


def test_recordings_need_an_output_and_no_rate(model, capsys):
    for flags, message in (([], "--output is missing"), (["--rate", "8000"], "--rate does not go with recordings")):
        assert cli.run(["embed", str(model), "recordings", *flags]) == 2
        assert f"bestrq2 embed: {message}" in capsys.readouterr().err
