"""The Python code of docs/decoding.md runs, block after block, as printed."""

from __future__ import annotations

import re
from pathlib import Path


def test_decoding_page():
    page = Path(__file__).resolve().parents[2] / "docs" / "decoding.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(names["answers"].texts) == 1
    assert names["batch"].steps[0, :6].tolist() == sorted(names["batch"].steps[0, :6].tolist(), reverse=True)
