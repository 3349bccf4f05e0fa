"""Tars of small recordings, and a web server on this machine that serves them, with failures on request."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import soundfile

RATE = 8_000


def clip(number: int) -> bytes:
    """A WAV of 0.3 s with a tone of its own under noise."""
    time = np.arange(round(0.3 * RATE)) / RATE
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    tone = 0.3 * np.sin(2 * np.pi * (200 + 7 * number) * time) + 0.05 * rng.standard_normal(len(time))
    soundfile.write(file, tone, RATE, format="WAV")
    return file.getvalue()


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar, by default uncompressed."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def shards(*sizes: int) -> dict[str, bytes]:
    """Tars 0.tar, 1.tar, ... with so many clips each, named by a number that is unique over all, and labels."""
    found, number = {}, 0
    for shard, size in enumerate(sizes):
        members = {}
        for _ in range(size):
            members[f"{number:03d}.wav"] = clip(number)
            members[f"{number:03d}.json"] = b'{"label": "tone"}'
            number += 1
        found[f"{shard}.tar"] = tar_of(members)
    return found


@dataclass
class Server:
    """What the server hands out and what was asked of it.

    Attributes:
        files: content of each path.
        breaks: bytes after which the connection breaks, one entry an answer, of each path.
        answers: status codes to give instead, one entry an answer, of each path.
        odd: functions that answer in place of the server, of each path.
        asked: the paths, in the order of the requests.
    """

    files: dict[str, bytes]
    breaks: dict[str, list[int]] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    odd: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/")
        self.asked.append(path)
        if path in self.odd:
            self.odd[path](request)
            return
        codes = self.answers.get(path, [])
        code = codes.pop(0) if codes else 200 if path in self.files else 404
        if code != 200:
            request.send_error(code)
            return
        content = self.files[path]
        cuts = self.breaks.get(path, [])
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[: cuts.pop(0)] if cuts else content)


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """A server on a free port of this machine, for the time of the block."""
    server = Server(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                server.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{web.server_port}"
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
