"""Fine-tuning learns, changes what it may, resumes exactly, and what it writes predicts the same again."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from small_run import RATE, at_step, free_port, metrics, weights

import bestrq2
from bestrq2 import BestRQ2ForAudioClassification, cli
from bestrq2.commands.finetune import finetune
from bestrq2.data.audio import read_audio
from bestrq2.data.open_source import open_source
from bestrq2.errors import BestRQ2Error, ConfigError, StoppedBySignal
from bestrq2.evaluate.finetuned import ONE_CLASS, format_finetune_result
from bestrq2.inference.classifier import load_classifier
from bestrq2.train import finetuning
from bestrq2.train.optimizer import layer_groups
from bestrq2.train.settings import FinetuneConfig

PITCHES = {"low": 250.0, "mid": 900.0, "high": 3000.0}


def tone(pitches: list[float], seconds: float, seed: int) -> np.ndarray:
    """Swelling tones near these pitches over faint noise, float32 [samples]."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    parts = [np.sin(2 * np.pi * pitch * rng.uniform(0.9, 1.1) * time + rng.uniform(0, 6)) for pitch in pitches]
    swell = 1 + 0.4 * np.sin(2 * np.pi * rng.uniform(1, 4) * time)
    return (0.2 * swell * sum(parts, np.zeros_like(time)) + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    """An untrained encoder of three blocks for clips of 2.5 s."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = tiny_config(max_seconds=2.5, num_hidden_layers=3, input_normalization="clip", drop_path_rate=0.2)
    bestrq2.BestRQ2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of clips of 0.4 to 3.5 s, and a file that is no audio."""
    root = tmp_path_factory.mktemp("tones")
    for label, pitch in PITCHES.items():
        (root / label).mkdir()
        for number in range(14):
            clip = tone([pitch], 0.4 + 3.1 * (number % 5) / 4, seed=number)
            soundfile.write(root / label / f"{number:02d}.wav", clip, RATE)
    (root / "low" / "broken.wav").write_text("not audio")
    return root


@pytest.fixture(scope="module")
def chords(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of recordings with none to three of the tones."""
    root = tmp_path_factory.mktemp("chords")
    rows = ["path,labels"]
    for number in range(64):
        names = [name for bit, name in enumerate(PITCHES) if number >> bit & 1]
        soundfile.write(root / f"{number:02d}.wav", tone([PITCHES[name] for name in names], 1.5, number), RATE)
        rows.append(f"{number:02d}.wav,{';'.join(names)}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root / "labels.csv"


def small_finetune(encoder: Path, labelled: Path, output: Path, **changes: Any) -> SimpleNamespace:
    settings = {"epochs": 3, "batch_size": 8, "lr": 3e-3, "num_workers": 0, "device": "cpu", **changes}
    result = finetune(encoder, labelled, output, **settings)
    overall = {one.metric: one for one in result.scores if one.domain != ONE_CLASS}
    return SimpleNamespace(output=output, result=result, overall=overall, **result.provenance)


def changed(encoder: Path, run: Path) -> set[str]:
    """Names of the encoder's parameters that differ from those before, to the bit."""
    before = bestrq2.load(encoder, "cpu").model.state_dict()
    after = bestrq2.load(run, "cpu").model.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def full_run(encoder: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return small_finetune(encoder, tones, tmp_path_factory.mktemp("runs") / "full", epochs=12)


def test_full_fine_tuning_learns_classes(full_run: SimpleNamespace, encoder: Path, tones: Path):
    scores = full_run.overall
    assert scores["accuracy"].score >= 0.85
    assert scores["accuracy"].chance < 0.4
    assert full_run.test_clips >= 8
    assert {one.task for one in full_run.result.scores if one.domain == ONE_CLASS} == set(PITCHES)
    rows = metrics(full_run.output)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["train/loss"]) < 0.5 * float(rows[0]["train/loss"])
    best = max(float(row["valid/balanced accuracy"]) for row in rows)
    assert float(rows[full_run.best_epoch - 1]["valid/balanced accuracy"]) == best
    assert rows_of(full_run.output / "rejected.csv")[0]["path"].endswith("low/broken.wav")
    trainable = {name for name, _ in bestrq2.load(encoder, "cpu").model.named_parameters()}
    assert changed(encoder, full_run.output) == trainable


def test_info_of_a_classifier_tells_its_classes_and_its_score(full_run: SimpleNamespace):
    facts, accuracy = bestrq2.info(full_run.output, cost=False), full_run.overall["accuracy"]
    assert facts["classes"] == f"{len(PITCHES)}: {', '.join(full_run.classes)}"
    assert facts["task"] == "one class per recording"
    assert facts["score"].startswith(f"accuracy {100 * accuracy.score:.1f} % [")
    assert facts["score"].endswith(f"weights of epoch {full_run.best_epoch}, the best in validation")
    assert str(full_run.result) == format_finetune_result(full_run.result)


def test_predictions_of_the_folder_are_those_of_the_model_in_memory(
    full_run: SimpleNamespace, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = tmp_path / "predictions.csv"
    assert cli.run(["predict", str(full_run.output), str(tones), "--output", str(table), "--device", "cpu"]) == 0
    assert [row["path"] for row in rows_of(tmp_path / "predictions.csv.rejected.csv")] == [
        str(tones / "low/broken.wav")
    ]
    predicted = {row["path"]: row for row in rows_of(table)}
    assert len(predicted) == 42
    assert np.mean([row["label"] == Path(path).parent.name for path, row in predicted.items()]) >= 0.85
    for row in rows_of(full_run.output / "test-predictions.csv"):
        assert row["true"] == Path(row["path"]).parent.name
        assert row["label"] == predicted[row["path"]]["label"]
        for name in PITCHES:
            assert float(row[f"p({name})"]) == pytest.approx(float(predicted[row["path"]][f"p({name})"]), abs=2e-6)
    model = BestRQ2ForAudioClassification.from_pretrained(full_run.output / "model").eval()
    path = str(tones / "mid" / "01.wav")  # shorter than a window: the plain forward pass
    with torch.no_grad():
        logits = model(torch.from_numpy(read_audio(path, RATE))[None]).logits[0]
    for name, probability in zip(("high", "low", "mid"), logits.softmax(0).tolist(), strict=True):
        assert float(predicted[path][f"p({name})"]) == pytest.approx(probability, abs=2e-6)


def test_long_recordings_are_the_weighted_mean_of_their_windows(full_run: SimpleNamespace, tmp_path: Path):
    waveform = np.concatenate([tone([PITCHES["low"]], 2.5, 1), tone([PITCHES["high"]], 1.5, 2)])
    soundfile.write(tmp_path / "long.wav", waveform, RATE, subtype="FLOAT")
    classifier = load_classifier(full_run.output, "cpu")
    (found,) = classifier.predict(open_source(tmp_path))
    with torch.no_grad():
        windows = [torch.from_numpy(part)[None] for part in (waveform[:40_000], waveform[40_000:])]
        first, second = (classifier.model(part).logits[0].softmax(0).numpy() for part in windows)
    np.testing.assert_allclose(found, (2.5 * first + 1.5 * second) / 4, atol=1e-6)
    workers = list(classifier.predict(open_source(tmp_path), num_workers=2))
    np.testing.assert_allclose(workers[0], found, atol=1e-6)


def test_linear_mode_leaves_the_encoder_as_it_was(encoder: Path, tones: Path, tmp_path: Path):
    result = small_finetune(encoder, tones, tmp_path / "run", mode="linear", lr=0.05, epochs=4)
    assert changed(encoder, result.output) == set()
    fresh = finetuning.make_classifier(bestrq2.load(encoder, "cpu").model, result.classes, False, None, 0)
    assert not torch.equal(weights(result.output)["classifier.weight"], fresh.classifier.weight)


def test_partial_mode_changes_the_last_blocks_only(encoder: Path, tones: Path, tmp_path: Path):
    result = small_finetune(encoder, tones, tmp_path / "run", mode="partial", layers=1, epochs=1)
    names = changed(encoder, result.output)
    assert {name.rpartition(".")[0].split(".")[1] + name.split(".")[2] for name in names} == {
        "blocks2", "normweight", "normbias",
    }  # fmt: skip


def test_several_classes_are_learnt_from_a_table(encoder: Path, chords: Path, tmp_path: Path):
    result = small_finetune(encoder, chords, tmp_path / "run", epochs=12, balanced=True, layer_decay=0.8)
    scores = result.overall
    assert scores["macro mAP"].score > 0.85 > scores["macro mAP"].chance
    assert load_classifier(result.output, "cpu").multi_label
    for row in rows_of(result.output / "test-predictions.csv"):
        above = [name for name in sorted(PITCHES) if float(row[f"p({name})"]) >= 0.5]
        assert row["label"] == ";".join(above)


def test_layer_decay_lowers_the_rate_block_by_block(encoder: Path, chords: Path, tmp_path: Path):
    model = finetuning.make_classifier(bestrq2.load(encoder, "cpu").model, ("a", "b"), False, None, 0)
    config = FinetuneConfig("m", "l", tmp_path, lr=1e-3, layer_decay=0.5)
    rates = {parameter: group["initial_lr"] for group in layer_groups(model, config) for parameter in group["params"]}
    assert set(rates) == set(model.parameters())
    blocks = model.bestrq2.encoder.blocks
    expected = [(model.classifier, 1), (blocks[2], 1 / 2), (blocks[0], 1 / 8), (model.bestrq2.patch_embedding, 1 / 16)]
    for module, share in expected:
        assert {rates[parameter] for parameter in module.parameters()} == {1e-3 * share}


def test_the_rate_that_is_not_given_depends_on_mode_and_width(encoder: Path, tones: Path, tmp_path: Path):
    rates = {}
    for mode in ("linear", "full"):
        small_finetune(encoder, tones, tmp_path / mode, mode=mode, lr=None, epochs=1)
        rates[mode] = yaml.safe_load((tmp_path / mode / "config.yaml").read_text())["lr"]
    width = bestrq2.load(encoder, "cpu").config.hidden_size
    assert rates == {"linear": 1e-2, "full": 0.2 / width}
    small_finetune(encoder, tones, tmp_path / "full", resume=True, lr=None, epochs=1)  # finished: with the same rate


def test_a_stopped_run_resumes_to_the_same_bits(
    encoder: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = small_finetune(encoder, tones, tmp_path / "whole", balanced=True)
    steps = int(metrics(whole.output)[0]["step"])
    with monkeypatch.context() as patch:
        at_step(patch, steps + 1, lambda: os.kill(os.getpid(), signal.SIGINT))  # in the second epoch
        with pytest.raises(StoppedBySignal, match=rf"stopped after step {steps + 2} of .* add --resume"):
            small_finetune(encoder, tones, tmp_path / "stopped", balanced=True)
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{steps + 2:08d}.ckpt").exists()
    assert bestrq2.load(tmp_path / "stopped", "cpu").config.hidden_size == 32  # the model is whole
    with pytest.raises(ConfigError, match="holds no run to resume; to start one, give MODEL"):
        finetune(output=tmp_path / "none", resume=True)
    resumed = finetune(output=tmp_path / "stopped", resume=True)
    again = small_finetune(encoder, tones, tmp_path / "stopped", balanced=True, resume=True)
    assert all(torch.equal(one, weights(again.output)[name]) for name, one in weights(whole.output).items())
    for name in ("metrics.csv", "test-classes.csv", "test-predictions.csv"):
        assert (whole.output / name).read_bytes() == (again.output / name).read_bytes()
    assert again.result.provenance == resumed.provenance, "read, not trained again"
    assert [one.score for one in resumed.scores] == [one.score for one in whole.result.scores]
    with pytest.raises(BestRQ2Error, match="cannot be resumed with other settings: epochs was 3 and is now 4"):
        small_finetune(encoder, tones, tmp_path / "stopped", balanced=True, resume=True, epochs=4)
    with pytest.raises(BestRQ2Error, match="holds a run already; add --resume"):
        small_finetune(encoder, tones, tmp_path / "stopped")


def test_two_processes_learn_what_one_does(encoder: Path, tones: Path, tmp_path: Path, start_cli: Any):
    calm = tmp_path / "encoder"  # without stochastic depth, which draws per process
    shutil.copytree(encoder, calm)
    config = json.loads((calm / "config.json").read_text())
    (calm / "config.json").write_text(json.dumps({**config, "drop_path_rate": 0.0}))
    alone = small_finetune(calm, tones, tmp_path / "one", epochs=2)
    job = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "finetune", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    words = f"finetune {calm} {tones} --output {tmp_path / 'two'} --epochs 2 --batch_size 8 --lr 3e-3 --num_workers 0"
    ranks = [
        start_cli(
            [*words.split(), "--device", "cpu"], env={**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        )
        for rank in range(2)
    ]
    finished = [rank.finish(120) for rank in ranks]
    assert [one.returncode for one in finished] == [0, 0], finished[0].stderr + finished[1].stderr
    # Biases of keys have no gradient but rounding errors, which Adam enlarges.
    assert all(
        torch.allclose(one, weights(tmp_path / "two")[name], atol=3e-5) for name, one in weights(alone.output).items()
    )
    for row, twin in zip(metrics(alone.output), metrics(tmp_path / "two"), strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(
            {name: float(value) for name, value in twin.items()}, rel=1e-4
        )
    assert "broken.wav" in (tmp_path / "two" / "rejected.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "partal"}, "there is no mode 'partal'; did you mean 'partial'"),
        ({"mode": "partial"}, "partial, which needs it"),
        ({"layers": 2}, "layers belongs to mode partial"),
        ({"mode": "partial", "layers": 4}, "layers is 4, but the encoder has 3 blocks"),
        ({"mode": "linear", "layer_decay": 0.5}, "layer_decay means nothing in mode linear"),
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"lr": -1.0}, r"lr must be above 0, got -1\.0"),
        ({"max_seconds": 0.0}, "max_seconds must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(
    encoder: Path, tones: Path, tmp_path: Path, changes: dict[str, Any], reason: str
):
    with pytest.raises(BestRQ2Error, match=reason):
        small_finetune(encoder, tones, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("empty_folder")
def test_models_that_name_no_classes_cannot_predict(encoder: Path, tones: Path, tmp_path: Path):
    for model in (encoder, "demo", "bestrq2-tiny"):
        with pytest.raises(BestRQ2Error, match="name a run of `bestrq2 finetune`"):
            bestrq2.predict(model, str(tones), tmp_path / "p.csv", device="cpu")
    assert not list(tmp_path.iterdir())


def test_a_class_without_test_recordings_is_warned_of(
    encoder: Path, tones: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = ["path,label,split"]
    for label in PITCHES:
        for number, split in ((0, "train"), (1, "train"), (2, "valid"), (3, "test")):
            if (label, split) != ("mid", "test"):
                rows.append(f"{tones / label / f'{number:02d}.wav'},{label},{split}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    result = small_finetune(encoder, tmp_path / "t.csv", tmp_path / "run", epochs=1)
    assert "no test recordings of mid; means leave them out" in caplog.text
    (recall,) = [one for one in result.result.scores if (one.task, one.metric) == ("mid", "recall")]
    assert np.isnan(recall.score)
    assert "-" in format_finetune_result(result.result).splitlines()[-3].split()
