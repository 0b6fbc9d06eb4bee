"""The Hugging Face style of this package's docstrings, in the words that mkdocstrings reads."""

from __future__ import annotations

import re
from pathlib import Path

import griffe


PAGES = "".join(path.read_text() for path in sorted((Path(__file__).parent / "api").glob("*.md")))
DOCUMENTED = {name.rsplit(".", 1)[-1]: name for name in re.findall(r"^::: ([\w.]+)$", PAGES, re.MULTILINE)}
# Packages with pages of their own. `hooks.py` has the addresses. A name that has none there is an error of the build.
ELSEWHERE = ("accelerate.", "datasets.", "peft.", "transformers.", "trl.")


def link(match: re.Match) -> str:
    """[`Name`] as a link if the API pages have it or another project documents it, and as code otherwise."""
    name = match.group(1).removeprefix("~")
    if name.startswith(ELSEWHERE):
        return f"[`{name}`][{name}]"
    target = DOCUMENTED.get(name.rsplit(".", 1)[-1])
    return f"[`{name}`][{target}]" if target else f"`{name}`"


def item(match: re.Match) -> str:
    """The type of an argument without its markup, and without what the signature says already."""
    start, kind, rest = match.groups()
    kind = re.sub(r", \*optional\*.*$", "", kind)
    kind = re.sub(r"\[?`~?([^`]*)`\]?", r"\1", kind)
    kind = re.sub(
        r"of shape \((.*?)\)", r"of shape [\1]", kind
    )  # the reader of docstrings drops a closing parenthesis
    return f"{start}({kind}){rest}"


class HuggingFaceStyle(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is None:
            return
        text = re.sub(
            r"^( +[\w*, ]+ )\((.*(?:`|\*optional\*).*)\)(:.*)$", item, obj.docstring.value, flags=re.MULTILINE
        )
        text = re.sub(r"\[`([~\w.]+)`\]", link, text)
        text = re.sub(r"^( *)> \[!NOTE\]\n( *> )", r"\1\2", text, flags=re.MULTILINE)
        text = re.sub(r"^Parameters:$", "Args:", text, flags=re.MULTILINE)
        text = re.sub(r"^ +> Parameters that .*\n+", "", text, flags=re.MULTILINE)
        obj.docstring.value = text
