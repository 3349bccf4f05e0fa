"""Pages for keyboards and screen readers: the rules of axe-core, in Chromium; skipped where either is missing."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_classifier_report
from chromium import CHROMIUM, visit
from example_runs import together, write_run

from bestrq2.model.configuration_bestrq2 import BestRQ2Config
from bestrq2.report.page import ReportContents, render

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
AXE = "axe-core@4.14.1"

AUDIT = """
for (const details of page.querySelectorAll("details")) details.open = true;
const result = await inside.axe.run(page, { resultTypes: ["violations"] });
const serious = result.violations.filter((one) => one.impact === "serious" || one.impact === "critical");
return {
  dark: inside.matchMedia("(prefers-color-scheme: dark)").matches,
  passes: result.passes.length,
  serious: serious.map((one) => [one.id, one.help, one.nodes.map((node) => node.html.slice(0, 200))]),
};
"""
KEYBOARD = """
const stops = [...page.querySelectorAll("a[href], button, select, summary, audio, [tabindex='0']")];
const visible = stops.filter((element) => element.checkVisibility());
const curve = page.querySelector(".curve .area"), read = () => curve.getAttribute("aria-valuetext");
curve.focus();
const readings = [read()];
for (const key of ["Home", "ArrowRight", "End"]) {
  curve.dispatchEvent(new inside.KeyboardEvent("keydown", { key, bubbles: true }));
  readings.push(read());
}
const [skip] = stops;
return { stops: visible.length, first: skip.textContent, target: page.querySelector(skip.hash).tagName, readings };
"""

MAP = """
const played = [], list = page.querySelector("#map svg"), audio = page.querySelector("#map audio");
audio.play = () => played.push(audio.src.slice(0, 15));
const named = () => page.getElementById(list.getAttribute("aria-activedescendant"))?.getAttribute("aria-label");
const press = (key) => list.dispatchEvent(new inside.KeyboardEvent("keydown", { key, bubbles: true }));
const names = [];
for (const key of ["End", "Home", "ArrowRight", "ArrowLeft", "ArrowDown"]) { press(key); names.push(named()); }
press("Enter");
const point = page.getElementById("point-3"), box = point.getBoundingClientRect();
const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
point.dispatchEvent(new inside.PointerEvent("click", { bubbles: true, ...at }));
return { roles: [list.getAttribute("role"), point.getAttribute("role")], tabs: list.tabIndex, names, played,
         clicked: named(), heard: page.querySelector(".playing-now").textContent };
"""


@pytest.fixture(scope="session")
def axe() -> str:
    """Source of axe-core, fetched once by npm into the temporary folder of this machine."""
    folder = Path(tempfile.gettempdir()) / f"bestrq2-{AXE.replace('@', '-')}"
    script = folder / "package" / "axe.min.js"
    if not script.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed")
        folder.mkdir(exist_ok=True)
        fetched = subprocess.run([npm, "pack", AXE], cwd=folder, capture_output=True, timeout=120, check=False)
        if fetched.returncode:
            pytest.skip(f"npm cannot fetch {AXE}")
        with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    return script.read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["report", "comparison", "xares", "classifier", "classifier of several"])
def example_page(
    request: pytest.FixtureRequest,
    contents: ReportContents,
    tiny_config: Callable[..., BestRQ2Config],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    folder = tmp_path_factory.mktemp("runs")
    if request.param == "comparison":
        return together(*(write_run(folder / f"{seed}", seed=seed, quality=1 + seed) for seed in range(2))).html()
    if request.param.startswith("classifier"):
        several = request.param.endswith("several")
        return test_classifier_report.report(
            folder, tiny_config, *test_classifier_report.drawn(30, 4, several), several
        )
    return render(contents if request.param == "report" else ReportContents("t", "l", xares=contents.xares))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_axe_finds_nothing_serious(example_page: str, axe: str, tmp_path: Path, width: int, dark: bool) -> None:
    found, _ = visit(example_page, tmp_path, width, AUDIT, dark, inject=axe)
    assert found["dark"] == dark
    assert found["passes"] > 20
    assert found["serious"] == []


def test_axe_would_notice_grey_text_on_grey(axe: str, tmp_path: Path) -> None:
    page = render(ReportContents("t", "l")).replace("</main>", '<p style="color:#888;background:#777">grey</p></main>')
    found, _ = visit(page, tmp_path, 1400, AUDIT, inject=axe)
    assert [rule for rule, *_ in found["serious"]] == ["color-contrast"]


def test_keyboard_reads_curves_and_skips_bars(contents: ReportContents, tmp_path: Path) -> None:
    page = render(replace(contents, clips=[]))
    found, _ = visit(page, tmp_path, 1400, KEYBOARD)
    assert found["stops"] < 40
    assert (found["first"], found["target"]) == ("Skip to the content", "MAIN")
    last, first, next_, again = found["readings"]
    assert first.startswith("step 5; two steps, training ")
    assert again == last != next_ != first


def test_points_of_the_map_are_reached_by_arrow_keys_and_played(contents: ReportContents, tmp_path: Path) -> None:
    clips = [
        replace(clip, vector=np.eye(3)[number % 3] + number, name=f"{number}.wav", domain="cats", task="")
        for number, clip in enumerate(contents.clips[:12])
    ]
    found, console = visit(render(ReportContents("t", "l", clips=clips)), tmp_path, 1400, MAP)
    assert console == []
    assert (found["roles"], found["tabs"]) == (["listbox", "option"], 0)
    last, first, right, *_ = found["names"]
    assert (last, first) == ("11.wav, cats", "0.wav, cats")
    assert right != first
    assert found["played"] == ["data:audio/mpeg"] * 2
    assert (found["clicked"], found["heard"]) == ("3.wav, cats", "♪ 3.wav, cats")
