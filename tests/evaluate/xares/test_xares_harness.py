"""The real harness of X-ARES on small tasks: scores, bad input, and what a second call takes over."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from adam_probe import adam_probe_predict, fit_adam_probe
from sklearn.metrics import average_precision_score
from xares_toy_tasks import write_tars, write_task

import bestrq2
from bestrq2 import Embedder, cli, soundworld
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.evaluate.result import Result, check_complete
from bestrq2.evaluate.task_probe import event_present
from bestrq2.evaluate.xares import run as module
from bestrq2.evaluate.xares.encoder import digest
from bestrq2.evaluate.xares.results import read_xares_result
from bestrq2.evaluate.xares.run import run_xares
from bestrq2.evaluate.xares.workers import WorkerPool
from bestrq2.soundworld import export

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("xares") is None, reason="the extra xares is not installed"),
    pytest.mark.slow,
]

EVENT, PRESENCE = "environment/event", "environment/presence"


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_encoder) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_encoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processes():
    """Two processes of the harness for all tests: starting one takes longer than what it does here."""
    with WorkerPool(2, [{"CUDA_VISIBLE_DEVICES": ""}]) as pool:
        yield pool


@pytest.fixture(autouse=True)
def shared_processes(processes, monkeypatch):
    monkeypatch.setattr(module, "WorkerPool", lambda *_: contextlib.nullcontext(processes))


@pytest.fixture
def run(tmp_path, model):
    """Runs the toy tasks in tmp_path/data."""

    def call(**options) -> Result:
        given = {"model": model, "data": tmp_path / "data", "cache": tmp_path / "cache", "device": "cpu"} | options
        return run_xares(**given)

    return call


def scores_of(result: Result) -> dict[tuple[str, str], float]:
    return {(score.task, score.method): score.score for score in result.scores}


def kept_files(tmp_path: Path, task: str, name: str) -> list[Path]:
    return sorted((tmp_path / "cache" / "xares" / "models").glob(f"*/{task}-*/{name}"))


@pytest.fixture(scope="module")
def spectral() -> Embedder:
    """Strips of the normalised spectrogram, mixed at random: what a linear layer reads sounds from."""
    torch.manual_seed(0)
    config = bestrq2.BestRQ2Config(
        max_seconds=5.0, patch_size=[128, 4], input_normalization="clip", hidden_size=256, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, drop_path_rate=0.0,
    )  # fmt: skip
    model = bestrq2.BestRQ2Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "blocks" in name and parameter.ndim == 2:
                parameter.zero_()
        model.patch_embedding.weight.normal_(0, 1 / 16)
    return Embedder(model, "cpu", name="spectral")


def write_soundworld(folder: Path, name: str, clips: int, monkeypatch) -> Path:
    monkeypatch.setattr(export, "TASKS", {name: soundworld.TASKS[name]})
    soundworld.write_corpus(folder, clips, format="xares", progress=False)
    return folder / "tasks" / f"soundworld_{name.replace('/', '_')}_task.py"


def read_tar(path: Path) -> tuple[list[np.ndarray], list[dict]]:
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    waves = [soundfile.read(io.BytesIO(files[name]), dtype="float32")[0] for name in files if name.endswith(".wav")]
    return waves, [json.loads(files[name]) for name in files if name.endswith(".json")]


def harness_neighbours(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The k-NN of xares 0.1.3, which scales the training rows per column and not each to length 1."""
    columns = train / np.linalg.norm(train, axis=0)
    similar = (test / np.linalg.norm(test, axis=1, keepdims=True)) @ columns.T
    nearest = np.argsort(-similar, axis=1)[:, :10]
    votes = np.exp(np.take_along_axis(similar, nearest, axis=1) / 0.07)
    return np.array([np.bincount(labels[at], votes[row]).argmax() for row, at in enumerate(nearest)])


