"""Pretraining on remote tars: a shard that cannot be fetched stops the run, which can be resumed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import soundfile
from small_run import RATE, recording, small_pretrain

from bestrq2.cli import run
from bestrq2.data.shards import files, remote
from bestrq2.errors import BestRQ2Error
from shard_server import serving

TRAINER = {"max_steps": 4, "checkpoint_every_n_steps": 1, "val_every_n_steps": 2, "report": True}


def tars() -> dict[str, bytes]:
    """Five tars of four recordings."""
    found = {}
    for shard in range(5):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for number in range(10 * shard, 10 * shard + 4):
                file = io.BytesIO()
                soundfile.write(file, recording(number, 1 + number % 3), RATE, format="FLAC")
                info = tarfile.TarInfo(f"{number}.flac")
                info.size = len(file.getvalue())
                tar.addfile(info, io.BytesIO(file.getvalue()))
        found[f"{shard}.tar"] = content.getvalue()
    return found


def test_a_run_stopped_by_an_unreachable_shard_resumes_to_identical_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", (0.0,))
    with serving(tars()) as server:
        data = f"{server.url}/{{0..4}}.tar"
        whole = small_pretrain(data, tmp_path / "whole", trainer=TRAINER)
        for number in (1, 2, 3):
            remote.cached_path(f"{server.url}/{number}.tar").unlink()
            server.answers[f"{number}.tar"] = [500] * 99
        files.OPEN_CACHED.files.clear()
        with pytest.raises(BestRQ2Error, match=r"^http.*tar cannot be fetched: 500 Internal Server Error\.$"):
            small_pretrain(data, tmp_path / "run", trainer=TRAINER)
        server.answers.clear()
        resumed = small_pretrain(data, tmp_path / "run", trainer=TRAINER, resume=True)
    for folder in (whole, resumed):
        assert (folder / "report.html").exists()
    weights = "model/model.safetensors"
    assert (whole / weights).read_bytes() == (resumed / weights).read_bytes()


def test_an_unreachable_url_is_wrong_input_and_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    with serving({}) as server:
        arguments = ["--recipe", "demo", "--data", f"{server.url}/gone.tar", "--output", str(tmp_path / "run")]
        assert run(["pretrain", *arguments]) == 2
        assert f"bestrq2 pretrain: {server.url}/gone.tar cannot be fetched: 404 Not Found." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
