"""Oracles O1, O2, O4, O6, O7 and O9 of docs/method.md, for block-attention and full-attention policies."""

from __future__ import annotations

import copy
import itertools
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from tests.closeness import ROUNDING, assert_close, assert_close_gradients
from tests.conftest import MASK, SPECS, STOP, make_policy, make_prompts
from tests.reference import writes_that_count
from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.decoding.decode import decode
from trl_diffusion.scoring.draws import StepDraw, count_tokens, draw_steps
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.scoring.states import drawn_states
from trl_diffusion.trajectories.trajectory import TokenStates, TrajectoryBatch, response_blocks, token_states


DECODINGS = {
    "two-per-step": DecodingConfig(max_new_tokens=24, temperature=1.0, tokens_per_step=2),
    "three-per-step-tempered": DecodingConfig(max_new_tokens=21, temperature=0.7, tokens_per_step=3),
    "threshold": DecodingConfig(max_new_tokens=20, temperature=1.3, strategy="threshold", threshold=0.2),
    "greedy": DecodingConfig(max_new_tokens=24, temperature=0.0),
    "stop-at-token": DecodingConfig(
        max_new_tokens=22, temperature=1.0, strategy="entropy_bound", entropy_bound=1.5, stop_rule="token"
    ),
}


def rollout(policy, decoding, seed=0) -> TrajectoryBatch:
    prompts = make_prompts(seed=seed)
    return decode(policy, prompts, decoding, seeds=[100 + row for row in range(len(prompts))])


def another(policy):
    """A policy with other weights."""
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for index, parameter in enumerate(other.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.1 * parameter.std(correction=0).clamp(min=0.01) * noise)
    return other


def draw_everything_at(step: int, batch: TrajectoryBatch, blocks) -> StepDraw:
    """The draw that scores state `step` of every group of tokens."""
    shape = (len(batch), int(blocks.max()) + 1)
    return StepDraw(torch.full((*shape, 1), step), torch.ones(*shape, 1), torch.ones(shape))


def lay_out(batch: TrajectoryBatch, spec, draw: StepDraw, **options):
    return pack(batch, spec, drawn_states(batch, spec, draw), **options)


def plain_forward_logps(policy, spec, batch: TrajectoryBatch, temperature: float):
    """
    The log-probability of every token, from un-packed forward passes of every state: the sequence as the policy
    saw it (with block attention nothing behind the active block, with full attention masks), the attention written out position by position. Independent of `pack`.
    """
    result = torch.zeros_like(batch.logps)
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row] == 1].tolist()
        origin = 0 if spec.block_origin == "sequence" else len(prompt)
        block_of = lambda i, origin=origin: max((i - origin) // spec.block_size, -1 if origin else -(10**9))  # noqa: E731
        canvas, steps = batch.canvas_ids[row].tolist(), batch.steps[row].tolist()
        columns_of = defaultdict(list)  # of each sequence that the policy saw, the tokens that it then unmasked
        for column in [column for column, step in enumerate(steps) if step >= 0]:
            position = len(prompt) + column
            end = origin + (block_of(position) + 1) * spec.block_size
            if spec.attention == "full":
                end = len(prompt) + int(batch.canvas_lengths[row])
            tokens = prompt + [
                token
                if block_of(len(prompt) + j) < block_of(position)
                or (block_of(len(prompt) + j) == block_of(position) and 0 <= steps[j] < steps[column])
                else spec.mask_token_id
                for j, token in enumerate(canvas)
            ]
            columns_of[tuple(tokens[:end])].append(column)
        for length in {len(tokens) for tokens in columns_of}:
            states = [tokens for tokens in columns_of if len(tokens) == length]
            blocks = torch.tensor([block_of(position) for position in range(length)])
            allowed = (blocks[None, :] <= blocks[:, None]) | (spec.attention == "full")
            logits = policy(
                input_ids=torch.tensor(states),
                position_ids=torch.arange(length).expand(len(states), -1),
                attention_mask=allowed[None, None].expand(len(states), 1, -1, -1),
            ).logits.double()
            if not spec.predicts_mask_token:
                logits[..., spec.mask_token_id] = -torch.inf
            log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
            for state, tokens in enumerate(states):
                for column in columns_of[tokens]:
                    place = len(prompt) + column - int(spec.token_shift)
                    result[row, column] = log_probs[state, place, canvas[column]]
    return result


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


def hand_made_steps():
    """Two responses whose blocks have different numbers of steps, of different sizes."""
    blocks = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]])
    steps = torch.tensor([[2, 0, 1, 0, 0, 0, 0, 1, 3, 1], [0, 1, 1, 0, 2, 2, -1, 0, 0, 0]])
    counted = torch.tensor([[True] * 10, [True] * 9 + [False]])
    return blocks, steps, counted


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


