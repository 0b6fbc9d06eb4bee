"""Oracles O1, O2, O4, O6, O7 and O9 of docs/method.md, for block-attention and full-attention policies."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.closeness import ROUNDING, assert_close, assert_close_gradients
from tests.conftest import MASK, SPECS, STOP, make_policy
from tests.reference import (
    DECODINGS,
    another,
    draw_everything_at,
    hand_made_steps,
    lay_out,
    pad_differently,
    plain_forward_logps,
    possible_sets,
    rollout,
    weights_of,
    writes_that_count,
)
from trl_diffusion.scoring.draws import StepDraw, count_tokens, draw_steps
from trl_diffusion.scoring.score import score
from trl_diffusion.trajectories.trajectory import TokenStates, response_blocks, token_states


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
@torch.no_grad()
def test_o1_packed_equals_recorded_equals_plain(policy, spec, decoding):
    batch = rollout(policy, decoding)
    plain = plain_forward_logps(policy, spec, batch, decoding.temperature)
    unmasked, counted = batch.steps >= 0, writes_that_count(spec, batch)
    assert_close(batch.logps[unmasked], plain[unmasked])

    blocks, states, *_ = token_states(spec, batch)
    scored = torch.zeros_like(counted)
    for step in range(int(states.max()) + 1):
        layout = lay_out(batch, spec, draw_everything_at(step, batch, blocks))
        logps, _ = score(policy, layout, spec, decoding.temperature)
        here = layout.weights > 0
        assert_close(logps[here], plain[here])
        scored |= here
    assert torch.equal(scored, counted)  # no pair (block, step) was left out


def test_rollouts_cover_the_hard_cases():
    """The trajectories above really have a stop inside a block, a shared block, and several tokens in one step."""
    spec = SPECS["block-from-sequence"]
    policy = make_policy(spec)
    batch = rollout(policy, DECODINGS["threshold"])
    assert (count_tokens(*token_states(spec, batch)[:3]) > 1).any()
    assert (batch.completion_lengths < batch.canvas_lengths).any()
    stopped = [ids[-1] == STOP for ids in rollout(policy, DECODINGS["two-per-step"]).completions()]
    assert any(stopped) and not all(stopped)
    assert (batch.prompt_lengths % spec.block_size > 0).any() and (batch.prompt_lengths % spec.block_size == 0).any()


def test_count_tokens():
    counts = count_tokens(*hand_made_steps())
    assert counts[0, 0].tolist() == [2, 1, 1, 0]
    assert counts[0, 1].tolist() == [3, 1, 0, 0]
    assert counts[0, 2].tolist() == [0, 1, 0, 1]
    assert counts[1, 2].tolist() == [2, 0, 0, 0]  # neither the masked token nor the one that does not count


@pytest.mark.parametrize("distribution", ["uniform", "token"])
@pytest.mark.parametrize("num_draws", [1, 2, 3])
def test_o2_enumerated_draws_are_unbiased(distribution, num_draws):
    """Sums weight times probability over every possible draw, for arbitrary per-token log-ratios."""
    blocks, steps, counted = hand_made_steps()
    ratios = torch.randn(blocks.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = count_tokens(blocks, steps, counted)
    for row, block in itertools.product(range(2), range(3)):
        here = counted[row] & (blocks[row] == block) & (steps[row] >= 0)
        exact = ratios[row][here].sum()
        support = [t for t, n in enumerate(counts[row, block].tolist()) if n]
        outcomes = possible_sets({t: counts[row, block, t].item() for t in support}, distribution, num_draws)
        weights = weights_of(outcomes)
        expected = 0.0
        for outcome, chance in outcomes.items():
            picked = torch.zeros(blocks.shape[1])
            for step in outcome:
                picked[here & (steps[row] == step)] += weights[step]
            expected = expected + chance * (picked.double() * ratios[row]).sum()
        assert_close(expected, exact)


def test_equal_steps_are_drawn_alike_and_enough_draws_are_exact():
    for num_draws in (1, 2, 3):
        token, uniform = (possible_sets({0: 2, 3: 2, 4: 2}, name, num_draws) for name in ("token", "uniform"))
        assert token == pytest.approx(uniform)
    assert weights_of(possible_sets({0: 5, 1: 1, 2: 2}, "token", 7)) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert weights_of(possible_sets({0: 5, 1: 1, 2: 2}, "token", 1)) == pytest.approx({0: 8 / 5, 1: 8, 2: 4})


@pytest.mark.parametrize("distribution", ["uniform", "token"])
@pytest.mark.parametrize("num_draws", [1, 2, 3])
def test_draws_follow_their_distribution_and_carry_its_weights(distribution, num_draws):
    blocks, steps, counted = hand_made_steps()
    counts = count_tokens(blocks, steps, counted)
    repeats = 4000
    draw = draw_steps(
        TokenStates(*(tensor.repeat_interleave(repeats, 0) for tensor in (blocks, steps, counted, counted))),
        seeds=list(range(2 * repeats)),
        distribution=distribution,
        num_draws=num_draws,
    )
    for row, block in itertools.product(range(2), range(3)):
        rows = slice(row * repeats, (row + 1) * repeats)
        sizes = counts[row, block]
        support = (sizes > 0).nonzero().squeeze(1).tolist()
        outcomes = possible_sets({t: sizes[t].item() for t in support}, distribution, num_draws)
        drawn = draw.steps[rows, block]
        found = Counter(tuple(sorted(t for t in row_steps if t >= 0)) for row_steps in drawn.tolist())
        assert set(found) == set(outcomes)
        for outcome, chance in outcomes.items():
            assert abs(found[outcome] / repeats - chance) <= 4 * (chance * (1 - chance) / repeats) ** 0.5
        for step, weight in weights_of(outcomes).items():
            weights = draw.weights[rows, block][drawn == step]
            assert torch.allclose(weights, torch.tensor(weight, dtype=torch.float))


# Two draws in proportion to tokens have too many orders to enumerate here; `test_o2_every_token_weighs_one_on_average`
# draws them.
@torch.no_grad()
def test_o2_estimate_equals_exact_log_ratio_in_expectation(policy, spec):
    """Through the packed forward: the mean over all draws of sum(weight * log-ratio) is the exact log-ratio."""
    reference = another(policy)
    batch = rollout(policy, DECODINGS["threshold"])
    blocks, states, drawable, _ = token_states(spec, batch)
    exact = (
        plain_forward_logps(policy, spec, batch, 1.3) - plain_forward_logps(reference, spec, batch, 1.3)
    ).masked_fill(~(counted := writes_that_count(spec, batch)), 0.0)

    # Every token's log-ratio as the packed pass gives it, and the inclusion of tokens averaged over all draws.
    ratios = torch.zeros_like(batch.logps)
    for step in range(int(states.max()) + 1):
        layout = lay_out(batch, spec, draw_everything_at(step, batch, blocks))
        difference = score(policy, layout, spec, 1.3)[0] - score(reference, layout, spec, 1.3)[0]
        ratios = torch.where(layout.weights > 0, difference, ratios)
    counts = count_tokens(blocks, states, drawable)
    for distribution, num_draws in (("uniform", 1), ("uniform", 2), ("token", 1)):
        expected = torch.where(counted & ~drawable, ratios, 0.0).sum(1).double()
        for row, block in itertools.product(range(len(batch)), range(counts.shape[1])):
            support = counts[row, block].nonzero().squeeze(1).tolist()
            if not support:
                continue
            outcomes = possible_sets({t: counts[row, block, t].item() for t in support}, distribution, num_draws)
            weights = weights_of(outcomes)
            for outcome, chance in outcomes.items():
                for step in outcome:
                    at_step = drawable[row] & (blocks[row] == block) & (states[row] == step)
                    expected[row] += chance * weights[step] * ratios[row][at_step].double().sum()
        assert_close(expected, exact.sum(1).double())


@pytest.mark.slow
def test_o4_variance_of_one_uniform_draw():
    """Var D_hat = sum_s T_s^2 Var_t d[s, t], against 8,000 draws; more draws shrink it as sampling theory says."""
    blocks, steps, counted = (tensor[:1] for tensor in hand_made_steps())
    ratios = torch.randn(blocks.shape, generator=torch.Generator().manual_seed(3))
    counts = count_tokens(blocks, steps, counted)[0]
    repeats = 8000
    for num_draws in (1, 2):
        expected = 0.0
        for block in range(3):
            support = counts[block].nonzero().squeeze(1).tolist()
            d = torch.stack([ratios[0][(blocks[0] == block) & (steps[0] == t)].sum() for t in support])
            size, k = len(support), min(num_draws, len(support))
            if size > 1:  # simple random sampling without replacement
                expected += size**2 * d.var(correction=0).item() / k * (size - k) / (size - 1)
        draw = draw_steps(
            TokenStates(*(tensor.expand(repeats, -1) for tensor in (blocks, steps, counted, counted))),
            seeds=list(range(repeats)),
            num_draws=num_draws,
        )
        hit = (draw.steps[:, blocks[0]] == steps[0, :, None]) & (steps[0, :, None] >= 0)  # (repeats, C, K)
        weights = (hit * draw.weights[:, blocks[0]]).sum(-1) * counted
        estimates = (weights * ratios).sum(1).double()
        centred = (estimates - estimates.mean()) ** 2
        standard_error = centred.std() / repeats**0.5
        assert abs(centred.mean() - expected) < 5 * standard_error
        assert abs(estimates.mean() - ratios[counted].sum()) < 5 * estimates.std() / repeats**0.5


def test_o6_gradient_of_the_enumerated_estimator(policy, spec):
    """Averaging the estimator over all steps gives the exact objective's gradient."""
    batch = rollout(policy, DECODINGS["two-per-step"])
    blocks, states, drawable, _ = token_states(spec, batch)
    counts = count_tokens(blocks, states, drawable)

    def gradient(objective):
        policy.zero_grad()
        objective.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    total = 0.0
    for step in range(counts.shape[2]):
        hit = counts[:, :, step] > 0
        draw = StepDraw(torch.where(hit, step, -1)[..., None], hit.float()[..., None], torch.ones(hit.shape))
        layout = lay_out(batch, spec, draw)
        logps, _ = score(policy, layout, spec, 1.0)
        own = torch.where(drawable, layout.weights, 0.0)
        # Autoregressive tokens are in every pass with weight 1: count them once.
        total = total + (logps * (layout.weights if step == 0 else own)).sum()
    estimated = gradient(total)

    exact = 0.0
    for row in range(len(batch)):
        one = batch.select(torch.tensor([row]))
        exact = exact + differentiable_exact(policy, spec, one)
    exact = gradient(exact)
    assert_close_gradients(estimated, exact)


