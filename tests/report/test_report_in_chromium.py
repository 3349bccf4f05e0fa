"""The page as a browser sees it, at phone and desktop width; skipped where there is no Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import example_report
import pytest
from example_runs import together, write_run

from bestrq2.report.page import ReportContents, render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=4000",
]

# Uses the page like a reader in a frame of a given width, then leaves only the findings.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, inside = frame.contentWindow;
  const tip = page.getElementById("tip"), found = {{ tips: [], legends: [] }};
  for (const details of page.querySelectorAll("details")) details.open = true;
  const area = page.querySelector(".curve .area");
  if (area) {{
    const box = area.getBoundingClientRect();
    area.dispatchEvent(new inside.PointerEvent("pointermove", {{ bubbles: true, clientX: box.left + box.width / 2 }}));
    found.tips.push(tip.innerText);
    area.dispatchEvent(new inside.KeyboardEvent("keydown", {{ key: "ArrowRight" }}));
    found.tips.push(tip.innerText);
  }}
  for (const kind of ["rect.right", "rect.wrong", "rect.seen", ".point", ".track"]) {{
    const owner = page.querySelector(kind);
    if (!owner) continue;
    owner.dispatchEvent(new inside.PointerEvent("pointerdown", {{ bubbles: true, clientX: 360, clientY: 50 }}));
    found.tips.push(tip.innerText);
    const box = tip.getBoundingClientRect();
    found.tipInside = (found.tipInside ?? true) && box.left >= 0 && box.right <= inside.innerWidth;
  }}
  const choice = page.getElementById("map-colour");
  for (let index = 0; choice && index < choice.options.length; index++) {{
    choice.selectedIndex = index;
    choice.dispatchEvent(new inside.Event("change"));
    found.legends.push([...page.querySelectorAll("#map-legend button")].map((button) => button.innerText));
    page.querySelector("#map-legend button").click();
  }}
  found.scrollWidth = page.documentElement.scrollWidth;
  found.outside = [...page.body.querySelectorAll("*")].filter((element) => {{
    const box = element.getBoundingClientRect();
    const outside = box.width && (box.right > {width} + 0.5 || box.left < -0.5);
    return outside && !element.closest(".scroll table, svg");
  }}).map((element) => element.tagName + "." + element.className);
  const texts = [...page.body.querySelectorAll("p, span, td, dd, dt, button, small")];
  const sizes = texts.filter((element) => element.innerText.trim())
    .map((element) => parseFloat(inside.getComputedStyle(element).fontSize));
  found.smallest = Math.min(...sizes);
  document.body.textContent = "FOUND" + JSON.stringify(found) + "DNUOF";
}});
</script></body>"""


def visit(page: str, folder: Path, width: int) -> tuple[dict, list[str]]:
    """What the harness found, and every line the page wrote to the console."""
    harness = folder / "harness.html"
    harness.write_text(HARNESS.format(page=html.escape(page, quote=True), width=width), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    answer = re.search(r"FOUND(.*)DNUOF</body>", done.stdout, re.DOTALL)
    assert answer, f"{done.stdout[:500]}\n{done.stderr[-2000:]}"
    return json.loads(html.unescape(answer[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [375, 1280])
def test_page_works_without_console_errors_or_overflow(contents: ReportContents, tmp_path: Path, width: int) -> None:
    found, console = visit(render(contents), tmp_path, width)
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
    found, console = visit(together(*folders).html(), tmp_path, 375)
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
    found, console = visit(render(long), tmp_path, 375)
    assert console == []
    assert found["scrollWidth"] <= 375
    assert found["outside"] == []


def test_broken_script_would_be_noticed(tmp_path: Path) -> None:
    page = render(ReportContents("t", "l")).replace("</body>", "<script>missing.call()</script></body>")
    assert any("missing" in line for line in visit(page, tmp_path, 375)[1])
