"""A headless Chromium driven over its DevTools protocol: real clicks, drags and file choices on a served page."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-port=0",
    "--autoplay-policy=no-user-gesture-required", "about:blank",
]  # fmt: skip


class Tab:
    """A tab of the browser; `events` are the messages that it sent by itself."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.events: list[dict[str, Any]] = []

    async def listen(self) -> None:
        async for message in self._socket:
            content = json.loads(message.data)
            if "id" in content:
                self._waiting.pop(content["id"]).set_result(content)
            else:
                self.events.append(content)

    async def send(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        answer = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        content = await asyncio.wait_for(answer, 60)
        assert "error" not in content, content
        return content["result"]

    async def value(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        found = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 120) -> Any:
        """Value of an expression as soon as it is true; while it fails it is false."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = await self.send("Runtime.evaluate", expression=expression, returnByValue=True)
            if found["result"].get("value"):
                return found["result"]["value"]
            await asyncio.sleep(0.1)
        shown = await self.value("document.body.innerText")
        raise AssertionError(f"not within {seconds} s: {expression}\n{shown}")

    async def drag(self, points: Sequence[tuple[float, float]]) -> None:
        """Press the mouse at the first point, move it through the others, release it."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    async def choose_file(self, selector: str, file: Path) -> None:
        document = await self.send("DOM.getDocument", depth=0)
        node = await self.send("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.send("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(file)])


@asynccontextmanager
async def browser_tab(chromium: str, folder: Path) -> AsyncIterator[Tab]:
    """A tab of a fresh browser that keeps its files in a folder."""
    process = subprocess.Popen(
        [chromium, *FLAGS[:-1], f"--user-data-dir={folder}", FLAGS[-1]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        file, end = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (file.exists() and len(file.read_text().split()) == 2):
            assert time.monotonic() < end, "Chromium does not start"
            await asyncio.sleep(0.1)
        port = file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                address = next(one["webSocketDebuggerUrl"] for one in await answer.json() if one["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                tab = Tab(socket)
                listening = asyncio.create_task(tab.listen())
                for domain in ("Page", "Runtime", "Network", "DOM"):
                    await tab.send(f"{domain}.enable")
                yield tab
                listening.cancel()
    finally:
        process.terminate()
        process.wait(30)
