"""A loop that takes prompts while it runs gives the responses of `decode`."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import SPECS, make_policy, make_prompts
from tests.decoding.test_engine import assert_same
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.decoding.live import LiveLoop
from trl_diffusion.policies.attention import plans_enabled


LIMIT = 24
SETTINGS = {
    "sampled": {"temperature": 1.0, "tokens_per_step": 2},
    "greedy": {"strategy": "threshold", "threshold": 0.3},
    "revising": {"temperature": 1.0, "revision": "confidence", "revision_threshold": 0.3, "tokens_per_step": 3},
}
CASES = [("block-from-sequence", name) for name in SETTINGS] + [
    ("full", "sampled"), ("full", "revising"), ("shift-autoregressive-first", "sampled"), ("block-from-response", "greedy"),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("spec_name", "settings"), CASES)
def test_prompts_that_come_one_by_one(spec_name, settings):
    """Lanes are used again, by longer and by shorter responses, while others are in the middle of theirs."""
    spec, settings = SPECS[spec_name], SETTINGS[settings]
    policy = make_policy(spec)
    prompts = make_prompts([1 + 5 * row % 19 for row in range(10)])
    lengths = [LIMIT, 3, 16, 9, LIMIT, 8, 1, 12, 20, 17]
    loop = LiveLoop(policy, DecodingConfig(LIMIT, **settings), spec, 3, 19)
    found, rows, waiting, ticks = {}, {}, list(range(10)), 0
    with plans_enabled(policy):
        while waiting or loop.active:
            while waiting and loop.active < min(3, 1 + ticks // 2):
                number = waiting.pop(0)
                rows[loop.admit(prompts[number], lengths[number], seed=number)] = number
            for row in loop.step():
                found[rows.pop(row)] = loop.trajectory(row)
            ticks += 1
    for number in range(10):
        alone = decode(policy, [prompts[number]], DecodingConfig(lengths[number], **settings), seeds=[number])
        assert_same(alone, 0, found[number], 0)
        if alone.revisions is not None:
            wide = found[number].revisions.widen(alone.revisions.steps.shape[1])
            for name, values in vars(alone.revisions).items():
                width = values.shape[1]
                torch.testing.assert_close(getattr(wide, name)[:, :width], values)
                assert (wide.steps[:, width:] == -1).all()


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
