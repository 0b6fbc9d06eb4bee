"""A browser without a window: what a page looks like at some widths, in light and in dark."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from tests.processes import HANGS


# Of a page in a frame: text whose contrast is too low, and what is wider than the frame or than its own box.
MEASURE = """
function numbers(colour) {
  const parts = colour.match(/[\\d.]+/g).map(Number);
  return parts.length < 4 ? [...parts, 1] : parts;
}
function luminance(colour) {
  const [r, g, b] = numbers(colour).map(part => part / 255).map(
    part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function measure(frame) {
  const view = frame.contentWindow, page = view.document, found = {faint: [], wide: [], least: 21, texts: 0};
  for (const one of page.body.querySelectorAll("*")) {
    const box = one.getBoundingClientRect(), style = view.getComputedStyle(one);
    if (!one.checkVisibility() || one.closest("script, style")) continue;
    if (box.right > frame.clientWidth + 1 || box.left < -1) found.wide.push(one.outerHTML.slice(0, 120));
    if (style.display !== "inline" && one.scrollWidth > one.clientWidth + 1 && one.clientWidth)
      found.wide.push(one.outerHTML.slice(0, 120));
    if (![...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    let behind = one;
    while (behind && numbers(view.getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const pair = [style.color, behind ? view.getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)"];
    const [dark, light] = pair.map(luminance).sort((a, b) => a - b), contrast = (light + 0.05) / (dark + 0.05);
    found.texts += 1;
    found.least = Math.min(found.least, contrast);
    if (contrast < 4.5) found.faint.push([contrast, ...pair, one.outerHTML.slice(0, 120)]);
  }
  const root = page.documentElement;
  if (root.scrollWidth > root.clientWidth) found.wide.push(`the page: ${root.scrollWidth} of ${root.clientWidth} pixels`);
  found.background = view.getComputedStyle(page.body).backgroundColor;
  return found;
}
"""


def browse(folder: Path, pages: dict[str, str], script: str, dark: bool = False, widths=(1440, 390)) -> dict:
    """
    What a script finds on pages, each of which is shown at each width.

    Args:
        folder (`Path`): for files of the browser.
        pages (`dict[str, str]`): sources by name.
        script (`str`): body of a JavaScript function of `frame`, the frame of a page, that returns what it has found.
        dark (`bool`): whether the user prefers dark pages.
        widths: of the frames, in pixels.

    Returns:
        `dict` from `(name, width)` to what was found. The test is skipped where there is no Chromium.
    """
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium (in Debian: `apt-get install chromium`)")
    frames = "\n".join(
        f'<iframe name="{name}" width="{width}" height="844" srcdoc="{escape(source)}"></iframe>'
        for name, source in pages.items()
        for width in widths
    )
    wrapper = f"""<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">{frames}
<pre id="found"></pre><script>{MEASURE}
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    try {{ return (frame => {{ {script} }})(frame); }} catch (error) {{ return String(error.stack); }}
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}});</script>"""
    (folder / "wrapper.html").write_text(wrapper, encoding="utf-8")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={folder / 'profile'}", *(["--force-dark-mode"] if dark else []), "--dump-dom",
               (folder / "wrapper.html").as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True).stdout
    found = json.loads(unescape(shown.rpartition('<pre id="found">')[2].partition("</pre>")[0]))
    return dict(zip(((name, width) for name in pages for width in widths), found, strict=True))