def test_the_harness_scores_soundworld_as_the_projects_own_probes_do(tmp_path, spectral, monkeypatch):
    data = tmp_path / "data"
    event = write_soundworld(tmp_path / "event", EVENT, 400, monkeypatch)
    presence = write_soundworld(tmp_path / "presence", PRESENCE, 80, monkeypatch)
    (data / "env").mkdir(parents=True)
    for corpus in ("event", "presence"):
        for folder in (tmp_path / corpus / "env").iterdir():
            folder.rename(data / "env" / folder.name)
    # On the smaller split, in one batch: the harness draws the order of batches from the time.
    swapped = event.read_text().replace('"test"', '"rest"').replace('"train"', '"test"').replace('"rest"', '"train"')
    event.write_text(
        swapped.replace("epochs=100", "epochs=30, learning_rate=3e-2, batch_size_train=100, valid_every=30")
    )
    presence.write_text(presence.read_text().replace("epochs=100", "epochs=40, learning_rate=1e-2, valid_every=40"))
    for file in (event, presence):
        file.write_text(
            file.read_text().replace("        valid_every=100,  # the last epoch counts, so that none is chosen\n", "")
        )
    spectral.model.save_pretrained(tmp_path / "model")
    result = run_xares(
        tmp_path / "model", data, [str(event), str(presence)], phases=3, cache=tmp_path / "cache", device="cpu"
    )
    assert not result.failures
    found = scores_of(result)

    halves = [read_tar(data / "env" / "environment-event" / f"{split}-000000.tar") for split in ("test", "train")]
    features = [spectral.embed(waves, 16_000).clip for waves, _ in halves]
    labels = [np.array([label["label_index"] for label in half]) for _, half in halves]
    neighbours = harness_neighbours(features[0], labels[0], features[1])
    assert found["environment-event", "knn"] == pytest.approx((neighbours == labels[1]).mean(), abs=1e-6)
    own = [
        adam_probe_predict(features[0], labels[0], features[1], epochs=30, lr=3e-2, batch=100, seed=seed)
        for seed in range(4)
    ]
    assert found["environment-event", "mlp"] > 0.25, "chance is 0.06"
    assert found["environment-event", "mlp"] == pytest.approx((np.stack(own) == labels[1]).mean(), abs=0.02)

    rows, truth, clips = [], [], []
    for split in ("train", "test"):
        waves, half = read_tar(data / "env" / "environment-presence" / f"{split}-000000.tar")
        frames = spectral.embed(waves, 16_000, phases=3)
        rows.append(frames.frames[frames.frame_mask])
        events = [np.array([[one["onset"], one["offset"]] for one in label["events"]]) for label in half]
        truth.append(np.concatenate([event_present(*pair) for pair in zip(frames.timestamps, events, strict=True)]))
        clips.append(np.repeat(np.arange(len(waves)), frames.frame_mask.sum(axis=1)))
    probe = fit_adam_probe(rows[0], truth[0], 2, groups=clips[0], epochs=40, batch=32, lr=1e-2, seed=42)
    with torch.inference_mode():
        logits = probe(torch.from_numpy(rows[1].astype(np.float64))).numpy()
    expected = average_precision_score(truth[1], logits[:, 1] - logits[:, 0])
    assert found["environment-presence", "mlp"] > truth[1].mean() + 0.1, "chance is the share of frames with a call"
    assert found["environment-presence", "mlp"] == pytest.approx(expected, abs=0.02)
    assert result.provenance["tasks"]["environment-presence"]["hop_ms"] == pytest.approx(156.25 / 3)


def test_bad_tasks_are_listed_with_a_sentence_and_the_others_are_scored(tmp_path, run, capsys):
    data = tmp_path / "data"
    for name in ("good", "half", "split", "label", "dies", "silent"):
        write_task(data, name)
        write_tars(data, name)
    write_task(data, "missing")
    write_task(data, "broken", before="undefined_name")
    (data / "tasks" / "syntax_task.py").write_text("def syntax_config(encoder:\n")
    write_task(data, "label", label='sample["labels"]')
    write_task(data, "dies", label="__import__('os').kill(__import__('os').getpid(), 9)")
    os.truncate(data / "env" / "half" / "train-000000.tar", 20_480)
    (data / "env" / "split" / "test-000000.tar").unlink()
    for tar in (data / "env" / "silent").glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"RIFF", b"JUNK"))
    result = run(output=tmp_path / "result.json", jobs=2)
    failures = dict(result.failures)
    assert set(scores_of(result)) == {("good", "mlp"), ("good", "knn")}
    assert "there is no such folder; it should hold train*.tar, test*.tar" in failures.pop("missing")
    assert "train-000000.tar: the tar is truncated" in failures.pop("half")
    assert "no tar of the split 'test': it should be called test*.tar, there are train-000000" in failures.pop("split")
    error = "line 6: the task file has an error (NameError: name 'undefined_name' is not defined)"
    assert failures.pop("broken").endswith(error)
    assert "syntax_task.py, line 1: the task file has an error (SyntaxError" in failures.pop("syntax")
    assert failures.pop("label").startswith("KeyError: 'labels' (in full in ")
    assert "its process was ended by signal 9; memory may have run out: use fewer --jobs" in failures.pop("dies")
    assert "none of its 28 clips could be decoded" in failures.pop("silent")
    assert not failures
    assert read_xares_result(tmp_path / "result.json").scores == result.scores
    assert "mlp,accuracy" in (tmp_path / "result.csv").read_text()
    with pytest.raises(BestRQ2Error, match="8 of 9 tasks without a score: "):
        check_complete(result)

    # a call after one was repaired does that one alone
    (kept,) = kept_files(tmp_path, "good", "scores.json")
    before = kept.stat().st_mtime_ns
    write_tars(data, "split", ["test"], seed=3)
    again = run(tasks="good,split")
    assert {task for task, _ in scores_of(again)} == {"good", "split"}
    assert kept.stat().st_mtime_ns == before
    assert scores_of(again)["good", "mlp"] == scores_of(result)["good", "mlp"]


