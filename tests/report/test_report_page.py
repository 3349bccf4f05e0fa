"""Pages are self-contained and safe, and show exactly the values they were given."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bestrq2.report.embeddings import EmbeddedClip
from bestrq2.report.page import ReportContents, render, write_report
from bestrq2.report.scores import mean_score
from bestrq2.report.sounds import cut_seconds

HOSTILE = "\"><script>alert('x')</script><img src=x onerror=alert(1)>&amp;</title>"


class Page(HTMLParser):
    """Collects elements with their attributes, headings' ids and the probe table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_table = self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._in_table = self._in_table or attributes.get("class") == "probes-table"
        if self._in_table and tag == "tr":
            self.rows.append([])
        if self._in_table and tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")
        self._in_table = self._in_table and tag != "table"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.elements if tag == "section"]


def test_page_loads_nothing_from_anywhere(page: str) -> None:
    for _, attributes in Page(page).elements:
        for name in ("src", "href", "poster", "data", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), target
    assert not re.search(r"https?://", re.sub(r"http://www\.w3\.org/\S+?\"", "", page))
    assert "@import" not in page
    assert not re.search(r"url\(", page)


def test_page_of_a_demo_stays_small(page: str) -> None:
    assert len(page) < 3_500_000


def test_probe_table_holds_every_given_number(contents: ReportContents, page: str) -> None:
    rows = Page(page).rows[1:]
    shown = {(row[0], row[1], row[2], row[3]): [float(cell.strip("* ")) for cell in row[5:]] for row in rows}
    assert len(rows) == len(shown) == len(contents.probes)
    for one in contents.probes:
        method = {"linear": "linear probe", "knn": "k-NN"}[one.method]
        numbers = shown[one.domain, one.task, method, one.features]
        assert numbers == pytest.approx([100 * v for v in (one.score, one.low, one.high, one.chance)], abs=0.00501)


def test_bars_are_as_long_as_their_scores(contents: ReportContents, page: str) -> None:
    widths = {float(width) for width in re.findall(r"<b style=\"width:([\d.]+)%", page)}
    assert all(min(abs(width - 100 * one.score) for width in widths) < 0.011 for one in contents.probes)


def test_mean_interval_takes_errors_as_independent(contents: ReportContents) -> None:
    first = replace(contents.probes[0], score=0.5, low=0.4, high=0.6, chance=0.1)
    mean = mean_score([first, replace(first, score=0.7, low=0.6, high=0.8, chance=0.3)], "speech")
    relative, half = (0.4 / 0.9 + 0.4 / 0.7) / 2, np.hypot(0.1 / 0.9, 0.1 / 0.7) / 2
    assert (mean.score, mean.low, mean.high) == pytest.approx((relative, relative - half, relative + half))
    assert mean.chance == 0


def sounds_of(text: str) -> list[tuple[int, np.ndarray]]:
    """Sampling rate and int16 samples [S] of every sound in a page."""
    found = []
    for encoded in re.findall(r"data:audio/mpeg;base64,([A-Za-z0-9+/=]+)", text):
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)), dtype="int16")
        found.append((rate, samples))
    return found


def test_every_clip_can_be_heard_and_is_stored_once() -> None:
    rng = np.random.default_rng(0)
    clips, rates = [], (16_000, 8_000, 11_025, 9_999)
    for number in range(12):
        rate = rates[number % 4]
        samples = (9000 * np.sin(2 * np.pi * (300 + 100 * number) * np.arange(rate) / rate)).astype(np.int16)
        clips.append(EmbeddedClip(rng.standard_normal(8), "speech", "voice", str(number), samples, rate))
    text = render(ReportContents("t", "l", clips=clips))
    heard = {}
    for rate, samples in sounds_of(text):
        assert len(samples) == pytest.approx(rate, rel=0.02)
        heard[round(np.argmax(np.abs(np.fft.rfft(samples[:rate], rate))), -2)] = rate
    assert heard == {
        300 + 100 * number: 16_000 if rates[number % 4] == 9_999 else rates[number % 4] for number in range(12)
    }
    players = [attributes for tag, attributes in Page(text).elements if tag == "audio" and "hidden" not in attributes]
    names = {player["id"] for player in players if "src" in player}
    assert {player["data-sound"] for player in players if "src" not in player} <= names


def test_audio_of_a_page_is_bounded() -> None:
    assert [cut_seconds(clips) for clips in (0, 1, 300, 400, 2000)] == [4, 4, 4, 3, 0.6]


def test_long_clips_keep_their_loudest_four_seconds() -> None:
    quiet = np.random.default_rng(0).integers(-50, 50, 10 * 16_000, dtype=np.int16)
    quiet[6 * 16_000 : 9 * 16_000] *= 200
    clips = [EmbeddedClip(np.eye(2)[i], "music", "key", "C", quiet, 16_000) for i in range(2)]
    rate, samples = sounds_of(render(ReportContents("t", "l", clips=clips)))[0]
    assert len(samples) == pytest.approx(4 * rate, rel=0.02)
    assert np.abs(samples.astype(int)).max() > 5000
    assert np.sum(np.abs(samples.astype(int)) > 200) > 2.7 * rate


def test_high_rates_are_resampled_to_16_khz() -> None:
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100)).astype(np.int16)
    clips = [EmbeddedClip(np.eye(2)[i], "music", "key", "A", tone, 44_100) for i in range(2)]
    rate, samples = sounds_of(render(ReportContents("t", "l", clips=clips)))[0]
    assert (rate, len(samples)) == (16_000, pytest.approx(16_000, rel=0.02))
    assert np.argmax(np.abs(np.fft.rfft(samples[:16_000], 16_000))) == pytest.approx(440, abs=1)


