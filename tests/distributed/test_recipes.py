"""The recipes as a user runs them, on two processes."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import cpu_config, needs_deepspeed
from tests.processes import in_a_terminal
from trl_diffusion import tiny_policy_path


pytestmark = pytest.mark.distributed


@needs_deepspeed
def test_train_under_zero3_as_it_is_shipped(engine_runs):
    """From the measurement before training, on a policy that is shared already, to the saved model."""
    output = (engine_runs("zero3") / "train" / "output_0.txt").read_text()
    directory = engine_runs("zero3") / "train" / "outputs" / "tiny_sudoku"
    results = json.loads((directory / "results.json").read_text())
    assert re.search(rf"-> {results['solve_rate_after']:.1%} \(21 puzzles, 95 % interval .*, seed 0\)", output)
    start = load_file(f"{tiny_policy_path()}/model.safetensors")
    trained = load_file(directory / "model.safetensors")
    assert trained.keys() == start.keys()
    assert all(not torch.equal(weight, start[name]) for name, weight in trained.items())


def test_an_interrupted_run_of_two_processes(tmp_path):
    """Ctrl-C reaches the launcher alone. Both processes end with it: one line, no traceback of any of the three."""
    config = cpu_config("ddp", tmp_path)
    words = [
        sys.executable,
        "-m",
        "trl_diffusion",
        "train",
        "--accelerate_config",
        str(config),
        "--use_cpu",
        "true",
        "--max_steps",
        "1000",
    ]
    words += [
        "--per_device_train_batch_size",
        "8",
        "--num_generations",
        "4",
        "--eval_size",
        "4",
        "--train_size",
        "64",
        "--save_steps",
        "2",
    ]
    code, output = in_a_terminal(words, tmp_path, interrupt_at=r" 3/1000 ")
    assert code == 130 and "Traceback" not in output, output
    told = output.strip().splitlines()[-1]
    found = re.fullmatch(
        r"Stopped by Ctrl-C\. \d+ of 1000 updates were made, (\S+) is kept\. To go on: trl-diffusion train .*", told
    )
    assert found and (tmp_path / found[1] / "checkpoint_complete").exists(), output
    assert output.count("Stopped by Ctrl-C") == 1 and "closing signal" not in output
