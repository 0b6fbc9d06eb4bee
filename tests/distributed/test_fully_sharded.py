"""FSDP2, of which accelerate runs none on a CPU: the policy alone, sharded by PyTorch."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launching import ROOT, launch


@pytest.mark.distributed
def test_rollouts_and_scores_on_a_policy_sharded_by_fsdp2(tmp_path):
    """Tokens, order and scores are those of the whole policy, and both processes run the same number of passes."""
    code, output = launch("ddp", tmp_path, ROOT / "tests" / "distributed" / "fully_sharded.py", str(tmp_path))
    assert code == 0, output[-3000:]
    first, second = (json.loads((tmp_path / f"sharded_{rank}.json").read_text()) for rank in (0, 1))
    for name in first:
        for found in (first[name], second[name]):
            assert found["same"] and found["gap"] < 1e-5 and 0.4 < found["held"] < 0.6
        assert first[name]["passes"] == second[name]["passes"] == max(first[name]["needed"], second[name]["needed"])
        assert first[name]["needed"] > second[name]["needed"]