def test_an_encoder_that_gives_nan_is_named_and_leaves_no_score(tmp_path, tiny_encoder, capsys):
    write_task(tmp_path / "data", "toy")
    write_tars(tmp_path / "data", "toy")
    model = tiny_encoder()
    next(model.encoder.parameters()).data.fill_(3e38)  # finite, but activations overflow
    model.save_pretrained(tmp_path / "model")
    result = cli.run(
        ["xares", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache")]
    )
    assert result == 2
    said = capsys.readouterr().err
    assert "1 of 1 task without a score: toy; rerun the same command to score only the missing ones" in said
    assert "Traceback" not in said


def test_two_models_never_share_scores_and_damaged_files_are_made_anew(tmp_path, run, tiny_encoder):
    write_task(tmp_path / "data", "toy")
    write_tars(tmp_path / "data", "toy")
    first = run(keep_embeddings=True)
    other = tiny_encoder()
    with torch.no_grad():
        other.patch_embedding.weight.mul_(-1.0)
    other.save_pretrained(tmp_path / "other" / "tiny")
    run(model=tmp_path / "other" / "tiny", keep_embeddings=True)
    folders = [path.parent for path in kept_files(tmp_path, "toy", "scores.json")]
    assert len(folders) == 2
    assert len({path.parent.name for path in kept_files(tmp_path, "toy", "env/toy/embeddings/*/*.tar")}) == 2

    # an interrupted training: embeddings are whole, a checkpoint is there, scores are half written
    (mine,) = (folder for folder in folders if folder.parent.name in {digest(first.provenance["identity"])})
    tars = {path: path.stat().st_mtime_ns for path in mine.glob("env/toy/embeddings/*/*.tar")}
    (mine / "scores.json").write_text('{"facts": {"task_f')
    checkpoint = mine / "env" / "toy" / "checkpoints" / next(iter(tars)).parent.name / "best.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(b"half a checkpoint")
    (checkpoint.parent / "mlp_score.txt").write_text("0.99\n0")
    again = run(keep_embeddings=True)
    assert {path: path.stat().st_mtime_ns for path in tars} == tars, "embeddings are taken over"
    assert scores_of(again)["toy", "knn"] == scores_of(first)["toy", "knn"]
    assert scores_of(again)["toy", "mlp"] != 0.99

    # embeddings of which one byte changed
    (mine / "scores.json").unlink()
    damaged = next(iter(tars))
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    assert scores_of(run())["toy", "knn"] == scores_of(first)["toy", "knn"]
    assert not list(mine.glob("env/toy/embeddings/*/*.tar")), "they go when the scores are there"


def test_an_interrupted_job_keeps_what_is_done_and_leaves_no_process(tmp_path, run, model):
    data = tmp_path / "data"
    for name, epochs in (("a", 1), ("b", 100_000)):
        write_task(data, name, epochs=epochs)
        write_tars(data, name)
    arguments = ["xares", str(model), "--data", str(data), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from bestrq2.cli import main; main()", *arguments], stderr=subprocess.PIPE, text=True
    )
    said = ""
    while "a: MLP" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    children = [child for thread in threads for child in (thread / "children").read_text().split()]
    assert children, "the harness runs in a process of its own"
    process.send_signal(signal.SIGTERM)
    said += process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "1 of 2 tasks are done; rerun the same command for the others" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    (kept,) = kept_files(tmp_path, "a", "scores.json")
    before = kept.stat().st_mtime_ns
    assert {method for _, method in scores_of(run(tasks="a"))} == {"mlp", "knn"}
    assert kept.stat().st_mtime_ns == before


def test_a_run_folder_gathers_the_tasks_of_several_calls(tmp_path, run, model):
    data = tmp_path / "data"
    for name in ("a", "b"):
        write_task(data, name, epochs=1)
        write_tars(data, name)
    file = tmp_path / "xares.json"
    run(tasks="a", output=file)
    run(tasks="b", output=file)
    assert {score.task for score in read_xares_result(file).scores} == {"a", "b"}
    assert set(read_xares_result(file).provenance["tasks"]) == {"a", "b"}
    run(tasks="b", output=file, clip_phases=2)
    assert {score.task for score in read_xares_result(file).scores} == {"b"}, "other options are another identity"


def test_the_list_names_all_tasks_of_the_harness_and_those_with_the_data(tmp_path, capsys):
    write_task(tmp_path / "data", "mine")
    code = cli.run(["xares", "--list", "--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache")])
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[2:]]
    assert {"mine", "esc50", "gtzan_genre", "desed", "maestro", "voxlingua33"} <= set(names)
    assert len(names) == 28


def test_wrong_arguments_are_one_sentence(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="jobs is 0"):
        run(jobs=0)
    with pytest.raises(DataError, match="there is no such folder"):
        run(data=tmp_path / "nowhere")
    assert cli.run(["xares"]) == 2
    assert "name a model to score, or give --list" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match="there is no task 'esc'; did you mean 'esc50'"):
        run(tasks="esc")
