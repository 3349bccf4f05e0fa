"""Parts made by actors of a local Ray instance: the same bytes as without, also when an actor is killed."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

import bestrq2
from bestrq2.commands.prepare import prepare
from bestrq2.data.corpus_pass import PartActor, unpacked
from bestrq2.data.parts import Part, PartsFolder
from bestrq2.data.prepare.check import check_prepared
from bestrq2.data.prepare.cutting import Options
from bestrq2.data.prepare.run import PrepareJob
from bestrq2.errors import ConfigError, DataError
from example_sounds import RATE, scene

OPTIONS = Options(RATE, "wav", 1.0, 0.5, 0.15)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Sixteen recordings, one of which is broken, in blocks of two."""
    monkeypatch.setattr("bestrq2.data.parts.BLOCK", 2)
    (tmp_path / "in").mkdir()
    for number in range(15):
        soundfile.write(tmp_path / "in" / f"{number:02d}.wav", scene(20_000 + 900 * number, number), RATE)
    (tmp_path / "in" / "aaa.wav").write_bytes(b"this is no audio" * 100)
    return tmp_path / "in"


def answers(actor: PartActor, *stretches: tuple[int, int, int]) -> list[Part]:
    table = pa.Table.from_pylist([dict(zip(("recording", "span", "stop"), one, strict=True)) for one in stretches])
    return [unpacked(row) for answer in actor(table) for row in answer.to_pylist()]


def test_an_actor_makes_the_parts_of_its_stretch(folder):
    job = PrepareJob(str(folder), OPTIONS)
    parts = answers(PartActor(partial(PrepareJob, str(folder), OPTIONS), job.identity), (12, 0, 14), (14, 0, 16))
    assert [(part.start, part.stop, part.recordings) for part in parts] == [
        ((12, 0), (14, 0), 2.0),
        ((14, 0), (16, 0), 2.0),
    ]
    assert parts[1].rows["kind"].to_pylist() == ["clip", "clip", "remainder", "broken"]
    assert set(parts[1].rows["path"].to_pylist()) == {f"{folder}/14.wav", f"{folder}/aaa.wav"}


def test_errors_of_an_actor_are_one_sentence(folder, tmp_path):
    actor = PartActor(partial(PrepareJob, str(folder), OPTIONS), {"made_from": "something else"})
    with pytest.raises(DataError, match=r"not the same on all machines of the cluster \(different: made_from\)"):
        answers(actor, (0, 0, 2))
    with pytest.raises(DataError, match="absent does not exist"):
        answers(PartActor(partial(PrepareJob, str(tmp_path / "absent"), OPTIONS), {}), (0, 0, 2))


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray: pip install 'bestrq2\[ray\]'"):
        prepare(str(folder), tmp_path / "out", ray="local")
    assert list((tmp_path / "out").iterdir()) == []


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
    """Actors of this test's Ray instance."""
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
def test_an_actor_killed_during_the_run_loses_nothing(ray, tiny_encoder, folder, tmp_path, monkeypatch):
    tiny_encoder(max_seconds=2.5).save_pretrained(tmp_path / "model")
    embed = partial(bestrq2.embed, tmp_path / "model", str(folder), device="cpu")
    whole = embed(output=tmp_path / "whole.parquet")
    killed, left = [], []
    original = PartsFolder.write

    def killing(self, part, identity):
        original(self, part, identity)
        if not killed:
            victim = actor_pids()[0]
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
            left.append(8 - len(self.finished()))

    monkeypatch.setattr(PartsFolder, "write", killing)
    output = embed(output=tmp_path / "e.parquet", ray="local", ray_actors=1)
    assert len(killed) == 1
    assert left[0] > 2  # there was work left to lose
    assert output.read_bytes() == whole.read_bytes()
    listing = [path.with_name(f"{path.name}.rejected.csv").read_text() for path in (output, whole)]
    assert listing[0] == listing[1]


@pytest.mark.slow
def test_a_corpus_is_prepared_and_checked_on_ray(ray, folder, tmp_path):
    settings = {"segment_seconds": 1.0, "shard_size": 0.15}
    whole = prepare(str(folder), tmp_path / "whole", num_workers=1, **settings)
    found = prepare(str(folder), tmp_path / "out", ray="local", ray_actors=2, **settings)
    assert found == whole
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        if not name.endswith(".index.parquet"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert check_prepared(tmp_path / "out", ray="local", ray_actors=2) == whole
    assert np.isfinite(found["log_mel"]["mean_db"]).all()
