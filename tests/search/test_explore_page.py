"""`bestrq2 explore` as a browser and other programs of this machine meet it; skipped without gradio."""

from __future__ import annotations

import asyncio
import csv
import http.client
import importlib.util
import json
import shutil
import socket
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from devtools import browser_tab

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed"),
]
SHOWN = "[...document.querySelectorAll('.sounds')].filter((list) => list.offsetParent)"


@pytest.fixture
def port(start_cli, corpus, model) -> int:
    """Port of the page of ten recordings in two folders; Ctrl-C ends it in the end."""
    child = start_cli(["explore", corpus / "clips.parquet", "--model", model, "--port", "0", "--device", "cpu"])
    end = time.monotonic() + 300
    while "http://" not in child.stdout:
        assert child.poll() is None, child.stderr
        assert time.monotonic() < end, child.stderr
        time.sleep(0.2)
    return int(child.stdout.split()[0].rpartition(":")[2])


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_nothing_but_recordings_of_the_table_is_served(port, corpus, tmp_path):
    status, content = get(port, "/sounds/0")
    assert status == 200
    assert content.startswith(b"RIFF")
    secret = corpus / "sounds" / "a" / "secret.txt"
    secret.write_text("classified")
    try:
        for path in ("/etc/passwd", secret, corpus / "sounds" / "a" / "0.wav", corpus / "clips.parquet", "http://x/y"):
            for route in (
                "/gradio_api/file=",
                "/gradio_api/file/",
                "/file=",
                "/gradio_api/proxy=",
                "/sounds/",
                "/static/",
            ):
                status, content = get(port, route + quote(str(path)))
                assert status in (400, 403, 404, 422), f"{route}{path}: {status}"
                assert b"classified" not in content
                assert b"root:" not in content
    finally:
        secret.unlink()
    assert get(port, "/sounds/10")[0] == get(port, "/sounds/-1")[0] == 404
    # A site whose name leads to this machine is another host; other addresses of this machine are not listened at.
    assert get(port, "/sounds/0", Host="example.com")[0] == 400
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))


def test_a_search_takes_no_file_that_was_not_uploaded(port):
    config = json.loads(get(port, "/config")[1])
    audio = next(one["id"] for one in config["components"] if one["type"] == "audio")
    search = next(one["id"] for one in config["dependencies"] if one["inputs"] == [audio])
    for path in ("/etc/passwd", str(Path(__file__))):
        data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}], "fn_index": search, "session_hash": "s"}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/gradio_api/queue/join", json.dumps(data), {"Content-Type": "application/json"})
        assert connection.getresponse().status == 200
        events = get(port, "/gradio_api/queue/data?session_hash=s")[1].decode()
        assert '"process_completed"' in events
        assert '"success":false' in events.replace(" ", "")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_regions_are_heard_searched_and_exported_in_a_browser(port, corpus, tmp_path):
    asyncio.run(use(port, corpus, tmp_path))
    rows = list(csv.DictReader((tmp_path / "downloads" / "selection.csv").open()))
    assert {row["label"] for row in rows} == {"a", "mine"}
    assert len(rows) == 10
    assert {row["path"] for row in rows} == {str(path) for path in corpus.glob("sounds/*/*.wav")}


async def use(port: int, corpus: Path, folder: Path) -> None:
    async with browser_tab(str(CHROMIUM), folder / "profile") as tab:
        await tab.send("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=2, mobile=True)
        await tab.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder / "downloads"))
        await tab.send("Page.navigate", url=f"http://127.0.0.1:{port}/")
        await tab.until("document.querySelectorAll('.legend button').length == 2")
        assert await tab.value("document.documentElement.scrollWidth") <= 400
        await tab.send("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)
        # The map is drawn anew once the page has its new width.
        await tab.until(
            "(() => { const map = document.querySelector('canvas');"
            " return Math.abs(map.width - map.getBoundingClientRect().width) < 4; })()"
        )
        await select_and_export(tab, folder / "downloads" / "selection.csv")
        await click(tab, "Near-duplicates", "button[role=tab]")
        await click(tab, "Find near-duplicates")
        await tab.until("document.body.innerText.includes('No two recordings')")
        await click(tab, "Outliers", "button[role=tab]")
        await click(tab, "Find outliers")
        await tab.until(f"{SHOWN}.some((list) => list.querySelectorAll('li').length == 10)")
        await click(tab, "Similar", "button[role=tab]")
        await tab.until("document.querySelector('.explore-sound input[type=file]') != null")
        await tab.choose_file(".explore-sound input[type=file]", corpus / "sounds" / "b" / "3.wav")
        await tab.until(f"{SHOWN}.some((list) => list.innerText.includes('Nearest to your sound'))")
        assert await tab.value(f"{SHOWN}[0].querySelector('.name').innerText.split('\\n')[0]") == "3.wav"
        asked = [one["params"]["request"]["url"] for one in tab.events if one["method"] == "Network.requestWillBeSent"]
        assert len(asked) > 20
        assert not [one for one in asked if not one.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))]
        assert not [one for one in tab.events if one["method"] == "Runtime.exceptionThrown"]


async def select_and_export(tab, file: Path) -> None:
    """Draw around everything, hear one, add all by folder; then give one folder a label of its own, and download."""
    left, top, width, height = await tab.value(
        "(() => { const box = document.querySelector('canvas').getBoundingClientRect();"
        " return [box.left, box.top, box.width, box.height]; })()"
    )
    corners = [(0.005, 0.005), (0.995, 0.005), (0.995, 0.995), (0.005, 0.995)]
    await tab.drag([(left + x * width, top + y * height) for x, y in corners])
    await tab.until(f"{SHOWN}.some((list) => list.innerText.includes('10 recordings'))")
    await tab.value("document.querySelector('[data-play]').click()")
    assert await tab.until("document.querySelector('.player audio').duration") > 0.9
    await tab.value("[...document.querySelectorAll('button')].find((one) => /^Label and/.test(one.innerText)).click()")
    await click(tab, "Add the selection")
    await tab.until("document.body.innerText.includes('10 recordings: a 5, b 5')")
    await tab.value("document.querySelectorAll('.legend button')[1].click()")
    await tab.until(f"{SHOWN}.some((list) => list.innerText.includes('5 recordings'))")
    await tab.value("document.querySelector('textarea[placeholder^=empty]').focus()")
    await tab.send("Input.insertText", text="mine")
    await click(tab, "Add the selection")
    await tab.until("document.body.innerText.includes('10 recordings: a 5, mine 5')")
    await click(tab, "Download CSV")
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        await asyncio.sleep(0.1)


async def click(tab, text: str, selector: str = "button") -> None:
    """Click the visible element with a text as soon as there is one."""
    await tab.until(
        f"(() => {{ const found = [...document.querySelectorAll({selector!r})].find((one) =>"
        f" one.offsetParent && one.innerText.trim() === {text!r}); found?.click(); return found != null; }})()"
    )
