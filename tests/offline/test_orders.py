"""Orders for responses that nobody watched."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import ROUNDING, assert_close
from tests.conftest import MASK, SPECS, STOP, make_prompts
from tests.reference import masked_logps, plain_forward_logps, rows_of
from trl_diffusion.offline.orders import finished_batch, given_order, replay_confidence
from trl_diffusion.trajectories.trajectory import NEVER, autoregressive_positions, response_blocks


def make_responses(lengths=(5, 17, 1, 24, 9, 8)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [[*torch.randint(6, MASK, (n - 1,), generator=generator).tolist(), STOP] for n in lengths]


def ordered(spec, order, tokens_per_step=2, policy=None):
    batch = finished_batch(make_prompts(), make_responses(), spec)
    if order == "confidence":
        return replay_confidence(policy, batch, spec, tokens_per_step)
    return given_order(batch, spec, order, tokens_per_step, list(range(len(batch))))


@pytest.mark.parametrize("order", ["random", "left_to_right", "confidence"])
def test_every_token_is_unmasked_once_in_whole_steps(policy, spec, order):
    """The canvas ends with its block; steps of a block count from 0 and unmask two tokens, the last one what is left."""
    batch = ordered(spec, order, policy=policy)
    assert batch.completions() == make_responses()
    blocks = response_blocks(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
    first = autoregressive_positions(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
    for row in range(len(batch)):
        length, counted = int(batch.canvas_lengths[row]), int(batch.completion_lengths[row])
        assert (int(spec.prompt_tail(batch.prompt_lengths[row])) + length) % spec.block_size == 0
        assert 0 <= length - counted < spec.block_size
        assert (batch.steps[row, :counted] >= 0).all() and (batch.steps[row, counted:] == NEVER).all()
        assert (batch.canvas_ids[row, counted:] == spec.mask_token_id).all()
        for block in blocks[row, :counted].unique().tolist():
            own = (blocks[row] == block) & (batch.steps[row] >= 0)
            sizes = torch.bincount(batch.steps[row][own]).tolist()
            if first[row][own].any():
                assert batch.steps[row][own & first[row]].tolist() == [0] and sizes.pop(0) == 1
            assert all(size == 2 for size in sizes[:-1]) and (not sizes or 1 <= sizes[-1] <= 2)


def test_left_to_right():
    batch = ordered(SPECS["block-from-response"], "left_to_right", 3)
    assert batch.steps[3, :24].tolist() == [0, 0, 0, 1, 1, 1, 2, 2] * 3


def test_random_orders_depend_on_the_seed_alone_and_are_uniform():
    spec = SPECS["block-from-response"]
    batch = finished_batch(make_prompts((4,)) * 3000, make_responses((4,)) * 3000, spec)
    steps = given_order(batch, spec, "random", 1, list(range(3000))).steps[:, :4]
    orders, counts = torch.unique(steps, dim=0, return_counts=True)
    assert len(orders) == 24 and (counts / 3000 - 1 / 24).abs().max() < 4.5 * (1 / 24 / 3000) ** 0.5
    alone = given_order(batch.select(torch.tensor([7])), spec, "random", 1, [7]).steps[0, :4]
    assert torch.equal(alone, steps[7])
    with pytest.raises(ValueError, match="seeds"):
        given_order(batch, spec, "random", 1)
    with pytest.raises(ValueError, match="order"):
        given_order(batch, spec, "backwards", 1)


@torch.no_grad()
def test_replay_records_what_an_unpacked_forward_gives(policy, spec):
    batch = ordered(spec, "confidence", policy=policy)
    plain = plain_forward_logps(policy, spec, batch, 1.0)
    counted = batch.completion_mask
    assert_close(batch.logps[counted], plain[counted])


@torch.no_grad()
def test_replay_takes_what_the_policy_is_surest_of(policy, spec):
    """At every state, no token that waits is likelier than one that is unmasked; un-packed forwards."""
    batch = ordered(spec, "confidence", policy=policy)
    checked = 0
    for row, prompt, canvas, _, first, counts, blocks in rows_of(batch, spec):
        steps = batch.steps[row].tolist()
        if row % 2:
            continue  # three of six are enough
        for block, step in sorted(
            {(blocks[i], steps[i]) for i, counted in enumerate(counts) if counted and not first[i]}
        ):
            hidden = [
                blocks[i] > block or steps[i] == NEVER or (blocks[i] == block and steps[i] >= step)
                for i in range(len(canvas))
            ]
            values = masked_logps(policy, spec, prompt, canvas, hidden, first)
            own = [i for i in range(len(canvas)) if counts[i] and blocks[i] == block and not first[i]]
            taken = [values[i] for i in own if steps[i] == step]
            waiting = [values[i] for i in own if steps[i] > step]
            if waiting:
                assert min(taken) >= max(waiting) - ROUNDING
                checked += 1
    assert checked or spec.block_size == 1