def differentiable_exact(policy, spec, batch):
    """Sum of the log-probabilities of all counted tokens, one un-packed forward per state, with a graph."""
    with torch.enable_grad():
        return (plain_forward_logps(policy, spec, batch, 1.0) * writes_that_count(spec, batch)).sum()


@torch.no_grad()
def test_o7_padding_and_neighbours_change_nothing(policy, spec):
    batch = rollout(policy, DECODINGS["two-per-step"])
    seeds = list(range(len(batch)))

    def weighted(batch, seeds):
        draw = draw_steps(token_states(spec, batch), seeds, num_draws=2)
        layout = lay_out(batch, spec, draw)
        logps, _ = score(policy, layout, spec)
        return (logps * layout.weights)[:, : int(batch.completion_lengths.max())]

    expected = weighted(batch, seeds)
    padded = weighted(pad_differently(batch), seeds)
    assert_close(padded, expected)
    for row in seeds:  # alone
        alone = weighted(batch.select(torch.tensor([row])), [row])
        assert_close(alone[0], expected[row, : alone.shape[1]])
    order = torch.tensor([4, 2, 0, 5, 1, 3])  # permuted
    permuted = weighted(batch.select(order), order.tolist())
    assert_close(permuted, expected[order])


def test_draws_leave_the_global_random_state_alone():
    blocks, steps, counted = hand_made_steps()
    before = torch.random.get_rng_state()
    first = draw_steps(TokenStates(blocks, steps, counted, counted), seeds=[1, 2], num_draws=2)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    again = draw_steps(TokenStates(blocks, steps, counted, counted), seeds=[1, 2], num_draws=2)
    assert torch.equal(first.steps, again.steps)


