"""Pages in headless Chromium: what scripts find in them, what they log, and how they look."""

import http.server
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import unescape
from pathlib import Path
from threading import Thread
from typing import Any

from conftest import require

# A frame of a phone's or a desk's width around a page of the same host, and what a script finds in it.
FRAME = """<!doctype html><link rel="icon" href="data:,"><style>body{{margin:0}}iframe{{border:0;display:block}}</style>
<iframe width="{width}" height="900"></iframe><pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
const scrolls = (page, e) => ["auto", "scroll"].includes(page.getComputedStyle(e).overflowX);
frame.onload = async () => {{
  const page = frame.contentWindow, root = page.document.documentElement, errors = [];
  let found = null;
  try {{
    found = await (async (page, document) => {{ {script} }})(page, page.document);
  }} catch (error) {{
    errors.push(String(error));
  }}
  const inScroll = e => e.parentElement && (scrolls(page, e.parentElement) || inScroll(e.parentElement));
  const right = e => e.getClientRects().length ? e.getBoundingClientRect().right : 0;
  const cut = [...page.document.body.querySelectorAll("*")].filter(e => right(e) > {width} + 1 && !inScroll(e));
  const report = {{ found, errors, cut: cut.map(e => e.outerHTML.slice(0, 80)), wide: root.scrollWidth }};
  document.getElementById("found").textContent = JSON.stringify(report);
}};
frame.src = "{page}";
</script>"""


def chromium() -> str:
    """Its path; without it the test is skipped."""
    path = shutil.which("chromium")
    require("chromium", path is not None, "no chromium: apt-get install chromium")
    assert path is not None
    return path


def run(*arguments: str) -> tuple[str, list[str]]:
    """Standard output, and what pages logged to the console."""
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
    command = [chromium(), *quiet, "--enable-logging=stderr", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of ``folder``."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def inspect(page: Path, width: int, script: str, *, wait_ms: int = 10000, dark: bool = False) -> Any:
    """What ``script``, a function body of ``page`` (window) and ``document``, returns in a page ``width`` wide.

    Asserts that nothing is logged or thrown, and that nothing but what scrolls by itself goes over the right edge.
    """
    harness = page.parent / f"frame_{width}.html"
    harness.write_text(FRAME.format(width=width, script=script, page=page.name), encoding="utf-8")
    with served(page.parent) as address:
        url = f"{address}/{harness.name}"
        theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        dom, console = run("--window-size=1500,1000", theme, f"--virtual-time-budget={wait_ms}", "--dump-dom", url)
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert match, dom[:2000]
    assert match[1], (console, dom[:2000])
    report = json.loads(unescape(match[1]))
    wrong = {"console": console, "errors": report["errors"], "cut": report["cut"]}
    assert not any(wrong.values()), wrong
    assert report["wide"] <= width, report["wide"]
    return report["found"]
