"""The harness of HEAR 2021 itself, on a scene task and an event task in its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from environments import environment, run_there

from bestrq2.inference.embedder import load
from example_sounds import RATE, tones

INSTALLS = (
    ["--no-deps", "heareval==2021.1.3", "pytorch-lightning==1.6.5.post0"],
    ["tensorflow-cpu", "setuptools<81", "torchmetrics", "pyDeprecate", "torchinfo", "pandas"],
    ["pynvml", "python-slugify", "sed-eval", "dcase-util", "intervaltree", "more-itertools"],
)
RECIPE = "best-rq-2-tiny"
# Of the harness's form; its own grid is made for tasks with thousands of clips.
GRID = {"lr": [3.2e-3], "max_epochs": [60], "check_val_every_n_epoch": [5], "patience": [20], "hidden_layers": [1]}


def _write_task(folder: Path, metadata: dict[str, Any], splits: dict[str, list[tuple[np.ndarray, Any]]]) -> None:
    """A preprocessed task: metadata, vocabulary, and for each split the labels and a folder of sounds."""
    folder.mkdir(parents=True)
    params = {
        "task_specific_param_grid": GRID,
        "event_postprocessing_grid": {"median_filter_ms": [0], "min_duration": [60]},
    }
    metadata = {"task_name": folder.name, "version": "v1", "evaluation_params": params, "splits": [*splits], **metadata}
    (folder / "task_metadata.json").write_text(json.dumps(metadata))
    (folder / "labelvocabulary.csv").write_text("idx,label\n0,high\n1,low\n")
    for split, clips in splits.items():
        sounds = folder / str(RATE) / split
        sounds.mkdir(parents=True)
        names = [f"{split}-{index}.wav" for index in range(len(clips))]
        for name, (audio, _) in zip(names, clips, strict=True):
            soundfile.write(sounds / name, audio, RATE)
        (folder / f"{split}.json").write_text(
            json.dumps({name: label for name, (_, label) in zip(names, clips, strict=True)})
        )


def _tone(rng: np.random.Generator, label: str, samples: int) -> np.ndarray:
    return tones(samples, rng.uniform(0.9, 1.1) * {"low": 300, "high": 3000}[label])


def _scene(rng: np.random.Generator, label: str) -> tuple[np.ndarray, list[str]]:
    return 0.05 * rng.standard_normal(2 * RATE) + _tone(rng, label, 2 * RATE), [label]


def _events(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Six seconds with a low tone in one half and a high one in the other, for one second each."""
    audio, events = 0.01 * rng.standard_normal(6 * RATE), []
    for half, label in enumerate(rng.permutation(["low", "high"]).tolist()):
        start = 3 * half + rng.uniform(0.5, 1.5)
        audio[int(start * RATE) : int(start * RATE) + RATE] += _tone(rng, label, RATE)
        events.append({"label": label, "start": 1000 * start, "end": 1000 * start + 1000})
    return audio, events


def _write_tasks(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folds = {f"fold0{fold}": [_scene(rng, ("low", "high")[index % 2]) for index in range(12)] for fold in range(3)}
    kind = {"embedding_type": "scene", "prediction_type": "multiclass", "split_mode": "new_split_kfold"}
    _write_task(folder / "pitch", {**kind, "sample_duration": 2.0, "evaluation": ["top1_acc", "mAP"]}, folds)
    parts = {split: [_events(rng) for _ in range(count)] for split, count in (("train", 24), ("valid", 8), ("test", 8))}
    kind = {"embedding_type": "event", "prediction_type": "multilabel", "split_mode": "trainvaltest"}
    measures = ["segment_1s_er", "event_onset_200ms_fms"]
    _write_task(folder / "tones", {**kind, "sample_duration": 6.0, "evaluation": measures}, parts)


@pytest.mark.slow
def test_heareval_scores_a_scene_task_and_an_event_task(tmp_path):
    _write_tasks(tmp_path / "tasks")
    folder = tmp_path / "embeddings" / "bestrq2.evaluate.hear"
    embedding = ["-m", "heareval.embeddings.runner", "bestrq2.evaluate.hear", "--tasks-dir", "tasks"]
    prediction = ["-m", "heareval.predictions.runner", folder / "pitch", folder / "tones", "--grid-points", 1]
    with environment(tmp_path / "environment", *INSTALLS) as python:
        run_there(python, embedding, tmp_path, BESTRQ2_HEAR_MODEL=RECIPE)
        run_there(python, prediction, tmp_path, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")

    clip = tmp_path / "tasks/pitch" / str(RATE) / "fold00/fold00-3.wav"
    ours = load(RECIPE, "cpu").embed(clip).clip[0]
    np.testing.assert_allclose(np.load(folder / "pitch/fold00/fold00-3.wav.embedding.npy"), ours, atol=1e-4)
    times = json.loads((folder / "tones/test/test-0.wav.timestamps.json").read_text())
    assert times[0] == 0.0
    assert max(np.diff(times)) <= 50.0
    pitch, events = (
        json.loads((folder / task / "test.predicted-scores.json").read_text()) for task in ("pitch", "tones")
    )
    assert pitch["aggregated_scores"]["test_top1_acc_mean"] > 0.8
    assert events["test"]["test_segment_1s_er_error_rate"] < 0.6
    assert events["test"]["test_event_onset_200ms_fms_f_measure"] > 0.5
