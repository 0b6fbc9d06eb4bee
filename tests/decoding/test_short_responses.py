"""Responses that are shorter than a block: no step is spent on what follows them, and that is what a policy of long blocks sees."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.closeness import assert_close
from tests.conftest import MASK, SPECS, STOP, make_policy, make_prompts
from tests.decoding.test_engine import Passes
from tests.reference import by_hand, plain_forward_logps
from trl_diffusion import DecodingConfig, DiffusionSpec, decode
from trl_diffusion.decoding.decode import _say_rounding
from trl_diffusion.plan.cost import rollout_cost
from trl_diffusion.plan.simulate import Workload, simulate
from trl_diffusion.trajectories.trajectory import NEVER


TOKENS = 5
LONG = {
    name: SPECS[name].replace(block_size=48, stop_token_ids=())
    for name in ("block-from-sequence", "full", "full-shift")
}


def loop(policy, spec, prompt: list[int], tokens: int) -> list[int]:
    """Greedy decoding of the first `tokens` positions, written out: the likeliest position next, whole blocks of masks behind."""
    canvas = [spec.mask_token_id] * (spec.canvas_end(len(prompt), tokens) - len(prompt))
    for _ in range(tokens):
        masked = [place for place in range(tokens) if canvas[place] == spec.mask_token_id]
        logps = by_hand(policy, spec, prompt, canvas)[masked]
        place = masked[int(logps.max(-1).values.argmax())]
        canvas[place] = int(logps.max(-1).indices[masked.index(place)])
    return canvas[:tokens]


@torch.no_grad()
@pytest.mark.parametrize("name", LONG)
def test_no_step_is_spent_behind_the_last_token(name):
    spec = LONG[name]
    policy, prompts = make_policy(spec), make_prompts((3, 11, 7))
    with Passes(policy) as passes:
        batch = decode(policy, prompts, DecodingConfig(TOKENS), spec)
    assert len(passes.tokens) == TOKENS  # 45 and more if the blocks were denoised to their ends
    assert batch.completions() == [loop(policy, spec, prompt, TOKENS) for prompt in prompts]
    assert (batch.steps[:, TOKENS:] == NEVER).all() and batch.completion_lengths.tolist() == [TOKENS] * 3
    written = batch.steps != NEVER
    assert_close(batch.logps[written], plain_forward_logps(policy, spec, batch, 1.0)[written].float())


@torch.no_grad()
def test_schedules_strategies_and_rules_end_with_the_response():
    """Steps divide what is unmasked; a block ends with it by either rule; a response over two blocks has both of its parts."""
    spec = LONG["block-from-sequence"]
    policy, prompts = (
        make_policy(spec),
        make_prompts((3, 45)),
    )  # the second one has three tokens left in its first block
    for config, steps in (
        (DecodingConfig(TOKENS, steps_per_block=2), 2 + 2),
        (DecodingConfig(TOKENS, tokens_per_step=2, stop_rule="block"), 2 + 1),
        (DecodingConfig(TOKENS, strategy="threshold", threshold=0.0, sub_block_size=8), 1 + 1),
    ):
        with Passes(policy) as passes:
            batch = decode(policy, prompts, config, spec)
        assert len(passes.tokens) == steps, config
        assert (batch.steps[:, :TOKENS] != NEVER).all() and (batch.steps[:, TOKENS:] == NEVER).all()
    whole = decode(policy, prompts[:1], DecodingConfig(48, steps_per_block=3), spec)
    assert (whole.steps[0, :45] != NEVER).all()  # from a block on, blocks are denoised to their ends


def test_the_plan_counts_the_same_passes():
    spec = LONG["block-from-sequence"]
    work = Workload(
        batch_size=2, num_generations=2, prompt_length=8, completion_length=TOKENS, rollout_batch_size=1, checkpointing=False
    )  # fmt: skip
    config = make_policy(spec, num_hidden_layers=1).config
    footprint = simulate(config, spec, work)
    assert rollout_cost(config, spec, work, footprint).passes == TOKENS
    assert footprint.scored_tokens == 2 * 1  # a drawn step of each response has one token


def test_it_is_said_once(caplog):
    _say_rounding.cache_clear()
    blocks = {
        "sequence": LONG["block-from-sequence"],
        "response": DiffusionSpec(MASK, "full", 8, "response", stop_token_ids=(STOP,)),
    }
    policies = {origin: make_policy(spec, num_hidden_layers=1) for origin, spec in blocks.items()}
    with caplog.at_level(logging.WARNING):
        for origin, tokens in (("sequence", 5), ("sequence", 5), ("sequence", 49), ("response", 12), ("response", 16)):
            decode(policies[origin], make_prompts((3,)), DecodingConfig(tokens, tokens_per_step=48), blocks[origin])
    assert [record.getMessage() for record in caplog.records] == [
        "Responses have up to 5 tokens, less than a block of this policy (48): every step runs the whole block, whose rest stays "
        "masked.",
        "Responses have up to 12 tokens, which is rounded up to whole blocks of 8: 16 positions are denoised, and the last 4 do "
        "not count.",
    ]
