"""The table of responses says of each what its record holds."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer

from trl_diffusion import DiffusionSpec, tiny_policy_path
from trl_diffusion.trajectories.revisions import NEVER, Revisions
from trl_diffusion.trajectories.trajectory import TrajectoryBatch, steps_of_responses
from trl_diffusion.viz.table import order_of, trajectory_rows


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path())


@pytest.fixture
def spec(tokenizer):
    stop = tokenizer.eos_token_id
    return DiffusionSpec(tokenizer.mask_token_id, block_size=3, block_origin="response", stop_token_ids=(stop,))


@pytest.fixture
def batch(tokenizer):
    """Two responses in blocks of three tokens. The first ends with a stop token in its fourth position."""
    one, two, three, four = tokenizer.convert_tokens_to_ids(list("1234"))
    stop = tokenizer.eos_token_id
    return TrajectoryBatch(
        prompt_ids=torch.tensor([[0, one, two], [three, four, one]]),
        prompt_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        canvas_ids=torch.tensor([[one, two, three, stop, one, one], [four, four, four, three, two, one]]),
        steps=torch.tensor([[0, 2, 1, 0, 1, 2], [0, 0, 0, 1, 1, 0]]),
        logps=torch.tensor([[-1.0, -2.0, -0.5, -0.5, -9.0, -9.0], [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]]),
        canvas_lengths=torch.tensor([6, 6]),
        completion_lengths=torch.tensor([4, 6]),
    )


def test_a_row_for_each_response(batch, spec, tokenizer):
    first, second = trajectory_rows(batch, spec, tokenizer)
    assert first == {
        "prompt": "12", "response": "123", "tokens": 4, "ended": True, "passes": 4, "tokens_per_pass": 1.0,
        "mean_logp": pytest.approx(-1.0, rel=1e-6), "min_logp": pytest.approx(-2.0, rel=1e-6), "taken_back": 0,
        "order": "0 2 1 | 0",
    }  # fmt: skip
    assert second["prompt"] == "341" and second["response"] == "444321" and not second["ended"]
    assert (second["tokens"], second["passes"], second["tokens_per_pass"]) == (6, 3, 2.0)
    assert second["mean_logp"] == pytest.approx(-0.35, rel=1e-6) and second["order"] == "0 0 0 | 1 1 0"


def test_log_probabilities_that_nobody_recorded(batch, spec, tokenizer):
    batch.logps[1] = torch.nan
    batch.logps[0, 1] = torch.nan
    first, second = trajectory_rows(batch, spec, tokenizer)
    assert first["mean_logp"] == pytest.approx(-2 / 3, rel=1e-6) and first["min_logp"] == pytest.approx(-1.0, rel=1e-6)
    assert math.isnan(second["mean_logp"]) and math.isnan(second["min_logp"])


def test_an_empty_response(batch, spec, tokenizer):
    batch.completion_lengths[0] = 0
    row = trajectory_rows(batch, spec, tokenizer)[0]
    assert (row["response"], row["tokens"], row["passes"], row["tokens_per_pass"], row["order"]) == ("", 0, 0, 0.0, "")
    assert not row["ended"] and math.isnan(row["mean_logp"])


def test_writes_that_were_taken_back(batch, spec, tokenizer):
    """The first response has written its second position in steps 0, 1 and 3; the second response has taken nothing back."""
    batch.revisions = Revisions(
        positions=torch.tensor([[1, 1], [0, 0]]),
        tokens=batch.canvas_ids[:, :2].clone(),
        steps=torch.tensor([[0, 1], [NEVER, NEVER]]),
        until=torch.tensor([[1, 2], [0, 0]]),
        logps=torch.zeros(2, 2),
    )
    batch.steps[0, 1] = 3
    assert [row["taken_back"] for row in trajectory_rows(batch, spec, tokenizer)] == [2, 0]
    # Steps 0, 1 and 3 of the first block, and all of the second block, which may still change the response.
    assert steps_of_responses(spec, batch).tolist() == [3 + 3, 1 + 2]


def test_the_order_as_text():
    assert order_of([], [0, 0]) == ""
    assert order_of([3, -1, 0, 12], [0, 0, 1, 1, 2]) == "3 . | 0 12"
    assert order_of([1, 0], [4, 4]) == "1 0"
