"""Pages of a site in a real browser: headless Chromium, as Debian packages it. What measures is JavaScript."""

from __future__ import annotations

import functools
import http.server
import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
OPTIONS += ["--window-size=1600,1000", "--remote-debugging-port=0"]
OPTIONS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # nothing but this machine can be reached
MEASURES = Path(__file__).with_name("measures.js")
# Loads each page in a frame of its width, two at a time, and sends back what `measure` finds in it.
FRAMES = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><script src="/measures.js"></script><script>
const jobs = JOBS, results = [];
async function load([page, width], index) {
  const frame = document.createElement("iframe");
  frame.style = `border:0;width:${width}px;height:900px`;
  frame.src = page;
  const loaded = new Promise(resolve => frame.onload = resolve);
  document.body.append(frame);
  await loaded;
  try { results[index] = await measure(frame.contentWindow); }
  catch (error) { results[index] = {error: String(error && error.stack || error)}; }
  frame.remove();
}
async function work() { while (jobs.length) { const [index, job] = jobs.shift(); await load(job, index); } }
addEventListener("DOMContentLoaded", async () => {
  await Promise.all([work(), work()]);
  await fetch("/results", {method: "POST", body: JSON.stringify(results)});
});
</script><body style="margin:0">"""


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, the page of frames and what measures, and takes the results."""

    def __init__(self, *args: Any, frames: str, script: str, results: queue.Queue, **kwargs: Any):
        self.frames, self.script, self.results = frames, script, results
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        text = {"/frames": self.frames, "/measures.js": self.script}.get(self.path)
        if text is None:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path == "/frames" else "text/javascript")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self) -> None:
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


class Host(http.server.ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        """A browser that has seen enough breaks connections off."""


def measure(
    folder: Path, pages: Sequence[tuple[str, int]], profile: Path, script: str = "", dark: bool = False
) -> list[dict[str, Any]]:
    """
    Opens pages in Chromium and measures them with `tests/measures.js`.

    Args:
        folder (`Path`): what is served. Nothing else can be reached.
        pages (sequence of `(str, int)`): for each page, its address below `folder` and the width of its window in pixels.
        profile (`Path`): an empty folder for what Chromium writes.
        script (`str`, *optional*): JavaScript after `tests/measures.js`, which may define another function `measure`.
        dark (`bool`, *optional*, defaults to `False`): whether the user prefers dark pages.

    Returns:
        `list[dict[str, Any]]`: the measures of each page.

    Raises:
        RuntimeError: if Chromium ends.
    """
    assert CHROMIUM is not None
    results: queue.Queue = queue.Queue()
    jobs = json.dumps(list(enumerate((quote(page, safe="/?=#&%"), width) for page, width in pages)))
    frames = FRAMES.replace("JOBS", jobs)
    script = MEASURES.read_text(encoding="utf-8") + script
    handler = functools.partial(Server, directory=str(folder), frames=frames, script=script, results=results)
    with Host(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = [*OPTIONS, *(["--force-dark-mode"] if dark else []), f"--user-data-dir={profile}"]
        command = [CHROMIUM, *options, f"http://127.0.0.1:{server.server_port}/frames"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while browser.poll() is None:
                with suppress(queue.Empty):
                    return results.get(True, 1)
            raise RuntimeError(f"Chromium ended with code {browser.returncode} before it had measured anything.")
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
