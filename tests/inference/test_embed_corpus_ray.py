"""Embedding a corpus on a local Ray instance: the same bytes as without, also when an actor is killed in mid-run."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

import bestrq2
from bestrq2.data.open_source import open_source
from bestrq2.errors import ConfigError, DataError
from bestrq2.inference.corpus.command import embed_corpus
from bestrq2.inference.corpus.identity import EmbedOptions, identity
from bestrq2.inference.corpus.parts import PartsFolder
from bestrq2.inference.corpus.ray_backend import PartActor, RayJob, _unpacked
from bestrq2.inference.corpus.tasks import Stretch
from bestrq2.inference.corpus.work import Part
from example_sounds import RATE, scene

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'bestrq2[ray]'")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        status = Path(f"/proc/{pid}/stat").read_text()
        pid = int(status.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def actor_pids() -> list[int]:
    """Processes of this test's Ray instance that embed."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"MapWorker" in (folder / "cmdline").read_bytes():
                pid = int(folder.name)
                found += [pid] if os.getpid() in ancestors(pid) else []
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_an_actor_killed_in_mid_run_loses_nothing(ray, model, recordings, rejected, tmp_path, monkeypatch):
    for number in range(12):
        soundfile.write(recordings / f"more{number:02d}.wav", scene(20_000 + 900 * number, number), RATE)
    (recordings / "aaa.wav").write_bytes(b"this is no audio" * 100)
    whole = embed_corpus(str(model), str(recordings), tmp_path / "whole.parquet", device="cpu")
    killed, left = [], []
    original = PartsFolder.write

    def killing(self, part, made_by):
        original(self, part, made_by)
        if not killed:
            victim = actor_pids()[0]
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
            left.append(9 - len(list(self.path.glob("part*"))))

    monkeypatch.setattr(PartsFolder, "write", killing)
    output = embed_corpus(str(model), str(recordings), tmp_path / "e.parquet", device="cpu", ray="local", ray_actors=1)
    assert len(killed) == 1
    assert left[0] > 2  # there was work left to lose
    assert output.read_bytes() == whole.read_bytes()
    assert rejected(output) == rejected(whole)


def job(model: Path, source: Path, **changes: str) -> RayJob:
    options = EmbedOptions()
    made_by = identity(open_source(str(source)), bestrq2.load(model, "cpu"), options) | changes
    return RayJob(str(model), "cpu", str(source), options, made_by)


def answers(job: RayJob, *stretches: Stretch) -> list[Part]:
    """What an actor gives, without Ray."""
    table = pa.Table.from_pylist([one._asdict() for one in stretches])
    return [_unpacked(row) for answer in PartActor(job)(table) for row in answer.to_pylist()]


def test_an_actor_makes_the_parts_of_its_stretch(model, recordings):
    (recordings / "aaa.wav").write_bytes(b"this is no audio" * 100)
    (part,) = answers(job(model, recordings), Stretch(0, 0, 2))
    assert (part.lane, part.start, part.stop) == (0, 0, 2)
    assert part.rejected[0][0] == str(recordings / "aaa.wav")
    assert part.rows["path"].to_pylist() == [str(recordings / "clip0.wav")]
    expected = bestrq2.load(model, "cpu").embed(recordings / "clip0.wav").clip[0]
    np.testing.assert_allclose(part.rows["embedding"].to_pylist()[0], expected, atol=1e-5)


def test_what_goes_wrong_at_an_actor_is_one_sentence(model, recordings, tmp_path):
    other = job(model, recordings, weights_sha256="another")
    with pytest.raises(DataError, match=r"not the same on all machines of the cluster \(different: weights_sha256\)"):
        answers(other, Stretch(0, 0, 2))
    absent = replace(job(model, recordings), source=str(tmp_path / "absent"))
    with pytest.raises(DataError, match="absent does not exist"):
        answers(absent, Stretch(0, 0, 2))


def test_a_missing_package_is_named(model, recordings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray: pip install 'bestrq2\[ray\]'"):
        embed_corpus(str(model), str(recordings), tmp_path / "e.parquet", device="cpu", ray="local")
    assert [path.name for path in tmp_path.iterdir()] == ["recordings"]


def test_ray_and_torchrun_together_are_refused(model, recordings, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start one process, without torchrun"):
        embed_corpus(str(model), str(recordings), tmp_path / "e.parquet", device="cpu", ray="local")
