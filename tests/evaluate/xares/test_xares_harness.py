"""The real harness of X-ARES on small tasks: scores, bad input, and what a second call takes over."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from xares_toy_tasks import write_tars, write_task

from bestrq2 import cli, soundworld
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.evaluate.provenance import digest
from bestrq2.evaluate.result import Result, check_complete
from bestrq2.evaluate.xares import run as module
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


HARNESS = """
import itertools, runpy, sys, types
from bestrq2._torchaudio import provide_torchaudio
provide_torchaudio()
from webdataset import filters
moments = itertools.count(42)
filters.os = types.SimpleNamespace(getpid=lambda: 0)  # of process and clock webdataset makes the seed of a shuffle
filters.time = types.SimpleNamespace(time=lambda: next(moments))
sys.argv = ["xares.run", "tiny_encoder.py", sys.argv[1], "--max-jobs", "0"]
runpy.run_module("xares.run", run_name="__main__")
"""
ENCODER = """
import bestrq2
from bestrq2.evaluate.xares import encoder

class TinyEncoder(encoder.XaresEncoder):
    def __init__(self):
        super().__init__(bestrq2.load({model!r}, "cpu").model, frame_level={frame_level})
"""


def harness_scores(data: Path, task: Path, model: Path, frame_level: bool, run_python) -> dict[str, float]:
    """Scores of `python -m xares.run ENCODER TASK`."""
    (data / "tiny_encoder.py").write_text(ENCODER.format(model=str(model), frame_level=frame_level))
    for folder in (data / "env").iterdir():
        (folder / ".audio_tar_ready").touch()
    words = ["-c", HARNESS, str(task.relative_to(data))]
    finished = run_python(words, cwd=data, env={"CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert finished.returncode == 0, finished.stderr
    name = next(path.name for path in (data / "env").iterdir() if (path / "checkpoints").is_dir())
    files = (data / "env" / name / "checkpoints").rglob("*_score.txt")
    return {(name, file.stem.split("_")[0]): float(file.read_text().split()[0]) for file in files}


@pytest.mark.parametrize("kind", ["clips", "folds", "frames"])
def test_scores_are_those_of_the_harness(tmp_path, run, model, kind, run_python, monkeypatch):
    data = tmp_path / "data"
    if kind == "frames":
        monkeypatch.setattr(export, "TASKS", {"environment/presence": soundworld.TASKS["environment/presence"]})
        soundworld.write_corpus(data, 52, format="xares", progress=False)
        (task,) = (data / "tasks").glob("*_task.py")
        task.write_text(task.read_text().replace("epochs=", "torch_num_threads=1, epochs="))
    else:
        folds = ["a", "b", "c"] if kind == "folds" else None
        task = write_task(data, "toy", label='sample["coin"]', folds=folds)
        write_tars(data, "toy", [f"wds-audio-fold-{fold}" for fold in folds or ()] or ["train", "test"], clips=40)
    # several batches and large steps, for scores that depend on the order of clips
    task.write_text(re.sub(r"epochs=\d+", "epochs=12, learning_rate=0.03", task.read_text()))
    found = scores_of(run(phases=1))
    assert found == harness_scores(data, task, model, kind == "frames", run_python)
    assert all(0.05 < score < 1 for score in found.values()), "a score that any order of clips gives shows nothing"


@pytest.mark.parametrize(("extraction", "batch"), [("overlap", 16), ("chunks", 8)])
def test_clips_are_embedded_in_the_order_of_their_tars(tmp_path, run, extraction, batch):
    task = write_task(tmp_path / "data", "toy")
    task.write_text(task.read_text().replace("batch_size_encode=4,", ""))
    write_tars(tmp_path / "data", "toy", ["train-2", "train-0", "train-3", "train-1", "test"])
    run(extraction=extraction, keep_embeddings=True)
    (embeddings,) = kept_files(tmp_path, "toy", "env/toy/embeddings/*/wds-encoded-train*.tar")
    with tarfile.open(embeddings) as tar:
        names = [name.split(".")[0] for name in tar.getnames() if name.endswith(".npy")]
    # the harness adds the number of the batch to the name of a clip
    assert names == [f"train-{n // 14}{n % 14:03d}{n // batch}" for n in range(56)]


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
    assert scores_of(again) == scores_of(first)

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