def test_neighbours_are_the_closest_by_cosine() -> None:
    angles = np.radians([0, 10, 25, 120, 135, 180, 240, 300])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) + 5
    sound = np.arange(800, dtype=np.int16)
    clips = [EmbeddedClip(v, "speech", "voice", f"clip{i}", sound, 16_000) for i, v in enumerate(vectors)]
    labels = re.findall(r"clip-label\">(clip\d)<", render(ReportContents("t", "l", clips=clips)))
    centred = vectors - vectors.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    for row in range(6):
        query, *found = (int(label.removeprefix("clip")) for label in labels[4 * row : 4 * row + 4])
        expected = [i for i in np.argsort(-centred @ centred[query]) if i != query][:3]
        assert found == expected


def test_hostile_texts_stay_text(contents: ReportContents) -> None:
    clip = replace(contents.clips[0], label=HOSTILE, domain=HOSTILE, task=HOSTILE)
    hostile = ReportContents(
        title=HOSTILE,
        lead=HOSTILE,
        facts={HOSTILE: HOSTILE},
        runs=[replace(contents.runs[0], name=HOSTILE, label=HOSTILE, facts={HOSTILE: HOSTILE})],
        examples=[replace(contents.examples[0], title=HOSTILE)],
        probes=[replace(contents.probes[0], features=HOSTILE, task=HOSTILE, domain=HOSTILE, metric=HOSTILE)],
        clips=[clip, *contents.clips[1:12]],
        notes=[HOSTILE],
    )
    tame = replace(contents, clips=contents.clips[:12], runs=contents.runs[:1])
    found, expected = Page(render(hostile)), Page(render(tame))
    scripts = [tag for tag, _ in found.elements if tag == "script"]
    assert len(scripts) == sum(tag == "script" for tag, _ in expected.elements)
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert "<script>alert" not in render(hostile)


@pytest.mark.parametrize(
    ("emptied", "gone"),
    [
        ({"runs": []}, {"training"}),
        ({"examples": []}, {"masks"}),
        ({"probes": []}, {"probes"}),
        ({"xares": None}, {"xares"}),
        ({"clips": []}, {"map", "neighbours"}),
        ({"notes": []}, {"notes"}),
        ({"runs": [], "facts": {}}, {"training", "about"}),
    ],
)
def test_sections_without_data_are_left_out(contents: ReportContents, emptied: dict, gone: set[str]) -> None:
    every = {"about", "training", "masks", "probes", "xares", "map", "neighbours", "notes"}
    text = render(replace(contents, **({"clips": contents.clips[:9]} | emptied)))
    assert set(Page(text).sections()) == every - gone
    assert not any(f'href="#{name}"' in text for name in gone)


def test_page_of_nothing_but_a_title_is_still_a_page() -> None:
    assert "<h1>Nothing yet</h1>" in render(ReportContents("Nothing yet", "No data."))


@pytest.mark.parametrize(
    ("count", "changes", "sections"),
    [
        (1, {}, []),
        (2, {}, ["map", "neighbours"]),
        (10, {}, ["map", "neighbours"]),
        (12, {"vector": np.ones(4)}, ["neighbours"]),  # identical embeddings have no map
        (12, {"waveform": None}, ["map"]),  # clips without sound have no players
    ],
)
def test_few_identical_and_silent_clips(contents: ReportContents, count: int, changes: dict, sections: list) -> None:
    clips = [replace(clip, **changes) for clip in contents.clips[:count]]
    assert Page(render(ReportContents("t", "l", clips=clips))).sections() == sections


def test_sentences_keep_their_spaces(page: str) -> None:
    words = " ".join(re.sub(r"<[^>]+>", "", page[page.index('id="neighbours"') :]).split())
    assert re.search(r"Over all \d+ clips, \d+ % of the nearest neighbours .* by chance\) and \d+ % have", words)


def test_same_contents_give_the_same_page(contents: ReportContents, page: str) -> None:
    assert render(contents) == page


def test_codes_can_be_read_off_every_patch(contents: ReportContents, page: str) -> None:
    example = contents.examples[0]
    for row, column in np.argwhere(example.hidden):
        predicted, true = example.predicted_codes[row, column], example.true_codes[row, column]
        y = example.hidden.shape[0] - 1 - row
        name = "right" if predicted == true else "wrong"
        cell = f'<rect class="{name}" x="{column}" y="{y}" width="1" height="1"'
        assert f'{cell} data-tip="predicted {predicted}, true {true}: {name}' in page
    right = int(np.sum((example.predicted_codes == example.true_codes) & example.hidden))
    assert f"<strong>{right} of {int(example.hidden.sum())}</strong>" in page


def test_report_leaves_no_temporary_file(tmp_path: Path, contents: ReportContents) -> None:
    output = tmp_path / "new" / "report.html"
    write_report(output, replace(contents, clips=[]))
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_failure_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    output = tmp_path / "report.html"
    output.write_text("the old report")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(output, ReportContents("t", "l"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert output.read_text() == "the old report"


def test_undecodable_file_names_can_be_written(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", ReportContents(b"caf\xe9.wav".decode("utf-8", "surrogateescape"), "l"))
    assert "<h1>caf?.wav</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_failed_probes_and_embeddings_do_not_spoil_the_page(contents: ReportContents) -> None:
    failed = replace(contents.probes[0], score=np.nan, low=np.nan, high=np.nan)
    broken = replace(contents.clips[0], vector=np.full(48, np.nan), label="broken clip")
    text = render(replace(contents, probes=[failed, *contents.probes[1:3]], clips=[broken, *contents.clips[1:8]]))
    assert [row[5].strip() for row in Page(text).rows].count("-") == 1
    assert "nan%" not in text.lower()
    assert "broken clip" not in text
    assert {"map", "neighbours", "probes"} <= set(Page(text).sections())
