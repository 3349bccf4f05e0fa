"""The page as a browser sees it, at phone and desktop width; skipped where there is no Chromium."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import example_report
import pytest
from chromium import CHROMIUM, visit
from example_runs import together, write_run

from bestrq2.report.page import ReportContents, render

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
# Uses the page like a reader.
USE = """
const tip = page.getElementById("tip"), found = { tips: [], legends: [] };
for (const details of page.querySelectorAll("details")) details.open = true;
const area = page.querySelector(".curve .area");
if (area) {
  const box = area.getBoundingClientRect();
  area.dispatchEvent(new inside.PointerEvent("pointermove", { bubbles: true, clientX: box.left + box.width / 2 }));
  found.tips.push(tip.innerText);
  area.dispatchEvent(new inside.KeyboardEvent("keydown", { key: "ArrowRight" }));
  found.tips.push(tip.innerText);
}
for (const kind of ["rect.right", "rect.wrong", "rect.seen", ".point", ".track"]) {
  const owner = page.querySelector(kind);
  if (!owner) continue;
  owner.dispatchEvent(new inside.PointerEvent("pointerdown", { bubbles: true, clientX: 360, clientY: 50 }));
  found.tips.push(tip.innerText);
  const box = tip.getBoundingClientRect();
  found.tipInside = (found.tipInside ?? true) && box.left >= 0 && box.right <= inside.innerWidth;
}
const choice = page.getElementById("map-colour");
for (let index = 0; choice && index < choice.options.length; index++) {
  choice.selectedIndex = index;
  choice.dispatchEvent(new inside.Event("change"));
  found.legends.push([...page.querySelectorAll("#map-legend button")].map((button) => button.innerText));
  page.querySelector("#map-legend button").click();
}
found.scrollWidth = page.documentElement.scrollWidth;
found.outside = [...page.body.querySelectorAll("*")].filter((element) => {
  const box = element.getBoundingClientRect();
  const outside = box.width && (box.right > width + 0.5 || box.left < -0.5);
  return outside && !element.closest(".scroll table, svg");
}).map((element) => element.tagName + "." + element.className);
const texts = [...page.body.querySelectorAll("p, span, td, dd, dt, button, small")];
const sizes = texts.filter((element) => element.innerText.trim())
  .map((element) => parseFloat(inside.getComputedStyle(element).fontSize));
found.smallest = Math.min(...sizes);
return found;
"""


@pytest.mark.parametrize("width", [375, 1280])
def test_page_works_without_console_errors_or_overflow(contents: ReportContents, tmp_path: Path, width: int) -> None:
    found, console = visit(render(contents), tmp_path, width, USE)
    assert console == []
    assert found["scrollWidth"] <= width
    assert found["outside"] == []
    assert found["smallest"] >= 11
    assert found["tipInside"]
    texts = found["tips"]
    assert texts[0].startswith("step 1,500")
    assert "two steps, validation" in texts[0]
    assert texts[1] != texts[0]
    assert re.fullmatch(r"predicted (\d+), true \1: right\n.* s, mel \d+–\d+", texts[2])
    assert re.match(r"predicted \d+, true \d+: wrong", texts[3])
    assert re.match(r"visible, code \d+", texts[4])
    assert texts[5] == "German\nspeech · language"
    assert "95 % interval" in texts[6]
    legends = [[name.split("\n")[0] for name in names] for names in found["legends"]]
    assert legends[0] == list(example_report.TASKS)
    assert len(legends[1]) == sum(len(tasks) for tasks in example_report.TASKS.values())
    assert legends[2] == sorted(example_report.TASKS["speech"]["language"])


@pytest.mark.usefixtures("steady_and_quick")
def test_comparison_works_without_console_errors_or_overflow(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{seed}", seed=seed, quality=1 + seed) for seed in range(2)]
    found, console = visit(together(*folders).html(), tmp_path, 375, USE)
    assert console == []
    assert found["scrollWidth"] <= 375
    assert found["outside"] == []
    step, *readings = found["tips"][0].splitlines()
    assert step == "step 200"
    assert re.fullmatch(r"best-rq-2-tiny\t[\d.]+ \([\d.]+ to [\d.]+\)", readings[0])
    assert re.match(
        r"best-rq-2-tiny, linear probe: 65.0 ± 0.0 %\n95 % interval .*\nseeds 65.0, 65.0 %", found["tips"][-1]
    )


def test_long_names_do_not_widen_a_phone(contents: ReportContents, tmp_path: Path) -> None:
    word = "unbreakable_" * 12
    long = replace(
        contents,
        title=word,
        lead=word,
        facts={word: word},
        runs=[replace(run, label=word + run.name, facts={word: word}) for run in contents.runs],
        examples=[example_report.example_mask(word, 1, rows=1, columns=64)],
        probes=[replace(one, features=word + one.features, task=word + one.task) for one in contents.probes],
        xares=contents.xares and replace(contents.xares, model=word + contents.xares.model),
        clips=[replace(clip, label=word + clip.label, task=word) for clip in contents.clips[:9]],
        notes=[word],
    )
    found, console = visit(render(long), tmp_path, 375, USE)
    assert console == []
    assert found["scrollWidth"] <= 375
    assert found["outside"] == []


def test_broken_script_would_be_noticed(tmp_path: Path) -> None:
    page = render(ReportContents("t", "l")).replace("</body>", "<script>missing.call()</script></body>")
    assert any("missing" in line for line in visit(page, tmp_path, 375, USE)[1])
