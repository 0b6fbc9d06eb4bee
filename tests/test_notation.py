"""Shapes in docstrings and comments use the letters of the table in docs/architecture.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "trl_diffusion").rglob("*.py"))
LETTER = re.compile(r"\b[A-Z]\b")
# A shape: names and sums, products and quotients of them, between brackets, with a comma.
SHAPE = re.compile(r"\(((?:[A-Za-z_0-9]+(?: [+*/] [A-Za-z_0-9]+)*, ?)+(?:[A-Za-z_0-9]+(?: [+*/] [A-Za-z_0-9]+)*)?)\)")


def table() -> dict[str, str]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Notation")[1]
    return dict(re.findall(r"^\| `([A-Z])` \| (.+) \|$", text.split("\n## ")[0], re.MULTILINE))


def shapes_of(text: str) -> list[str]:
    """The shapes between backticks, and in comments behind code."""
    places = re.findall(r"`([^`\n]*\([^`\n]*\)[^`\n]*)`|#(.*)$", text, re.MULTILINE)
    return [shape for place in places for part in place for shape in SHAPE.findall(part)]


def test_every_letter_has_one_meaning():
    meanings = table()
    assert set("RPCSBTKWMNVH") <= set(meanings) and len(set(meanings.values())) == len(meanings)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_use_the_letters_of_the_table(path):
    known = set(table())
    strange = {shape for shape in shapes_of(path.read_text(encoding="utf-8")) if set(LETTER.findall(shape)) - known}
    assert not strange


def test_shapes_are_found():
    text = 'x = f(A, B)  # (R, P + C)\n"""`Tensor` of shape `(R, S, T)`; `(Z,)`, `call(A)`, `(R, views)`"""'
    assert shapes_of(text) == ["R, P + C", "R, S, T", "Z,", "R, views"]
    found = {shape for path in FILES for shape in shapes_of(path.read_text(encoding="utf-8"))}
    assert {"R, C", "R, W, C", "R, S, T", "M, V"} <= found
