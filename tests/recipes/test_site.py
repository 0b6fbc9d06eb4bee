"""The documentation as a site: it is built, leads on, is found by its search, and can be read at any width, in light and dark."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import struct
from pathlib import Path

import pytest

import trl_diffusion
from tests.chromium import CHROMIUM, measure


pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (1440, 390)
PIXELS_PER_INCH = 80  # of a picture in the column: letters of 8 points are then 9 pixels high


@pytest.fixture(scope="session")
def site(made_once) -> Path:
    """The site. Formulas are typeset where KaTeX is installed, as `make docs` does."""
    return made_once("site", lambda directory: build_into(directory / "pages")) / "pages"


def build_into(folder: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCS_PLAIN_FORMULAS", "" if typeset() else "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)


def typeset() -> bool:
    return (ROOT / "docs" / "node_modules").is_dir() and shutil.which("node") is not None


def pages_of(site: Path) -> list[str]:
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))


@pytest.mark.slow
def test_the_site_is_built(site):
    """
    Nothing is missing in the navigation, no link or anchor leads nowhere, every public name is on a page, and formulas are
    typeset.
    """
    api = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    assert all(f'id="trl_diffusion.{name}"' in api for name in trl_diffusion.__all__)
    method = (site / "method.html").read_text()
    assert method.count('class="arithmatex">') > 50
    assert method.count('class="arithmatex"><span class="katex') == (
        method.count('class="arithmatex">') if typeset() else 0
    )
    outside = re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"https?://", api + method)
    assert not outside  # nothing is loaded from elsewhere


@pytest.mark.slow
def test_pages_lead_on(site):
    """To the next and the previous page, to the pages of TRL for what is inherited from it, and to the repository."""
    texts = {name: (site / name).read_text() for name in pages_of(site) if name != "404.html"}
    following = [name for name, text in texts.items() if "md-footer__link--next" in text]
    previous = [name for name, text in texts.items() if "md-footer__link--prev" in text]
    assert set(texts) - set(following) == {"contributing.html"} and set(texts) - set(previous) == {"index.html"}

    trl = "https://huggingface.co/docs/trl/grpo_trainer"
    bases = re.findall(r"Bases: .*?</p>", texts["api/training.html"], re.DOTALL)  # the title of a link may have lines
    assert any(f'href="{trl}#trl.GRPOTrainer"' in line for line in bases)
    assert any(f'href="{trl}#trl.GRPOConfig"' in line for line in bases)

    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    assert hooks["repository"]({"urls": {"Documentation": "https://a", "Repository": "https://b"}}) == "https://b"
    assert hooks["repository"]({}) is None
    url = hooks["repository"](hooks["tomllib"].loads((ROOT / "pyproject.toml").read_text())["project"])
    assert all(("md-header__source" in text) == (url is not None) for text in texts.values())
    link = rf'<a href="{url}"[^>]*class="md-source">.*?Repository\s*</div>'
    assert url is None or all(re.search(link, text, re.DOTALL) for text in texts.values())
    assert not any('data-md-component="source"' in text for text in texts.values())  # which fetches from its host


def test_a_picture_leads_to_itself_unless_it_leads_elsewhere():
    link = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_content"]
    badge = '<a href="b"><img alt="" src="c.svg"></a>'
    versions = '<picture><source srcset="d.svg"><img src="e.png"></picture>'
    assert link(f'{badge}<img alt="f" src="g.png">{versions}', None, None, None) == (
        f'{badge}<a class="picture" href="g.png"><img alt="f" src="g.png"></a>{versions}'
    )


@pytest.mark.slow
def test_notebooks_are_pages(site):
    """With their outputs and pictures, and the notebook itself."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{path.stem}.html").read_text()
        cells = json.loads(path.read_text())["cells"]
        assert f'href="{path.name}"' in page and (site / "notebooks" / path.name).read_bytes() == path.read_bytes()
        pictures = sum("image/png" in out.get("data", {}) for cell in cells for out in cell.get("outputs", ()))
        assert pictures >= 2
        stored = list((site / "notebooks").glob(f"{path.stem}_*.png"))
        assert page.count(f'src="{path.stem}_') == pictures == len(stored)
        printed = sum(any("text" in out for out in cell.get("outputs", ())) for cell in cells)
        assert page.count('class="output highlight"') == printed > 2