def possible_sets(sizes: dict[int, int], distribution: str, num_draws: int) -> dict[tuple[int, ...], float]:
    """
    Every set of steps that can be drawn in a block, and its probability (docs/method.md, section 2). Token-proportional: a
    step gets `n_t / n` of the draws, one that would get a whole draw is certain, and the others, in a random order, are
    drawn where `u, u + 1, ...` fall on their probabilities laid end to end.
    """
    number = min(num_draws, len(sizes))
    if distribution == "uniform":
        sets = list(itertools.combinations(sorted(sizes), number))
        return dict.fromkeys(sets, 1 / len(sets))
    rest, certain = dict(sizes), []
    while sure := [t for t, n in rest.items() if n * (number - len(certain)) >= sum(rest.values())]:
        certain += sure
        for step in sure:
            del rest[step]
    chances: dict[tuple[int, ...], Fraction] = Counter()
    left = number - len(certain)
    orders = list(itertools.permutations(rest)) if left > 1 else [tuple(rest)]  # a single draw knows no order
    for order in orders:
        ends = list(itertools.accumulate(Fraction(rest[t] * left, sum(rest.values())) for t in order))
        starts = sorted({Fraction(0), Fraction(1), *(end % 1 for end in ends)})
        for low, high in itertools.pairwise(starts):
            marks = [(low + high) / 2 + j for j in range(left)]
            drawn = [next(t for t, end in zip(order, ends, strict=True) if end > mark) for mark in marks]
            assert len(set(drawn)) == left
            chances[tuple(sorted(certain + drawn))] += (high - low) / len(orders)
    assert sum(chances.values()) == 1
    return {outcome: float(chance) for outcome, chance in chances.items()}


def weights_of(outcomes: dict[tuple[int, ...], float]) -> dict[int, float]:
    """The inverse of each step's probability of being drawn."""
    steps = sorted({step for outcome in outcomes for step in outcome})
    return {step: 1 / sum(chance for outcome, chance in outcomes.items() if step in outcome) for step in steps}


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
    """Var D_hat = sum_s T_s^2 Var_t d[s, t], against 20,000 draws; more draws shrink it as sampling theory says."""
    blocks, steps, counted = (tensor[:1] for tensor in hand_made_steps())
    ratios = torch.randn(blocks.shape, generator=torch.Generator().manual_seed(3))
    counts = count_tokens(blocks, steps, counted)[0]
    repeats = 20_000
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
        assert abs(centred.mean() - expected) < 4 * standard_error
        assert abs(estimates.mean() - ratios[counted].sum()) < 4 * estimates.std() / repeats**0.5


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


def pad_differently(batch: TrajectoryBatch) -> TrajectoryBatch:
    """The same responses with right-padded prompts, wider padding, and rubbish in it."""
    rows, width = batch.prompt_ids.shape
    order = (batch.prompt_mask == 0).long().sort(dim=1, stable=True).indices
    prompt = torch.cat([batch.prompt_ids.gather(1, order), torch.full((rows, 5), 17)], 1)
    mask = torch.cat([batch.prompt_mask.gather(1, order), torch.zeros(rows, 5, dtype=torch.long)], 1)
    inside = torch.arange(batch.canvas_ids.shape[1]) < batch.canvas_lengths[:, None]
    assert (batch.steps[~inside] == -1).all()
    canvas = torch.cat([batch.canvas_ids.masked_fill(~inside, 23), torch.full((rows, 7), 23)], 1)
    return replace(
        batch,
        prompt_ids=prompt.masked_fill(mask == 0, 11),
        prompt_mask=mask,
        canvas_ids=canvas,
        steps=torch.cat([batch.steps, torch.full((rows, 7), -1)], 1),
        logps=torch.cat([batch.logps, torch.zeros(rows, 7)], 1),
    )


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
