"""Pages in a headless Chromium: a script uses the page in a frame and gives back what it found."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
    "--virtual-time-budget=60000",
]

HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe><script>
addEventListener("load", async () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, inside = frame.contentWindow;
  let found;
  try {{ found = await (async () => {{ {script} }})(); }} catch (error) {{ found = {{ error: String(error) }}; }}
  document.body.textContent = "FOUND" + JSON.stringify(found) + "DNUOF";
}});
</script></body>"""


def visit(
    page: str, folder: Path, width: int, script: str, dark: bool = False, inject: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Open a page in a frame and run a script on it.

    Args:
        page: HTML of the page.
        folder: folder for the browser's files.
        width: width of the frame in CSS pixels.
        script: body of an async JavaScript function of `page` (document), `inside` (window) and `width`, which returns
            what it found.
        dark: whether the page is to be dark.
        inject: JavaScript put into the page before its own.

    Returns:
        What the script found, and every line the page wrote to the console.
    """
    page = page.replace("</head>", f"<script>{inject}</script></head>", 1) if inject else page
    harness = folder / "harness.html"
    script = f"const width = {width}; {script}"
    harness.write_text(HARNESS.format(page=html.escape(page, quote=True), width=width, script=script), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(CHROMIUM), *FLAGS, scheme, f"--user-data-dir={folder / 'profile'}", "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    answer = re.search(r"FOUND(.*)DNUOF</body>", done.stdout, re.DOTALL)
    assert answer, f"{done.stdout[:500]}\n{done.stderr[-2000:]}"
    found = json.loads(html.unescape(answer[1]))
    assert "error" not in found, found["error"]
    return found, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