@pytest.mark.slow
def test_search_knows_names_without_what_is_before_them(site):
    """Names of metrics are words of the index, without their groups. So are those of classes, without their modules."""
    index = json.loads((site / "search" / "search_index.json").read_text())

    def words(text: str) -> set[str]:
        return set(re.split(index["config"]["separator"], re.sub(r"<[^>]*>", " ", text)))

    found = {name: set() for name in ("effective_sample_size", "StepView", "num_draws", "0.5")}
    for entry in index["docs"]:
        for name in set(found) & words(entry["title"] + " " + entry["text"]):
            found[name].add(entry["location"].partition("#")[0])
    assert "metrics.html" in found["effective_sample_size"] and "metrics.html" in found["0.5"]
    assert "api/decoding.html" in found["StepView"] and "howto/grpo.html" in found["num_draws"]


@pytest.fixture(scope="session")
def measured(site, made_once) -> dict[tuple[str, int], dict]:
    """What Chromium finds on every page, at the width of a screen and of a phone."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian's package `chromium`)")
    jobs = [(page, width) for page in pages_of(site) for width in WIDTHS]
    jobs.append(("index.html?q=effective_sample_size", WIDTHS[0]))

    def look(directory: Path) -> None:
        found = measure(site, jobs, directory / "profile")
        (directory / "found.json").write_text(json.dumps(found))

    found = made_once("pages_in_chromium", look) / "found.json"
    return dict(zip(jobs, json.loads(found.read_text()), strict=True))


@pytest.mark.slow
def test_text_can_be_told_from_what_is_behind_it(measured):
    """All text has a contrast of at least 4.5 (WCAG 2.2, AA), in light and dark."""
    assert not {job: found for job, found in measured.items() if "error" in found}
    faint = {job: found["faint"] for job, found in measured.items() if any(found.get("faint", {}).values())}
    assert not faint


@pytest.mark.slow
def test_nothing_overflows(measured):
    """No page is wider than its window, and on a screen no code or table has to be scrolled sideways."""
    pages = {job: found for job, found in measured.items() if "wide" in found}
    assert len(pages) == len(measured) - 1 > 60
    assert not {job: found["wide"] for job, found in pages.items() if found["wide"]}
    assert not {job: found["cut"] for job, found in pages.items() if found["cut"]}
    assert not {job: found["scrolled"] for job, found in pages.items() if found["scrolled"] and job[1] == WIDTHS[0]}


def inches(picture: Path) -> float | None:
    """The width of a PNG with which it was drawn. `None` if the file does not say it."""
    data = picture.read_bytes()
    place = data.find(b"pHYs")
    if place < 0:
        return None
    (per_metre,) = struct.unpack(">I", data[place + 4 : place + 8])
    (width,) = struct.unpack(">I", data[16:20])
    return width / per_metre / 0.0254


@pytest.mark.slow
def test_pictures_can_be_read_in_the_column(site, measured):
    """Every picture is there, and is shown so large that its letters can be read."""
    shown = [(job[0], *picture) for job, found in measured.items() if job[1] == WIDTHS[0]
             for picture in found.get("pictures", ())]  # fmt: skip
    assert len(shown) > 8 and all(own > 0 and width > 0 for _, _, own, width in shown)
    small = {}
    for page, address, _, width in shown:
        drawn = inches((site / page).parent / address)
        if drawn is not None and width / drawn < PIXELS_PER_INCH:
            small[page, address] = width / drawn
    assert not small


@pytest.mark.slow
def test_search_finds_a_metric_by_its_last_word(measured):
    (found,) = (found["found"] for found in measured.values() if "found" in found)
    assert {"Metrics", "Estimator health"} <= set(found)  # the page, and its section
