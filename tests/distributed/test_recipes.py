"""The recipes as a user runs them, on two processes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import needs_deepspeed
from trl_diffusion import tiny_policy_path


pytestmark = pytest.mark.distributed


@needs_deepspeed
def test_train_under_zero3_as_it_is_shipped(engine_runs):
    """From the measurement before training, on a policy that is shared already, to the saved model."""
    output = (engine_runs("deepspeed") / "train" / "output_0.txt").read_text()
    directory = engine_runs("deepspeed") / "train" / "outputs" / "tiny_sudoku"
    results = json.loads((directory / "results.json").read_text())
    assert f"-> {results['solve_rate_after']:.1%} (21 puzzles, seed 0)" in output
    start = load_file(f"{tiny_policy_path()}/model.safetensors")
    trained = load_file(directory / "model.safetensors")
    assert trained.keys() == start.keys()
    assert all(not torch.equal(weight, start[name]) for name, weight in trained.items())
