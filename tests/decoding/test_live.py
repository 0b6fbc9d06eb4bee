"""A loop that takes prompts while it runs gives the responses of `decode`."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import SPECS, make_policy, make_prompts
from tests.decoding.test_engine import assert_same
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.decoding.live import LiveLoop
from trl_diffusion.policies.attention import plans_enabled
from trl_diffusion.trajectories.revisions import Revisions


LIMIT = 24
SETTINGS = {
    "sampled": {"temperature": 1.0, "tokens_per_step": 2},
    "greedy": {"strategy": "threshold", "threshold": 0.3},
    "dual cache": {"temperature": 1.0, "approximate_cache": "dual", "strategy": "random", "tokens_per_step": 2},
    "parts": {"temperature": 1.0, "approximate_cache": "sub_block", "sub_block_size": 4, "stop_rule": "block"},
    "selection": {"temperature": 1.0, "strategy": "sampled_confidence", "score_selection": True, "tokens_per_step": 2},
    "revising": {"temperature": 1.0, "revision": "confidence", "revision_threshold": 0.3, "tokens_per_step": 3},
}
CASES = [
    ("block-from-sequence", "sampled"), ("block-from-sequence", "greedy"), ("block-from-sequence", "revising"),
    ("block-from-sequence", "selection"), ("full", "sampled"), ("full", "revising"), ("full", "dual cache"),
    ("shift-autoregressive-first", "sampled"), ("block-from-response", "greedy"), ("block-from-response", "parts"),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("spec_name", "settings"), CASES)
def test_prompts_that_come_one_by_one(spec_name, settings):
    """Lanes are used again, by longer and by shorter responses, while others are in the middle of theirs."""
    spec, settings = SPECS[spec_name], SETTINGS[settings]
    policy = make_policy(spec)
    prompts = make_prompts([1 + 5 * row % 19 for row in range(8)])
    lengths = [LIMIT, 3, 13, LIMIT, 13, 3, LIMIT, 13]
    loop = LiveLoop(policy, DecodingConfig(LIMIT, **settings), spec, 3, 19)
    found, rows, waiting, ticks = {}, {}, list(range(8)), 0
    with plans_enabled(policy):
        while waiting or loop.active:
            while waiting and loop.active < min(3, 1 + ticks // 2):
                number = waiting.pop(0)
                rows[loop.admit(prompts[number], lengths[number], seed=number)] = number
            for row in loop.step():
                found[rows.pop(row)] = loop.trajectory(row)
            ticks += 1
    for length in set(lengths):
        numbers = [number for number in range(8) if lengths[number] == length]
        config = DecodingConfig(length, **settings)
        expected = decode(policy, [prompts[number] for number in numbers], config, seeds=numbers)
        for row, number in enumerate(numbers):
            assert_same(expected, row, found[number], 0)
            if expected.revisions is not None:
                assert_same_revisions(expected.revisions, row, found[number].revisions)


def assert_same_revisions(one: Revisions, row: int, other: Revisions) -> None:
    width = max(one.steps.shape[1], other.steps.shape[1])
    for name, values in vars(one.widen(width)).items():
        torch.testing.assert_close(getattr(other.widen(width), name)[0], values[row])


@torch.no_grad()
def test_finished_blocks_and_a_response_that_is_dropped():
    spec = SPECS["block-from-response"].replace(stop_token_ids=())
    policy = make_policy(spec)
    (prompt,) = make_prompts((5,))
    loop = LiveLoop(policy, DecodingConfig(LIMIT, 1.0), spec, 2, 5)
    expected = decode(policy, [prompt], DecodingConfig(LIMIT, 1.0), spec, seeds=[7]).completions()[0]
    with plans_enabled(policy):
        row = loop.admit(prompt, LIMIT, 7)
        loop.drop(loop.admit(prompt, LIMIT, 8))
        lengths = []
        while not loop.step():
            lengths.append(len(loop.settled(row)))
            assert loop.settled(row) == expected[: lengths[-1]]
    assert lengths == [0] * 7 + [8] * 8 + [16] * 8
    assert loop.trajectory(row).completions() == [expected] and loop.active == 0
