"""Local page of an embedded corpus in gradio, and its server.

gradio takes sounds from the browser and updates the page; `page.js` draws the map and plays. Recordings are no files
to gradio: `/sounds/ROW` decodes what the table names, and gradio's own routes for files reach nothing but the uploads
and selections of this run.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from numpy.typing import NDArray
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware

from bestrq2.errors import BestRQ2Error, ConfigError
from bestrq2.search.explorer import Explorer
from bestrq2.text import counted

# What the page may load and connect to: this server, and nothing else.
_CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_LOOPBACK = ("127.0.0.1", "localhost")
_THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
_MAP = """<div class="frame"><canvas role="img" aria-label="Map of the recordings"></canvas><p class="tip" hidden></p>
</div>
<p class="hint">Click a point to hear it and to see what is like it. Draw around points, or choose a colour, to select
them.</p>
<div class="view"><button data-view="zoom">Zoom to selection</button><button data-view="whole">Whole map</button
><button data-view="none">Select none</button></div><div class="legend"></div>
<div class="player" role="region" aria-label="Player" hidden><span class="now" aria-live="polite"></span
><audio controls></audio><button class="next">Next</button><button class="close">Close</button></div>"""


def page(explorer: Explorer, folder: Path) -> gr.Blocks:
    """The page in gradio.

    Args:
        explorer: what it shows.
        folder: folder for exported selections.
    """
    table, colourings = explorer.table, list(explorer.colourings)
    with gr.Blocks(title=f"{table.path.name} · bestrq2", analytics_enabled=False) as blocks:
        size = f"{counted(len(table), 'recording')}, {float(table.seconds.sum()) / 3600:.1f} h"
        gr.HTML(
            f'<div class="explore-head"><h1>{escape(table.path.name)}</h1><p>{size}, embedded by {escape(table.model)}.'
            f" Map: {explorer.method}.</p></div>"
        )
        rows, labelled = gr.State(np.empty(0, np.int64)), gr.State({})
        with gr.Row():
            with gr.Column(scale=3, min_width=320, elem_classes="explore-left"):
                colouring = gr.Radio(colourings, value=colourings[0], label="Colour by")
                plot = gr.HTML(
                    explorer.map(colourings[0]), elem_classes="explore-map", apply_default_css=False,
                    html_template=_MAP, js_on_load=(resources.files(__package__) / "page.js").read_text("utf-8"),
                )  # fmt: skip
            with gr.Column(scale=2, min_width=320), gr.Tabs() as tabs:
                with gr.Tab("Selection", id="selection"):
                    _export(explorer, folder, rows, labelled, colouring)
                    selection = _listing(explorer.selection(np.empty(0, np.int64)))
                with gr.Tab("Similar", id="similar"):
                    sound = gr.Audio(
                        sources=["upload", "microphone"], type="filepath", label="Search by a sound", buttons=[],
                        elem_classes="explore-sound",
                    )  # fmt: skip
                    similar = _listing("<p>Drop, choose or record a sound, or click a point of the map.</p>")
                with gr.Tab("Near-duplicates", id="duplicates"):
                    threshold = gr.Slider(0.9, 1, 0.998, step=0.001, label="Least similarity")
                    find_duplicates, duplicates = gr.Button("Find near-duplicates"), _listing()
                with gr.Tab("Outliers", id="outliers"):
                    find_outliers, outliers = gr.Button("Find outliers"), _listing()

        def select(event: gr.EventData) -> Any:
            found = explorer.selected(event.rows)
            return found, explorer.selection(found), gr.Tabs(selected="selection")

        def like(event: gr.EventData) -> Any:
            return _shown(explorer.like, int(event.row)), gr.Tabs(selected="similar")

        def nearest(path: str | None) -> Any:
            return _shown(explorer.nearest, path) if path else gr.skip()

        colouring.change(explorer.map, colouring, plot, **_PRIVATE)
        # By default gradio drops events while it answers one of the same kind: lists would lag behind the map.
        plot.select(select, None, [rows, selection, tabs], trigger_mode="always_last", **_PRIVATE)
        plot.like(like, None, [similar, tabs], trigger_mode="always_last", **_PRIVATE)
        sound.change(nearest, sound, similar, **_PRIVATE)
        find_duplicates.click(lambda least: _shown(explorer.near_duplicates, least), threshold, duplicates, **_PRIVATE)
        find_outliers.click(lambda: _shown(explorer.outliers), None, outliers, **_PRIVATE)
    return blocks


def _listing(html: str = "") -> gr.HTML:
    return gr.HTML(html, apply_default_css=False)


def _shown(make: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a function, or its error, which the page then shows."""
    try:
        return make(*arguments)
    except BestRQ2Error as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def _export(explorer: Explorer, folder: Path, rows: Any, labelled: Any, colouring: Any) -> None:
    """Controls that collect selections with labels, and give them as a CSV file."""
    with gr.Accordion("Label and export the selection", open=False):
        label = gr.Textbox(label="Label", placeholder="empty: the group that gives each recording its colour")
        with gr.Row():
            add, clear = gr.Button("Add the selection"), gr.Button("Start again")
        table = gr.Markdown("No recordings yet.")
        download = gr.DownloadButton("Download CSV", interactive=False)

    def added(chosen: NDArray[np.int64], held: dict[int, str], name: str, colours: str) -> Any:
        held = held | _shown(explorer.labelled, chosen, name, colours)
        file = Path(tempfile.mkdtemp(dir=folder)) / "selection.csv"
        _shown(explorer.table.write_selection, file, list(held), list(held.values()))
        counts = ", ".join(f"{one} {number:,}" for one, number in Counter(held.values()).most_common(12))
        size = counted(len(held), "recording")
        return held, f"{size}: {counts}", gr.DownloadButton(value=str(file), interactive=True)

    def cleared() -> Any:
        return {}, "No recordings yet.", gr.DownloadButton(interactive=False)

    add.click(added, [rows, labelled, label, colouring], [labelled, table, download], **_PRIVATE)
    clear.click(cleared, None, [labelled, table, download], **_PRIVATE)


