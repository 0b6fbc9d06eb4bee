"""Pictures show what happened."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from tests.conftest import SPECS, make_policy, make_prompts
from trl_diffusion import DecodingConfig, decode, tiny_policy_path
from trl_diffusion.trajectories.trajectory import global_steps
from trl_diffusion.viz.plots import plot_rewards, plot_trajectory


def test_global_steps_count_through_blocks():
    blocks = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    steps = torch.tensor([[1, 0, 1, 2, 0, 1, -1, -1]])
    assert global_steps(blocks, steps).tolist() == [[1, 0, 1, 4, 2, 3, -1, -1]]


def test_plots_are_written(tmp_path):
    spec = SPECS["block-from-sequence"]
    batch = decode(make_policy(spec), make_prompts((3,)), DecodingConfig(20))
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    path = plot_trajectory(batch, spec, tokenizer, tmp_path / "deep" / "one.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    history = [{"step": 1, "reward": 1.0, "rewards/a/mean": 0.5}, {"step": 2, "loss": 0.1}]
    assert plot_rewards(history, tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"
