"""The plan beside the memory that real training steps take, as benchmarks/plan_memory.py measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux")
def test_plan_is_near_what_a_step_takes():
    """Within a quarter on a small model, where what is not the model's weighs most; the benchmark has larger ones."""
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_memory.py"), "--only", "three layers, few rows"]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    (case,) = json.loads(result.stdout.splitlines()[-1])["cases"]
    assert 150 < case["measured_mib"] < 800
    assert 0.75 < case["ratio"] < 1.25