def application(explorer: Explorer, folder: Path, host: str) -> FastAPI:
    """The page and the sounds as a web application.

    Args:
        explorer: what the page shows.
        folder: folder for uploads and exported selections.
        host: address that it will be served at.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read by gradio's components when they are made
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/sounds/{row}")
    def sound(row: int, start: float = 0.0) -> Response:
        return Response(explorer.sound(row, start), media_type="audio/wav")

    @app.get("/sounds/{row}/name")
    def name(row: int) -> Response:
        return JSONResponse({"title": explorer.title(row)})

    @app.exception_handler(BestRQ2Error)
    def refused(request: Request, error: BestRQ2Error) -> Response:
        return PlainTextResponse(str(error), status_code=404)

    app.add_middleware(_Sealed)
    if host in _LOOPBACK:  # a site whose name leads to this machine must not read from it
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(_LOOPBACK))
    gr.mount_gradio_app(
        app, page(explorer, folder), "/", server_name=host, footer_links=[], run_history=False, ssr_mode=False,
        css=(resources.files(__package__) / "page.css").read_text("utf-8"), theme=_THEME,
        show_error=True,
    )  # fmt: skip
    return app


class _Sealed:
    """Middleware that refuses URLs in paths, which gradio would fetch, and lets the page load nothing else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request (ASGI)."""

        async def sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _CONTENT_POLICY
            await send(message)

        refused = scope["type"] == "http" and "://" in scope["path"]
        answer = PlainTextResponse("URLs are not fetched", status_code=404) if refused else self.app
        await answer(scope, receive, sealed)


def serve(explorer: Explorer, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        explorer: what the page shows.
        listener: socket of `listening`.
        ready: called with the URL of the page when it can be opened.
    """
    host, port = listener.getsockname()[:2]
    with tempfile.TemporaryDirectory(prefix="bestrq2-explore-") as folder:
        app = application(explorer, Path(folder).resolve(), host)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        # In a thread, so that signals come to this one, and a notebook's event loop does not matter.
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        ready(f"http://{host}:{port}")
        try:
            while thread.is_alive():
                thread.join(1)
        finally:
            server.should_exit = True
            thread.join(5)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Args:
        host: name or number of the address.
        port: port to listen at; 0 for any that is free.

    Raises:
        ConfigError: the address or port cannot be used.
    """
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen at {host}:{port} ({error}); choose another --port or --host") from error