@torch.no_grad()
def test_o9_nothing_leaks(policy, spec):
    """Tokens that a state masks, and everything behind its block, do not move its scored log-probabilities."""
    batch = rollout(policy, DECODINGS["two-per-step"])
    blocks = response_blocks(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
    groups, states, drawable, _ = token_states(spec, batch)
    checked = 0
    for group, state in itertools.product(range(int(groups.max()) + 1), range(int(states.max()) + 1)):
        target = drawable & (groups == group) & (states == state)
        if not target.any():
            continue
        hit = target.any(1)
        steps = torch.full((len(batch), int(groups.max()) + 1, 1), -1)
        steps[hit, group] = state
        # Every group is drawn at another state besides, so that leaks between noisy copies would show too.
        others = draw_everything_at(1 if state != 1 else 0, batch, groups)
        draw = StepDraw(torch.cat([steps, others.steps], 2), torch.ones(*steps.shape[:2], 2), others.block_weights)
        own_block = torch.where(target, blocks, -1).max(1, keepdim=True).values
        hidden = (blocks > own_block) | ((blocks == own_block) & ((states >= state) | (states < 0)) & ~target)
        changed = replace(
            batch, canvas_ids=torch.where(hidden, (batch.canvas_ids + 7) % spec.mask_token_id, batch.canvas_ids)
        )
        before, after = (score(policy, lay_out(b, spec, draw), spec)[0] for b in (batch, changed))
        assert_close(before[target], after[target])
        checked += int(target.sum())
    assert checked == int(drawable.sum())


@pytest.mark.parametrize("name", ["block-from-sequence", "full"])
@torch.no_grad()
def test_a_visible_token_does_matter(name):
    """The counterpart of O9: the test above would not pass on a policy that looks at nothing."""
    spec = SPECS[name]
    policy = make_policy(spec)
    batch = rollout(policy, DECODINGS["two-per-step"])
    groups, states, drawable, _ = token_states(spec, batch)
    draw = draw_everything_at(2, batch, groups)
    target = drawable & (states == 2)
    visible = (states >= 0) & (states < 2)
    changed = replace(batch, canvas_ids=torch.where(visible, (batch.canvas_ids + 7) % MASK, batch.canvas_ids))
    before, after = (score(policy, lay_out(b, spec, draw), spec)[0] for b in (batch, changed))
    assert (before[target] - after[target]).abs().min() > ROUNDING
