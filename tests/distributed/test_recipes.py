"""The recipes as a user runs them, on two processes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import ROOT, launch, needs_deepspeed
from trl_diffusion import tiny_policy_path


pytestmark = pytest.mark.distributed

SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--train_size", "64", "--eval_size", "21"]


@needs_deepspeed
def test_train_under_zero3_as_it_is_shipped(tmp_path):
    """From the measurement before training, on a policy that is shared already, to the saved model."""
    code, output = launch(
        "zero3", tmp_path, ROOT / "recipes" / "train.py", *SMALL, "--ddp_backend", "gloo", "--beta", "0.1"
    )
    assert code == 0, output[-5000:]
    directory = tmp_path / "outputs" / "tiny_sudoku"
    results = json.loads((directory / "results.json").read_text())
    assert f"-> {results['solve_rate_after']:.1%} (21 puzzles, seed 0)" in output
    start = load_file(f"{tiny_policy_path()}/model.safetensors")
    trained = load_file(directory / "model.safetensors")
    assert trained.keys() == start.keys()
    assert all(not torch.equal(weight, start[name]) for name, weight in trained.items())
