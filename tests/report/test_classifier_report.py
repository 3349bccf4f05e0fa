"""The report of fine-tuning: its matrix counts the predictions, and the clips to hear are the wrong ones."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from bestrq2.data.sources import FileSource
from bestrq2.evaluate.finetuned import Predictions, finetune_result, write_finetune_result
from bestrq2.report import classifier
from bestrq2.report.classifier import write_classifier_report

RATE = 8000
SETTINGS = {"model": "runs/big", "labelled": "birds.csv", "mode": "full", "layers": None, "epochs": 2, "seed": 0}


def report(folder: Path, tiny_config: Any, targets: np.ndarray, probabilities: np.ndarray, several: bool) -> str:
    """Page of a run whose test recordings are half a second of noise each, in folders by their number."""
    classes, rng = [f"class {number}" for number in range(targets.shape[1])], np.random.default_rng(0)
    run, files = folder / "run", [folder / "birds" / str(n % 3) / f"clip-{n}.wav" for n in range(len(targets))]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, 0.1 * rng.standard_normal(RATE // 2), RATE)
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (run / "environment.json").write_text(json.dumps({"recordings": 100, "train": 70, "valid": 10, "test": 20}))
    (run / "metrics.csv").write_text("step,epoch,train/loss,valid/loss,valid/accuracy\n5,1,2,2.5,0.4\n10,2,1,2,0.6\n")
    predictions = Predictions([str(file) for file in files], targets, probabilities)
    result = finetune_result("run", classes, several, 2, predictions, 0)
    write_finetune_result(run, result, predictions)
    page = write_classifier_report(run, tiny_config(), result, predictions, FileSource("birds", files))
    return page.read_text(encoding="utf-8")


def drawn(clips: int, classes: int, several: bool) -> tuple[np.ndarray, np.ndarray]:
    """Targets and probabilities that are right more often than not."""
    rng = np.random.default_rng(1)
    targets = np.eye(classes, dtype=np.float32)[rng.integers(classes, size=clips)]
    if several:
        targets = (rng.random((clips, classes)) < 0.3).astype(np.float32)
        return targets, np.clip(0.45 * targets + 0.7 * rng.random((clips, classes)), 0, 1)
    logits = targets + rng.standard_normal((clips, classes))
    return targets, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def cells(page: str, table: str) -> list[list[str]]:
    """Text of the cells of a table, named by the class or the text it begins with."""
    found = re.search(rf"<table[^>]*{table}.*?</table>", page, re.DOTALL)
    assert found
    rows = re.findall(r"<tr.*?</tr>", found[0], re.DOTALL)
    return [
        [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows
    ]


def clips(page: str) -> tuple[set[str], set[str]]:
    """Names of the wrong clips with a player, and of those in the table of clips without sound."""
    heard = set(re.findall(r'aria-label="(\d/clip-\d+\.wav)"></audio>', page))
    return heard, set(re.findall(r'<th scope="row">(\d/clip-\d+\.wav)</th>', page))


def test_confusion_matrix_counts_the_predictions(tmp_path: Path, tiny_config: Any) -> None:
    targets, probabilities = drawn(40, 4, several=False)
    counted = Counter(zip(targets.argmax(axis=1).tolist(), probabilities.argmax(axis=1).tolist(), strict=True))
    page = report(tmp_path, tiny_config, targets, probabilities, several=False)
    header, *rows = cells(page, 'class="confusion')
    assert header[1:] == [f"class {number}" for number in range(4)] + ["clips"]
    for place, (name, *numbers, total) in enumerate(rows):
        assert name == f"class {place}"
        assert [int(number) for number in numbers] == [counted[place, found] for found in range(4)]
        assert int(total) == targets[:, place].sum()
    (true, _), most = max(counted.items(), key=lambda item: (item[0][0] != item[0][1]) * item[1])
    assert f"{most} of {int(targets[:, true].sum())} clips of <strong>class {true}</strong>" in page
    right = 100 * sum(counted[place, place] for place in range(4)) / 40
    assert f"It is right for {right:.1f}\u202f% of 40 test clips" in page


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("room", [3_000_000, 4_000, 0])
def test_wrong_clips_are_heard_or_listed_within_the_budget(
    tmp_path: Path, tiny_config: Any, several: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "SOUND_BYTES", room)
    targets, probabilities = drawn(30, 3, several)
    guessed = probabilities >= 0.5 if several else probabilities == probabilities.max(axis=1, keepdims=True)
    wrong = {f"{n % 3}/clip-{n}.wav" for n in np.flatnonzero((guessed != targets).any(axis=1))}
    page = report(tmp_path, tiny_config, targets, probabilities, several)
    heard, listed = clips(page)
    assert 0 < len(wrong) < 30
    assert heard | listed == wrong
    assert not heard & listed
    sounds = [len(uri) for uri in re.findall(r'src="(data:audio[^"]*)"', page)]
    assert len(sounds) == len(heard)
    assert sum(sounds) <= room
    assert bool(heard) == (room > 0)
    assert bool(listed) == (room < 1_000_000)


def test_most_confused_pairs_take_the_place_of_a_large_matrix(tmp_path: Path, tiny_config: Any) -> None:
    targets = np.eye(60, dtype=np.float32)[np.repeat(np.arange(60), 2)]
    probabilities = 0.9 * targets + 0.001
    probabilities[[0, 1, 10]] = np.eye(60)[[7, 7, 3]]
    page = report(tmp_path, tiny_config, targets, probabilities, several=False)
    assert 'class="confusion' not in page
    _, *pairs = cells(page, '[^<]*<thead><tr><th scope="col">true')
    assert pairs == [["class 0", "class 7", "2", "100 %"], ["class 5", "class 3", "1", "50 %"]]


def test_several_classes_per_clip_show_the_average_precision_of_each(tmp_path: Path, tiny_config: Any) -> None:
    targets, probabilities = drawn(30, 3, several=True)
    probabilities[:, 1] = 1 - targets[:, 1]  # a class that is ranked the wrong way round comes first
    page = report(tmp_path, tiny_config, targets, probabilities, several=True)
    assert 'class="confusion' not in page
    chart = page.partition("Average precision of every class")[2].partition("</figure>")[0]
    assert re.findall(r"<p><span>(class \d)</span>", chart)[0] == "class 1"
