"""The result file comes back as it was, and nothing else is taken for one."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bestrq2.errors import DataError
from bestrq2.evaluate.xares.entries import Score, XaresResult, read_result, write_result
from published_models import published_result


def partial() -> XaresResult:
    some = published_result("Dasheng", only=("esc50", "maestro"), name="mine")
    own = Score("soundworld_word", "knn", 0.1 + 0.2, "accuracy", None)
    return replace(some, scores=(*some.scores, own), failures={"desed": "the tar is half downloaded"})


def test_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    for result in (partial(), published_result("Whisper"), XaresResult("untried", ())):
        write_result(tmp_path / "xares.json", result)
        assert read_result(tmp_path / "xares.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["xares.json"]


def test_file_holds_versions_and_averages_that_name_what_they_lack() -> None:
    content = json.loads(partial().to_json())
    assert content["provenance"]["xares"] == "0.1.3"
    cards = content["averages"]["37 entries"]
    assert cards["environment"] == {"value": None, "found": 2, "expected": 8}
    assert "esc50/knn" not in cards["missing"]
    assert "desed/mlp" in cards["missing"]
    assert len(cards["missing"]) == 34


def edited(**changes: object) -> str:
    content = json.loads(partial().to_json())
    return json.dumps(content | changes)


def score(**changes: object) -> list[dict[str, object]]:
    return [{"task": "esc50", "method": "mlp", "value": 0.5, "metric": "accuracy", "seconds": 1.0} | changes]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        (partial().to_json()[:-40], "is no JSON"),
        ("[1, 2]", "is no result of X-ARES"),
        (edited(benchmark="soundworld-1"), "is no result of X-ARES"),
        (edited(format=2), "is of format 2, but this version reads 1"),
        (edited(model=""), "has no model's name"),
        (edited(model=None), "has NoneType in the field 'model'"),
        (edited(colour="red"), "has the unknown field 'colour'"),
        (edited(scores=[3]), "score 0 is int, no object"),
        (edited(scores=score(value=1.2)), "the mlp score of 'esc50' is 1.2, no number in 0..1"),
        (edited(scores=score(value=float("nan"))), "is nan, no number in 0..1"),
        (edited(scores=score(value=True)), "has bool in the field 'value' of score 0"),
        (edited(scores=score(method="svm")), "the svm score of 'esc50' is of no method of that task"),
        (edited(scores=score(task="clotho", method="knn")), "the knn score of 'clotho' is of no method of that task"),
        (edited(scores=score(metric="mAP")), "has the metric 'mAP', but X-ARES scores that task by 'accuracy'"),
        (edited(scores=score(seconds=-1)), "took -1 seconds"),
        (edited(scores=score() * 2), "the mlp score of 'esc50' stands there twice"),
        (edited(scores=score()), "has averages that are not those of its scores"),
        (edited(failures={"desed": ""}), "the failure of 'desed' says no reason"),
        (edited(failures={"desed": 3}), "the failure of 'desed' says no reason"),
    ],
)
def test_foreign_or_damaged_text_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "xares.json"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(said)) as error:
        read_result(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("write it anew with `bestrq2 xares MODEL`")
    assert "\n" not in str(error.value)


def test_each_missing_field_is_named() -> None:
    content = json.loads(partial().to_json())
    for name in set(content) - {"benchmark", "format"}:
        rest = {key: value for key, value in content.items() if key != name}
        with pytest.raises(DataError, match=f"misses the field '{name}'"):
            XaresResult.from_json(json.dumps(rest))


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"xares.json: cannot be read \(No such file or directory\)"):
        read_result(tmp_path / "xares.json")
    (tmp_path / "xares.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"xares.json: cannot be read \(it is no UTF-8 text\)"):
        read_result(tmp_path / "xares.json")


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    wrong = replace(partial(), scores=(Score("esc50", "mlp", 85.7, "accuracy"),))
    with pytest.raises(DataError, match=r"is 85\.7, no number in 0\.\.1"):
        write_result(tmp_path / "xares.json", wrong)
    with pytest.raises(DataError, match="provenance cannot be written as JSON"):
        write_result(tmp_path / "xares.json", replace(partial(), provenance={"path": tmp_path}))
    assert not list(tmp_path.iterdir())
