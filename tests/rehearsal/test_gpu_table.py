"""`benchmarks/gpu.py` fills its table on a CPU, with tiny shapes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import torch


FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_table_on_a_cpu(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    words = ["--device", "cpu", "--tiny", "--json", "--only", "gap", "checkpointing", "layers"]
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "gpu.py"), *words])
    with torch.random.fork_rng():
        runpy.run_path(sys.argv[0], run_name="__main__")
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["sections"]
    rows = {(name, row) for name, section in found.items() for row in section["rows"]}
    assert not [section for section in found.values() if any("error" in row for row in section["rows"].values())]
    exact, rounded = (found["gap"]["rows"][f"{dtype}, sdpa"] for dtype in ("float32", "bfloat16"))
    assert exact["mean"] < 1e-4 * abs(exact["mean_logp"]) and exact["mean"] < rounded["mean"] < 0.1
    for name in ("LoRA", "every weight"):
        assert {("checkpointing", f"{name}, checkpointing {state}") for state in ("on", "off")} <= rows
    for count in (1, 2):
        assert {("layers", f"{count} layers, {what}") for what in ("update", "decoding a response")} <= rows
    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len([row for _, row in rows if "first call" not in row])
