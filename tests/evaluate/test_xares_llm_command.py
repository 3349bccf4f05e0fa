"""`bestrq2 xares-llm` around a stand-in of the benchmark's package."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import xares_llm_stand_in as stand_in

from bestrq2 import cli
from bestrq2.errors import BestRQ2Error, ConfigError, DataError
from bestrq2.evaluate.result import XARES_LLM, Result, TaskScore, read_result
from bestrq2.evaluate.xares_llm import run as module
from bestrq2.evaluate.xares_llm import task_files
from bestrq2.evaluate.xares_llm.harness import Harness, run_harness
from bestrq2.evaluate.xares_llm.run import (
    DOMAINS,
    check_encoder,
    mean_over_domains,
    overall_mean,
    result_parts,
    run_xares_llm,
)

TARS = ("ESC-50/train/fold_1.tar.gz", "ESC-50/train/fold_2.tar.gz", "ESC-50/test/fold_3.tar.gz")
GTZAN = "GTZAN/test/fold_1.tar.gz"


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_encoder) -> Path:
    path = tmp_path_factory.mktemp("xares_llm_model") / "model"
    tiny_encoder(max_seconds=2.5).save_pretrained(path)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The stand-in, found by child processes, without what is slow: its check of the encoder, imports, the network."""
    folder = stand_in.install(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.setattr(Harness, "check_versions", lambda harness: harness.folder)
    monkeypatch.setattr(module.package, "own_check", lambda *arguments: "torchaudio 2")
    monkeypatch.setattr(module.package, "LAUNCH", "xares_llm.run")
    monkeypatch.setattr(task_files, "_is_available", lambda model: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return folder


def _said(package: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (package / "said.jsonl").read_text().splitlines()]


def _run(model: Path, tmp_path: Path, **changes: Any) -> Result:
    return run_xares_llm(model, **{"output": tmp_path / "out", "data": tmp_path / "data", **changes})


def _tar(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("clip.json"), io.BytesIO())


def test_a_task_is_trained_and_scored_by_the_packages_own_command(model, package, tmp_path):
    result = _run(model, tmp_path, training={"max_steps": 7}, decoder="some/model")
    (said,) = _said(package)
    assert said["encoder"] == "bestrq2.evaluate.xares_llm.encoder.BestRQ2Encoder"
    assert said["model_args"]["phases"] == 2
    assert (Path(said["model_args"]["folder"]) / "model.safetensors").is_file()
    assert said["train"]["max_steps"] == 7
    assert said["train"]["decoder_model_name"] == "some/model"
    assert said["train"]["train_data"]["ESC-50"]["repo_id"] == "some/where"
    assert said["data"] == str(tmp_path / "data")
    assert {score.task: (score.score, score.weight) for score in result.scores} == {
        "esc-50": (0.55, 1.0),
        "gtzan": (0.5, 3.0),
    }
    assert overall_mean(result) == pytest.approx((0.55 + 3 * 0.5) / 4)
    assert mean_over_domains(result) == pytest.approx((0.55 + 0.5) / 2)
    (path,) = (tmp_path / "out").glob("*/xares-llm-task1.json")
    assert repr(read_result(path, XARES_LLM)) == repr(result)
    assert json.loads(path.read_text())["provenance"]["versions"]["torch"]
    assert len(result.provenance["weights_sha256"]) == 64


def test_what_is_done_is_not_done_again(model, package, tmp_path):
    first = _run(model, tmp_path)
    second = _run(model, tmp_path)
    assert [said["trained"] for said in _said(package)] == [True, False]
    assert second.scores == first.scores


def test_models_and_settings_never_share_scores(model, package, tmp_path, tiny_encoder):
    other = tmp_path / "elsewhere" / "model"
    tiny_encoder(max_seconds=2.5, num_hidden_layers=1).save_pretrained(other)
    _run(model, tmp_path)
    _run(other, tmp_path)
    _run(model, tmp_path, phases=1)
    assert [said["trained"] for said in _said(package)] == [True, True, True]
    assert len({said["train"]["output_dir"] for said in _said(package)}) == 3


def test_a_training_that_was_cut_short_is_not_taken_for_a_finished_one(model, package, tmp_path, monkeypatch):
    monkeypatch.setenv("CUT", "4")
    with pytest.raises(BestRQ2Error, match="CUDA out of memory") as error:
        _run(model, tmp_path)
    assert type(error.value) is BestRQ2Error  # exit code 1: the input was not at fault
    monkeypatch.delenv("CUT")
    result = _run(model, tmp_path)
    assert [said["trained"] for said in _said(package)] == [True, True]
    assert not result.failures


def test_a_dataset_that_fails_takes_no_other_with_it_and_is_all_that_a_rerun_does(
    model, package, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAIL", "eval_esc-50")
    result = _run(model, tmp_path)
    assert [score.task for score in result.scores] == ["gtzan"]
    assert list(result.failures) == ["esc-50"]
    assert "cannot score eval_esc-50" in result.failures["esc-50"]
    assert overall_mean(result) is None
    table = str(result)
    assert "1 of 2 datasets have a score" in table
    assert "overall (weighted mean)" not in table
    monkeypatch.delenv("FAIL")
    again = _run(model, tmp_path)
    assert not again.failures
    assert [said["trained"] for said in _said(package)] == [True, False, False, False]


def test_a_single_dataset_and_files_of_ones_own_are_tasks_too(model, package, tmp_path):
    single = _run(model, tmp_path, task="gtzan")
    assert single.provenance["task"] == "gtzan"
    own, scored = tmp_path / "mine.yaml", tmp_path / "scored.yaml"
    _tar(tmp_path / "mine.tar.gz")
    data = f"{{data: [{tmp_path}/mine.tar.gz], key: label}}"
    own.write_text(f"max_steps: 3\ntrain_data:\n  mine: {data}\n")
    scored.write_text(f"mine: {{data: {data}, metric: Accuracy}}\n")
    result = _run(model, tmp_path, task=str(own), evaluation=str(scored))
    assert [score.task for score in result.scores] == ["mine"]
    with pytest.raises(ConfigError, match="--evaluation"):
        _run(model, tmp_path, task=str(own))


def test_a_changed_task_file_is_trained_and_scored_anew(model, package, tmp_path):
    own, scored = tmp_path / "mine.yaml", tmp_path / "scored.yaml"
    _tar(tmp_path / "mine.tar.gz")
    data = f"{{data: [{tmp_path}/mine.tar.gz], key: label}}"
    scored.write_text(f"mine: {{data: {data}, metric: Accuracy}}\n")
    for steps in (3, 4):
        own.write_text(f"max_steps: {steps}\ntrain_data:\n  mine: {data}\n")
        _run(model, tmp_path, task=str(own), evaluation=str(scored))
    scored.write_text(f"mine: {{data: {data}, metric: iWER}}\n")
    _run(model, tmp_path, task=str(own), evaluation=str(scored))
    assert [said["trained"] for said in _said(package)] == [True, True, False]
    assert [said["scored"] for said in _said(package)] == [["mine"]] * 3


@pytest.mark.slow  # two fresh interpreters
def test_the_packages_own_check_is_run_where_it_is_installed(model, tmp_path, monkeypatch):
    folder = stand_in.install(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.setattr(Harness, "check_versions", lambda harness: harness.folder)
    assert "Passed the check of xares_llm" in check_encoder(model)
    (folder / "audio_encoder_checker.py").write_text("raise ValueError('no good')")
    with pytest.raises(ConfigError, match="no good"):
        check_encoder(model)


def test_transformers_5_is_refused_by_the_check_and_before_a_run(model, tmp_path, monkeypatch, capsys):
    folder = stand_in.install(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    for options in (["--check"], ["--output", str(tmp_path / "out")]):
        assert cli.run(["xares-llm", str(model), *options]) == 2
        said = capsys.readouterr().err
        assert f"only with transformers below 5, but {sys.executable} has 5." in said
        assert "-m pip install 'transformers<5'" in said
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_encoder_is_checked_and_installing_explained(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = ["--output", str(tmp_path / "out")]
    assert cli.run(["xares-llm", str(model), "--check", *output]) == 0
    assert not list(tmp_path.iterdir()), "the check leaves nothing behind"
    said = capsys.readouterr().out
    assert "keeps the contract" in said
    assert "pip install 'transformers<5' 'xares-llm @ git+https://github.com/xiaomi-research/xares-llm'" in said
    assert cli.run(["xares-llm", str(model), *output]) == 2
    assert "git+https://github.com/xiaomi-research/xares-llm" in capsys.readouterr().err


def test_the_command_says_that_scores_are_missing(model, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAIL", "eval_gtzan")
    assert cli.run(["xares-llm", str(model), "--output", str(tmp_path / "out"), "--data", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "esc-50" in said.out
    assert "1 of 2 tasks without a score" in said.err


def test_the_command_prints_the_scores(model, package, tmp_path, capsys):
    paths = ["--output", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
    assert cli.run(["xares-llm", str(model), "--task", "task1", "--training", '{"max_steps": 5}', *paths]) == 0
    said = capsys.readouterr().out
    assert "XARES-LLM, task1: model" in said
    assert "gtzan" in said
    assert "overall (weighted mean)" in said
    assert _said(package)[0]["train"]["max_steps"] == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "taks1"}, "did you mean 'task1'"),
        ({"task": "nowhere.yaml"}, "no such task file"),
        ({"python": "/nowhere/python"}, "/nowhere/python: cannot be run"),
        ({"processes": 0}, "processes"),
    ],
)
def test_wrong_arguments_are_named(model, package, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        _run(model, tmp_path, **changes)
    assert not (package / "said.jsonl").exists()


def test_missing_tars_are_named_before_training_where_nothing_can_be_downloaded(model, package, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in TARS:
        _tar(tmp_path / "data" / name)
    with pytest.raises(DataError, match=r"1 of 4 tars are missing, first .*GTZAN/test/fold_1.tar.gz"):
        _run(model, tmp_path)
    _tar(tmp_path / "data" / GTZAN)
    assert not _run(model, tmp_path).failures


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x1f\x8b\x08broken"])
def test_a_broken_download_is_named(model, package, tmp_path, content):
    path = tmp_path / "data" / GTZAN
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: is not a tar"):
        _run(model, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("train_data: [", "cannot be read as YAML"), ("max_steps: 3", "no train_data"), ("- 1", "holds no tasks")],
)
def test_a_task_file_with_an_error_is_named(model, package, tmp_path, text, said):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(DataError, match=said):
        _run(model, tmp_path, task=str(own), evaluation="task1")


@pytest.mark.parametrize("data", ["'~/mine/part{1..2}.tar'", "['~/mine/*.tar']", "[~/mine/part1.tar, ~/mine/part2.*]"])
def test_tars_by_pattern_in_the_home_folder_or_as_one_string_are_found(tmp_path, monkeypatch, data):
    monkeypatch.setenv("HOME", str(tmp_path))
    for part in (1, 2):
        _tar(tmp_path / "mine" / f"part{part}.tar")
    train, scored = tmp_path / "train.yaml", tmp_path / "scored.yaml"
    train.write_text(f"train_data: {{mine: {{data: {data}}}}}")
    scored.write_text(f"mine: {{data: {{data: {data}}}, metric: Accuracy}}")
    task_files.check_tars(train, scored, tmp_path)
    (tmp_path / "mine" / "part2.tar").write_text("no tar")
    with pytest.raises(DataError, match=r"mine/part2\.tar: is not a tar"):
        task_files.check_tars(train, scored, tmp_path)


@pytest.mark.parametrize("pattern", ["part{1..2}.tar", "*.tar"])
def test_a_local_tar_that_a_task_file_names_has_to_be_there(model, package, tmp_path, pattern):
    own = tmp_path / "own.yaml"
    own.write_text(f"train_data: {{mine: {{data: ['{tmp_path}/{pattern}']}}}}")
    with pytest.raises(DataError, match=r"\.tar: there is no such tar, but mine names it"):
        _run(model, tmp_path, task=str(own), evaluation="task1")


CAPTIONS = {"eval_clotho": {"metric": "FENSE"}, "eval_mecat": {"metric": "DATE"}, "eval_gtzan": {"metric": "Accuracy"}}
CAPTION_MODEL = "sentence-transformers/paraphrase-TinyBERT-L6-v2"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Puts a model into an empty cache of the hub's client, which is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FENSE_DATA", str(tmp_path / "fense"))

    def put(model: str, *names: str) -> None:
        folder = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("1")
        for name in names:
            (folder / "snapshots" / "1").mkdir(parents=True, exist_ok=True)
            (folder / "snapshots" / "1" / name).write_text("{}")

    return put


def test_models_that_are_missing_are_named_with_their_tasks_and_how_to_fetch_them(hub_cache, tmp_path):
    with pytest.raises(ConfigError) as error:
        task_files.check_models(task_files.DECODER, CAPTIONS)
    said = str(error.value)
    assert "HuggingFaceTB/SmolLM2-135M for all tasks (hf download HuggingFaceTB/SmolLM2-135M)" in said
    assert f"{CAPTION_MODEL} for clotho, mecat (hf download {CAPTION_MODEL})" in said
    assert re.search(r"echecker_clotho_audiocaps_base.ckpt for clotho, mecat \(curl -L .* -o .*/fense/echecker", said)
    assert "\n" not in said


def test_models_in_the_cache_pass_and_the_error_checkers_own_model_is_checked_too(hub_cache, tmp_path):
    files = ("config.json", "tokenizer_config.json", "model.safetensors")
    for model in (task_files.DECODER, CAPTION_MODEL):
        hub_cache(model, *files[:2])
        with pytest.raises(ConfigError, match=model):  # without weights
            task_files.check_models(task_files.DECODER, CAPTIONS)
        hub_cache(model, *files)
    task_files.check_models(task_files.DECODER, {"eval_gtzan": {"metric": "Accuracy"}})
    (tmp_path / "fense").mkdir()
    torch.save({"model_type": "some/bert"}, tmp_path / "fense" / "echecker_clotho_audiocaps_base.ckpt")
    with pytest.raises(ConfigError, match=r"beforehand: some/bert for clotho, mecat \(hf download some/bert\)$"):
        task_files.check_models(task_files.DECODER, CAPTIONS)
    hub_cache("some/bert", *files)
    task_files.check_models(task_files.DECODER, CAPTIONS)
    (tmp_path / "fense" / "echecker_clotho_audiocaps_base.ckpt").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"base\.ckpt: cannot be read"):
        task_files.check_models(task_files.DECODER, CAPTIONS)


def test_a_decoder_is_a_folder_with_a_model_or_a_hub_id(hub_cache, tmp_path):
    with pytest.raises(ConfigError, match=r"neither a folder with config\.json and .* nor a hub id"):
        task_files.check_models(str(tmp_path), {})
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    task_files.check_models(str(tmp_path), {})


def test_an_encoder_that_returns_nan_is_refused_before_training(package, tmp_path, tiny_encoder):
    encoder = tiny_encoder(max_seconds=2.5)
    next(encoder.encoder.parameters()).data.fill_(3e38)  # finite, but activations overflow
    encoder.save_pretrained(tmp_path / "broken")
    with pytest.raises(ConfigError, match="NaN"):
        _run(tmp_path / "broken", tmp_path)


def test_an_interruption_ends_the_benchmark_too(tmp_path, monkeypatch):
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            (tmp_path / "pid").write_text(text)
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stderr", Interrupted())
    endless = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        run_harness([sys.executable, "-c", endless], dict(os.environ), tmp_path / "log")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_errors_are_read_without_their_colours(tmp_path):
    code = r"print('\x1b[31m\x1b[1mValueError\x1b[0m: no labels\x1b[0m\n\x1b[36mend\x1b[0m'); raise SystemExit(1)"
    with pytest.raises(BestRQ2Error, match="ended with code 1: ValueError: no labels"):
        run_harness([sys.executable, "-c", code], dict(os.environ), tmp_path / "log")
    assert (tmp_path / "log").read_text() == "ValueError: no labels\nend\n"


@pytest.mark.parametrize("text", ["", "score: much", "score: .nan", "other: 1"])
def test_a_score_that_is_no_number_is_a_failure(model, package, tmp_path, monkeypatch, text):
    _run(model, tmp_path)
    (kept,) = (tmp_path / "out").glob("*/task1/*/score_eval_gtzan.yaml")
    monkeypatch.setattr(module, "run_harness", lambda *arguments: kept.write_text(text))
    result = _run(model, tmp_path)
    assert list(result.failures) == ["gtzan"]
    assert overall_mean(result) is None


def _result(**provenance: Any) -> Result:
    names = [name for domain in DOMAINS.values() for name in domain.split()]
    scores = tuple(TaskScore("mine", name, XARES_LLM, "score", 0.7) for name in names)
    return Result(XARES_LLM, "mine", scores, {}, {"task": "all", "evaluation": "all", "training": {}} | provenance)


def _text(result: Result) -> str:
    return str(dataclasses.replace(result, parts=result_parts))


def test_published_means_stand_beside_those_of_all_tasks():
    table = _text(_result())
    assert re.search(r"overall \(weighted mean\) +0\.700", table)
    assert re.search(r"BEST-RQ-2 +0\.38 +0\.41", table)
    assert re.search(r"BEST-RQ +0\.33 +0\.35", table)
    assert "source: arXiv:2606.30700" in table


def test_published_means_do_not_stand_beside_a_part_or_another_training():
    whole = _result()
    for result in (
        _result(task="task1"),
        _result(evaluation="task1"),
        _result(training={"decoder_model_name": "some/model"}),
        dataclasses.replace(whole, scores=whole.scores[1:]),
        dataclasses.replace(whole, failures={"mine": "broken"}),
    ):
        table = _text(result)
        assert "BEST-RQ" not in table
        assert "Published means are of all 20 datasets" in table
