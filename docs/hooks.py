"""Makes `benchmarks/RESULTS.md` and its pictures a part of the site, under the links that they have in the repository."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File


RESULTS = Path(__file__).resolve().parents[1] / "benchmarks"


def on_files(files, config):
    for path in (RESULTS / "RESULTS.md", *sorted(RESULTS.glob("*.png"))):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The folder lies beside `docs` in the repository, and in it on the site: one step up less."""
    return re.sub(r"\]\(\.\./((?:\.\./)*benchmarks/)", r"](\1", markdown)
