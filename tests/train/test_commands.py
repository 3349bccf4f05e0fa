"""Every command on good and on bad input: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from small_run import flags, metrics, write_recordings

import bestrq2
from bestrq2 import cli


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command that must fail: one line on stderr that names the command, no stack trace; returns it."""
    assert cli.run(argv) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith(f"bestrq2 {argv[0]}: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err + captured.out
    return lines[0]


def test_pretrain_embed_probe_and_info_work_in_a_row(
    tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    run = tmp_path / "run"
    assert cli.run(["pretrain", "--data", str(recordings), "--output", str(run), *flags(), "--trainer.report"]) == 0
    assert (run / "report.html").is_file()
    printed = capsys.readouterr().out
    assert f"{run}: done. Report: {run / 'report.html'}\nEmbed audio with: bestrq2 embed {run} FOLDER" in printed
    loss = float(metrics(run)[-1]["validation/loss"])
    for line in (
        f"{recordings}: 12 recordings",
        "1 recording held out",
        f"step 6: validation loss {loss:.4f}, accuracy",
    ):
        assert line in caplog.text
    table = tmp_path / "e.parquet"
    assert cli.run(["embed", str(run), str(recordings), "--output", str(table)]) == 0
    rows = pq.read_table(table).to_pydict()
    assert len(rows["path"]) == 12
    place = rows["path"].index(str(recordings / "03.wav"))
    expected = bestrq2.load(run).embed(recordings / "03.wav").clip[0]
    assert np.allclose(rows["embedding"][place], expected, atol=1e-5)
    assert rows["seconds"][place] == pytest.approx(4.0)
    capsys.readouterr()
    assert cli.run(["info", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 steps of 10 s" in printed
    assert "two-step" in printed


def test_probe_prints_the_model_beside_its_baselines(
    tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
):
    labelled = tmp_path / "labelled"
    for label, pitch in (("low", 300.0), ("high", 3000.0)):
        (labelled / label).mkdir(parents=True)
        for number in range(12):
            clip = np.sin(2 * np.pi * pitch * (1 + 0.01 * number) * np.arange(24_000) / 16_000)
            soundfile.write(labelled / label / f"{number}.wav", 0.3 * clip, 16_000)
    output = tmp_path / "scores.json"
    assert cli.run(["probe", str(finished_run), str(labelled), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for word in ("log-mel statistics", "random encoder", "linear probe", "k-NN"):
        assert word in printed
    scores = {(s["features"], s["method"]): s for s in json.loads(output.read_text())["scores"]}
    assert len(scores) == 9
    assert scores["log-mel statistics", "linear"]["score"] == 1.0


def test_soundworld_writes_a_corpus_that_pretrain_and_probe_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BESTRQ2_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus"
    assert cli.run(["soundworld", str(corpus), "--clips", "8"]) == 0
    assert len(list((corpus / "unlabelled").glob("*.wav"))) == 8
    assert cli.run(["pretrain", "--data", str(corpus), "--output", str(tmp_path / "run"), *flags(steps=1)]) == 0


def test_print_config_shows_what_a_recipe_and_flags_come_to(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.run(["pretrain", "--recipe", "best-rq-vit-tiny", "--model.mask_ratio", "[0.7, 0.8]", "--print-config"])
    assert exit.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["objective"] == "one_stage"
    assert shown["model"]["mask_ratio"] == [0.7, 0.8]
    assert shown["loader"]["batch_seconds"] == 320


def test_a_yaml_file_and_flags_together(tmp_path: Path, recordings: Path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"recipe": "demo", "data": str(recordings), "trainer": {"max_steps": 5}}))
    output = tmp_path / "run"
    words = [*flags(steps=1)[2:], "--config", str(file), "--output", str(output), "--trainer.max_steps", "1"]
    assert cli.run(["pretrain", *words]) == 0
    settings = yaml.safe_load((output / "config.yaml").read_text())
    assert (settings["recipe"], settings["trainer"]["max_steps"]) == ("demo", 1)


WRONG_SETTINGS = {
    "unknown recipe": (["--recipe", "best-rq-2-tin"], "did you mean 'best-rq-2-tiny'?"),
    "unknown key": (["--trainer.max_stps", "3"], "did you mean '--trainer.max_steps'?"),
    "batch in clips": (["--loader.batch_size", "32"], "did you mean '--loader.batch_seconds'?"),
    "wrong type": (["--trainer.max_steps", "many"], "trainer.max_steps: expected int above 0, got many"),
    "sample rate 0": (["--model.sampling_rate", "0"], "sampling_rate must be a whole number above 0"),
    "incompatible": (["--model.num_attention_heads", "5"], "must be a multiple of num_attention_heads"),
    "unknown choice": (["--model.objective", "three_step"], "model.objective must be one of two_step, one_stage"),
    "mask ratio": (["--model.mask_ratio", "[0.9, 0.1]"], "mask_ratio must satisfy"),
    "steps": (["--trainer.max_steps", "0"], "trainer.max_steps must be above 0, got 0"),
    "accelerator": (["--trainer.accelerator", "abacus"], "trainer: "),
    "precision": (["--trainer.precision", "7-bit"], "trainer: "),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_named_in_one_sentence(
    case: str, tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture[str]
):
    words, expected = WRONG_SETTINGS[case]
    base = ["pretrain", "--data", str(recordings), "--output", str(tmp_path / "run"), *flags()]
    assert expected in refused(capsys, *base, *words)


def test_missing_and_empty_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = ["--output", str(tmp_path / "run"), *flags()]
    assert "--data is missing" in refused(capsys, "pretrain", *output)
    assert "does not exist" in refused(capsys, "pretrain", "--data", str(tmp_path / "nowhere"), *output)
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(capsys, "pretrain", "--data", str(tmp_path / "empty"), *output)
    assert "--output is missing" in refused(capsys, "pretrain", "--data", str(tmp_path), *flags())
    assert not (tmp_path / "run").exists()


def test_a_folder_of_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "audio").mkdir()
    for name in "abc":
        (tmp_path / "audio" / f"{name}.mp3").write_bytes(os.urandom(2000))
    run = tmp_path / "run"
    line = refused(capsys, "pretrain", "--data", str(tmp_path / "audio"), "--output", str(run), *flags())
    assert "rejected" in line
    assert not (run / "model").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission(tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "locked").mkdir(mode=0o500)
    output = str(tmp_path / "locked" / "run")
    assert "cannot be written" in refused(capsys, "pretrain", "--data", str(recordings), "--output", output, *flags())


def test_an_output_below_a_file(tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("x")
    output = str(tmp_path / "file" / "run")
    assert "cannot be written" in refused(capsys, "pretrain", "--data", str(recordings), "--output", output, *flags())


def test_models_that_are_none(tmp_path: Path, finished_run: Path, recordings: Path, capsys: pytest.CaptureFixture[str]):
    def embed(model: Path | str) -> str:
        return refused(capsys, "embed", str(model), str(recordings), "--output", str(tmp_path / "e.parquet"))

    assert "no such model" in embed("nonsense")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    assert "model_type is 'wav2vec2', expected 'bestrq2'" in embed(other)

    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in (finished_run / "model").iterdir():
        (truncated / file.name).write_bytes(file.read_bytes()[: 3000 if file.suffix == ".safetensors" else None])
    assert "truncated" in embed(truncated)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((finished_run / "model" / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))
    assert "is a pickle, which is never loaded" in embed(pickled)

    wider = tmp_path / "wider"
    wider.mkdir()
    config = json.loads((finished_run / "model" / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    (wider / "model.safetensors").write_bytes((finished_run / "model" / "model.safetensors").read_bytes())
    assert "misshaped" in embed(wider)
    assert not (tmp_path / "e.parquet").exists()


def test_embed_lists_bad_files_and_goes_on(tmp_path: Path, finished_run: Path):
    folder = write_recordings(tmp_path / "audio", 4)
    (folder / "broken.wav").write_text("not audio")
    output = tmp_path / "e.parquet"
    assert cli.run(["embed", str(finished_run), str(folder), "--output", str(output)]) == 0
    assert len(pq.read_table(output)) == 4
    assert "broken.wav" in (tmp_path / "e.parquet.rejected.csv").read_text()


def test_of_several_processes_one_says_what_is_wrong_with_the_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = ["pretrain", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "run")]
    for name, value in {"RANK": 1, "GROUP_RANK": 0, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as exit:
        cli.run(words)
    assert exit.value.code == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert "nowhere does not exist" in refused(capsys, *words)
