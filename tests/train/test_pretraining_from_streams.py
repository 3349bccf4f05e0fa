"""A run that reads remote tars learns the same whatever reads them, and resumes as others do."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile
from small_run import RATE, recording, small_pretrain

from bestrq2.cli import run
from bestrq2.train import callbacks

WEIGHTS = "model/model.safetensors"
TRAINER = {"max_steps": 4, "checkpoint_every_n_steps": 2, "val_every_n_steps": 2}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Five tars of three to five recordings, behind a server on this machine."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, size in enumerate((3, 5, 4, 3, 4)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + size):
                file = io.BytesIO()
                soundfile.write(file, recording(number, 1 + number % 3), RATE, format="FLAC")
                info = tarfile.TarInfo(f"{number}.flac")
                info.size = len(file.getvalue())
                tar.addfile(info, io.BytesIO(file.getvalue()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def whole(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pretrain(f"{url}/{{0..4}}.tar", tmp_path_factory.mktemp("streamed") / "run", trainer=TRAINER)


def test_a_streamed_run_leaves_what_others_leave(url: str, whole: Path):
    assert (whole / "report.html").exists()
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["recordings"] is None
    counts = json.loads((whole / "shards.json").read_text())
    sizes = {f"{url}/{shard}.tar": size for shard, size in enumerate((3, 5, 4, 3, 4))}
    assert counts
    assert counts == {url: sizes[url] for url in counts}
    rows = (whole / "metrics.csv").read_text()
    assert "validation/loss" in rows


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_what_is_learned_from_a_stream(url: str, whole: Path, tmp_path: Path, workers: int):
    other = small_pretrain(f"{url}/{{0..4}}.tar", tmp_path / "run", trainer=TRAINER, loader={"num_workers": workers})
    assert (whole / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_a_streamed_run_resumes_to_identical_weights(
    url: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = callbacks.RunKeeper.on_train_batch_end

    def dying(self, trainer, module, outputs, batch, batch_idx):
        original(self, trainer, module, outputs, batch, batch_idx)
        if batch.step == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.RunKeeper, "on_train_batch_end", dying)
        with pytest.raises(RuntimeError, match="killed"):
            small_pretrain(f"{url}/{{0..4}}.tar", tmp_path / "run", trainer=TRAINER)
    resumed = small_pretrain(f"{url}/{{0..4}}.tar", tmp_path / "run", trainer=TRAINER, resume=True)
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()


def test_an_unreachable_url_is_wrong_input_and_leaves_no_run(url: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    gone = f"{url}/gone.tar"
    assert run(["pretrain", "--recipe", "demo", "--data", gone, "--output", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert f"bestrq2 pretrain: {gone} cannot be fetched: 404 File not found." in printed
    assert not (tmp_path / "run").exists()
