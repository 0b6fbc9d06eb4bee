"""Estimators against formulas written out by hand, and the oracles for every option of dtrpo."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.closeness import assert_close, assert_close_gradients, close_to
from tests.conftest import MASK, SPECS, STOP, make_policy, make_prompts
from tests.reference import (
    DECODINGS,
    another,
    group_rollout,
    masked_logps,
    pad_differently,
    plain_forward_logps,
    possible_sets,
    rollout,
    rows_of,
    states_of,
    weights_of,
    writes_that_count,
)
from trl_diffusion.decoding.decode import decode
from trl_diffusion.policies.attention import PLANNED, enable_plans
from trl_diffusion.scoring.diagnostics import estimate_quality, ratio_statistics, summarise_ratios
from trl_diffusion.scoring.draws import draw_steps, expected_weights
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack, shared_prompts
from trl_diffusion.scoring.score import score
from trl_diffusion.trajectories.trajectory import NEVER, TokenStates, response_blocks, token_states


DTRPO_OPTIONS = {
    "importance": {},
    "importance-2": {"num_draws": 2},
    "uniform": {"step_distribution": "uniform"},
    "uniform-2": {"step_distribution": "uniform", "num_draws": 2},
    "token": {"step_distribution": "token"},
    "token-2": {"step_distribution": "token", "num_draws": 2},
    "two-blocks": {"step_distribution": "uniform", "num_blocks": 2},
    "one-block-token-2": {"num_blocks": 1, "step_distribution": "token", "num_draws": 2},
}


@pytest.fixture(params=sorted(SPECS))
def named(request):
    """Every kind of spec; the checkpoints of the families are for test_oracles.py."""
    return make_policy(SPECS[request.param]), SPECS[request.param]


def estimate(policy, batch, spec, config: EstimatorConfig, seeds=None, temperature=1.0, **options):
    """Estimates of tokens, and their weights."""
    options = {"one_row": ESTIMATORS[config.name].one_row, **options}
    layout = pack(batch, spec, states_of(batch, spec, config, seeds), **options)
    return score(policy, layout, spec, temperature)[0], layout.weights


def skip_unless_it_applies(options, spec):
    if "num_blocks" in options and spec.attention == "full":
        pytest.skip("a full-attention response is one group")


@pytest.mark.parametrize("one_row", [True, False])
@torch.no_grad()
def test_exact_is_the_whole_trajectory(policy, spec, one_row):
    batch = rollout(policy, DECODINGS["threshold"])
    estimates, weights = estimate(policy, batch, spec, EstimatorConfig("exact"), temperature=1.3, one_row=one_row)
    counted = writes_that_count(spec, batch)
    assert torch.equal(weights > 0, counted) and (weights[weights > 0] == 1).all()
    plain = plain_forward_logps(policy, spec, batch, 1.3).masked_fill(~counted, 0.0)
    assert_close(estimates, plain)
    recorded = batch.logps.masked_fill(~counted, 0.0)
    assert_close(estimates, recorded)


@pytest.mark.parametrize("name", DTRPO_OPTIONS)
@torch.no_grad()
def test_o1_drawn_tokens_have_their_exact_log_probability(policy, spec, name):
    options = DTRPO_OPTIONS[name]
    skip_unless_it_applies(options, spec)
    batch = rollout(policy, DECODINGS["two-per-step"])
    for attempt in range(3):
        seeds = [10 * attempt + row for row in range(len(batch))]
        estimates, weights = estimate(policy, batch, spec, EstimatorConfig(**options), seeds)
        scored = weights > 0
        assert_close(estimates[scored], batch.logps[scored])
        assert (estimates[~scored] == 0).all()


@pytest.mark.parametrize("name", DTRPO_OPTIONS)
def test_o2_every_token_weighs_one_on_average(named_spec, name):
    """E[weight] = 1 for every token of every state, so E[D_hat] = D whatever the log-ratios are."""
    policy, spec = named_spec
    options = DTRPO_OPTIONS[name]
    skip_unless_it_applies(options, spec)
    batch = rollout(policy, DECODINGS["threshold"])
    config, repeats = EstimatorConfig(**options), 400
    rows = torch.arange(len(batch)).repeat_interleave(repeats)
    states = states_of(batch.select(rows), spec, config, seeds=list(range(len(rows))))
    weights = states.weights.unflatten(0, (len(batch), repeats)).double()
    counted = writes_that_count(spec, batch)
    assert (weights.mean(1)[~counted] == 0).all()
    errors = (weights.mean(1) - 1)[counted]
    tolerance = 5 * weights.std(1)[counted] / repeats**0.5 + 1e-6  # many tokens are compared
    assert (errors.abs() <= tolerance).all()
    # Weights and coefficients agree about what is scored.
    assert torch.equal(states.coefficients.sum(1) > 0, states.weights > 0)
    assert set(states.coefficients.unique().tolist()) <= {0.0, 1.0}


@pytest.fixture(
    params=["block-from-sequence", "shift-autoregressive-first", "clean-causal-autoregressive-first", "full"]
)
def named_spec(request):
    return make_policy(SPECS[request.param]), SPECS[request.param]


@torch.no_grad()
def test_o3_the_schedule_cancels(policy, spec):
    """
    With an explicit linear schedule, whose every transition has a probability of its own, the ratio of two policies'
    trajectory probabilities is the ratio of the newly unmasked tokens alone.
    """
    reference = another(policy)
    batch = rollout(policy, DECODINGS["two-per-step"])
    estimates = [estimate(p, batch, spec, EstimatorConfig("exact"))[0] for p in (policy, reference)]
    reduced = (estimates[0] - estimates[1]).sum(1)

    plain = [plain_forward_logps(p, spec, batch, 1.0) for p in (policy, reference)]
    groups, states, _, counted = token_states(spec, batch)
    for row in range(len(batch)):
        totals = [0.0, 0.0]
        for group in groups[row][counted[row]].unique().tolist():
            here = counted[row] & (groups[row] == group)
            steps = sorted(states[row][here].unique().tolist())
            left = int(here.sum())
            for index, step in enumerate(steps):
                # Masked share of time: 1 - alpha falls linearly from 1 to 0 over the steps.
                before, after = 1 - index / len(steps), 1 - (index + 1) / len(steps)
                moved = here & (states[row] == step)
                number = int(moved.sum())
                left -= number
                schedule = number * torch.tensor((before - after) / before).log()
                if left:
                    schedule = schedule + left * torch.tensor(after / before).log()
                for which in (0, 1):
                    totals[which] = totals[which] + schedule + plain[which][row][moved].sum()
        assert totals[0] - totals[1] == pytest.approx(reduced[row].item(), abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in DTRPO_OPTIONS if not name.startswith("importance")])
def test_o4_variance(name):
    """The closed forms of two-stage sampling, against 8,000 draws."""
    options = DTRPO_OPTIONS[name]
    groups = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    steps = torch.tensor([[2, 0, 1, 0, 0, 0, 0, 1, 3, 1, 2]])
    everything = torch.ones_like(steps, dtype=torch.bool)
    ratios = torch.randn(steps.shape, generator=torch.Generator().manual_seed(5)).double()
    repeats, draws = 8000, options.get("num_draws", 1)
    draw = draw_steps(
        TokenStates(*(t.expand(repeats, -1) for t in (groups, steps, everything, everything))),
        list(range(repeats)),
        options.get("step_distribution", "uniform"),
        draws,
        num_blocks=options.get("num_blocks"),
    )
    hit = draw.steps[:, groups[0]] == steps[0, :, None]
    estimates = ((hit * draw.weights[:, groups[0]]).sum(-1) * ratios).sum(1)

    totals, within = [], []
    for group in range(3):
        here = groups[0] == group
        support = steps[0][here].unique().tolist()
        d = torch.stack([ratios[0][here & (steps[0] == t)].sum() for t in support])
        n = torch.tensor([(here & (steps[0] == t)).sum().item() for t in support]).double()
        if options.get("step_distribution") == "token":
            sets = possible_sets(dict(zip(support, n.int().tolist(), strict=True)), "token", draws)
            weights, worth = weights_of(sets), dict(zip(support, d, strict=True))
            sums = [sum(weights[t] * worth[t] for t in drawn) for drawn in sets]
            variance = sum(chance * (value - d.sum()) ** 2 for chance, value in zip(sets.values(), sums, strict=True))
        else:
            size, k = len(d), min(draws, len(d))
            variance = size**2 * d.var(correction=0) / k * (size - k) / max(size - 1, 1)
        totals.append(d.sum())
        within.append(variance)
    blocks, chosen = 3, options.get("num_blocks") or 3
    between = torch.stack(totals).var(correction=1)
    expected = blocks**2 / chosen * (1 - chosen / blocks) * between + blocks / chosen * sum(within)

    centred = (estimates - estimates.mean()) ** 2
    assert abs(centred.mean() - expected) < 5 * centred.std() / repeats**0.5
    assert abs(estimates.mean() - ratios.sum()) < 5 * estimates.std() / repeats**0.5


def test_draws_of_blocks():
    """`m` of `S` blocks, all equally likely, with weight `S / m`; a block with nothing that counts is not one of them."""
    groups = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])
    steps = torch.tensor([[0, 1, 0, 1, 0, 0, 0, 1]])
    counted = torch.tensor([[True] * 6 + [False] * 2])
    drawable = counted & torch.tensor([[True, True, True, True, False, False, True, True]])
    repeats = 3000
    tokens = TokenStates(*(t.expand(repeats, -1) for t in (groups, steps, drawable, counted)))
    draw = draw_steps(tokens, list(range(repeats)), num_blocks=2)
    assert ((draw.block_weights > 0).sum(1) == 2).all()
    assert set(draw.block_weights.unique().tolist()) == {0.0, 1.5}
    shares = (draw.block_weights > 0).double().mean(0)
    assert (shares - 2 / 3).abs().max() < 4 * 0.5 / repeats**0.5
    # Block 2 has nothing to draw, but a token that is in every pass over it.
    assert (draw.steps[:, 2] == -1).all() and ((draw.steps[:, 0, 0] >= 0) == (draw.block_weights[:, 0] > 0)).all()
    plain = draw_steps(tokens, list(range(repeats)), num_blocks=2, weighting="none")
    sums = plain.block_weights[:, 2] * 2 + plain.weights[:, :2].sum((1, 2))
    expected = expected_weights(TokenStates(*(t[:1] for t in tokens)), num_blocks=2)
    assert abs(sums.mean() - expected[0]) < 4 * sums.std() / repeats**0.5


@torch.no_grad()
def test_mean_field_against_its_formula(policy, spec):
    """d1, eq. 3: log p(token | prompt with random masks, the response masked)."""
    batch = rollout(policy, DECODINGS["two-per-step"])
    config = EstimatorConfig("mean_field", prompt_mask_probability=0.3)
    states = states_of(batch, spec, config)
    estimates, weights = estimate(policy, batch, spec, config)
    assert states.prompt_hidden.any() and not (states.prompt_hidden & (batch.prompt_mask == 0)).any()
    for row, prompt, canvas, _, first, counts, _ in rows_of(batch, spec):
        hits = states.prompt_hidden[row][batch.prompt_mask[row] == 1].tolist()
        masked = [spec.mask_token_id if hit else token for token, hit in zip(prompt, hits, strict=True)]
        hidden = [not f for f in first]
        expected = masked_logps(policy, spec, masked, canvas, hidden, first)
        for i, counted in enumerate(counts):
            assert weights[row, i] == float(counted)
            if counted:
                assert estimates[row, i].item() == close_to(expected[i].item())


def test_mean_field_masks_the_prompt_with_its_probability():
    spec = SPECS["full"]
    batch = decode(make_policy(spec), make_prompts((60, 40)), DECODINGS["greedy"])
    many = batch.select(torch.arange(2).repeat(400))
    hidden = states_of(many, spec, EstimatorConfig("mean_field")).prompt_hidden
    share = hidden.sum() / many.prompt_mask.sum()
    assert abs(share - 0.15) < 4 * (0.15 * 0.85 / many.prompt_mask.sum()) ** 0.5
    none = states_of(many, spec, EstimatorConfig("mean_field", prompt_mask_probability=0.0)).prompt_hidden
    assert not none.any()


@torch.no_grad()
def test_coupled_against_its_formula(policy, spec):
    """DiffuCoder: half the fully masked log-probability, half that of the half-masked state which masks the token, over
    its mask ratio."""
    batch = rollout(policy, DECODINGS["two-per-step"])
    states = states_of(batch, spec, EstimatorConfig("coupled"))
    estimates, weights = estimate(policy, batch, spec, EstimatorConfig("coupled"))
    for row, prompt, canvas, never, first, counts, _ in rows_of(batch, spec):
        views = [states.hidden[row, view, : len(canvas)].tolist() for view in range(3)]
        movable = [not n and not f for n, f in zip(never, first, strict=True)]
        # Everything; and two complements.
        assert all(views[0][i] for i in range(len(canvas)) if movable[i])
        assert all(views[1][i] != views[2][i] for i in range(len(canvas)) if movable[i])
        # The ratio is not stored: it follows from the coefficients, and must be one number within its range.
        found = []
        for view in (1, 2):
            worth = states.coefficients[row, view, : len(canvas)][torch.tensor(movable)]
            shares = 0.5 / worth[worth > 0].double()
            found += (shares if view == 1 else 1 - shares).tolist()
        ratio = sum(found) / len(found) if found else 0.5
        assert all(abs(value - ratio) < 1e-5 for value in found) and 0.2 <= ratio <= 0.8
        tables = [masked_logps(policy, spec, prompt, canvas, view, first) for view in views]
        for i, counted in enumerate(counts):
            assert weights[row, i] == float(counted)
            if not counted:
                continue
            if first[i]:
                expected = tables[0][i]
            elif views[1][i]:
                expected = (tables[0][i] + tables[1][i] / ratio) / 2
            else:
                expected = (tables[0][i] + tables[2][i] / (1 - ratio)) / 2
            assert estimates[row, i].item() == close_to(expected.item())


def test_coupled_masks_with_its_ratio():
    spec = SPECS["full"]
    batch = decode(make_policy(spec), make_prompts((4,)), DECODINGS["greedy"]).select(torch.zeros(2000).long())
    states = states_of(batch, spec, EstimatorConfig("coupled"))
    drawn = batch.steps != NEVER
    hit = (states.coefficients[:, 1] > 0) & batch.completion_mask & drawn
    ratios = (0.5 / states.coefficients[:, 1].amax(1))[hit.any(1)]
    assert abs(ratios.mean() - 0.5) < 0.03 and ratios.min() < 0.25 and ratios.max() > 0.75
    # Given the ratio, each token is masked with that probability.
    low = ratios < 0.35
    assert hit[hit.any(1)][low].float().mean() / (drawn[0] & batch.completion_mask[0]).float().mean() < 0.4


@torch.no_grad()
def test_o5_elbo_against_an_enumeration(policy, spec):
    """
    Block-wise ELBO of a short response by enumerating every mask: `m` uniform in 1 to `n`, then every set of `m` tokens,
    each of its tokens with weight `n / m`. The estimator's mean over many masks approaches it; and one mask of it
    equals the term of that mask.
    """
    batch = rollout(policy, DECODINGS["two-per-step"])
    repeats = 40
    config = EstimatorConfig("elbo", num_draws=1)
    for row, prompt, canvas, never, first, counts, blocks in rows_of(batch, spec):
        one = batch.select(torch.full((repeats,), row))
        states = states_of(one, spec, config, seeds=list(range(repeats)))
        estimates, weights = estimate(policy, one, spec, config, seeds=list(range(repeats)))
        for repeat in range(2):
            hidden = states.hidden[repeat, 0, : len(canvas)].tolist()
            table = masked_logps(policy, spec, prompt, canvas, hidden, first)
            total = 0.0
            for group in sorted(set(blocks)) if spec.attention == "block" else [None]:
                own = [
                    i
                    for i in range(len(canvas))
                    if (group is None or blocks[i] == group) and not never[i] and not first[i]
                ]
                masked = [i for i in own if hidden[i]]
                assert not own or masked
                total += sum(table[i] * len(own) / len(masked) for i in masked if counts[i])
            total += sum(table[i] for i in range(len(canvas)) if first[i] and counts[i])
            got = (estimates[repeat] * weights[repeat]).sum().item()
            assert got == pytest.approx(float(total), abs=1e-3, rel=1e-4)


def test_o5_elbo_masks_follow_the_enumeration():
    """Every number of masked tokens is equally likely, every set of that size too, and weights make it unbiased."""
    spec = SPECS["full"]
    policy = make_policy(spec)
    config = replace(DECODINGS["greedy"], max_new_tokens=4)
    batch = decode(policy, make_prompts((4,)), config, spec.replace(block_size=4))
    spec = spec.replace(block_size=4)
    batch = replace(batch, completion_lengths=batch.canvas_lengths)
    size, repeats = 4, 6000
    many = batch.select(torch.zeros(repeats).long())
    states = states_of(many, spec, EstimatorConfig("elbo"), seeds=list(range(repeats)))
    patterns = states.hidden[:, 0, :size].long() @ torch.tensor([1, 2, 4, 8])
    for number in range(1, size + 1):
        subsets = list(itertools.combinations(range(size), number))
        for subset in subsets:
            share = (patterns == sum(1 << i for i in subset)).double().mean()
            chance = 1 / size / len(subsets)
            assert abs(share - chance) < 4.5 * (chance / repeats) ** 0.5
            hit = states.weights[patterns == sum(1 << i for i in subset)]
            for i in range(size):
                assert torch.allclose(hit[:, i], torch.tensor(size / number if i in subset else 0.0))


@pytest.mark.slow
@torch.no_grad()
def test_o5_random_order_one_token_a_step_all_masked_scored_is_the_elbo(named_spec):
    """docs/method.md, section 6: the estimator of a random order that scores every masked token with `n / m` has the mean of
    the one that scores the next token of that order, which is dtrpo's on a random order."""
    policy, spec = named_spec
    batch = rollout(policy, DECODINGS["two-per-step"]).select(torch.tensor([0, 3]))
    batch = replace(batch, completion_lengths=batch.canvas_lengths)  # all tokens count, for both estimators
    repeats = 600
    rows = torch.arange(2).repeat_interleave(repeats)
    seeds = list(range(2 * repeats))

    def mean_and_error(batch, config):
        totals = []
        for begin in range(0, len(batch), 400):
            part = batch.select(slice(begin, begin + 400))
            estimates, weights = estimate(policy, part, spec, config, seeds[begin : begin + 400])
            totals.append((estimates * weights).sum(1))
        totals = torch.cat(totals).view(2, repeats).double()
        return totals.mean(1), totals.std(1) / repeats**0.5

    many = batch.select(rows)
    elbo, elbo_error = mean_and_error(many, EstimatorConfig("elbo"))
    # The same tokens in a random order, one at a time: only the tokens a policy draws in a group move.
    groups, _, drawn, _ = token_states(spec, many, many.steps != NEVER)
    keys = torch.rand(groups.shape, generator=torch.Generator().manual_seed(1)).masked_fill(~drawn, 2.0) + 4 * groups
    order = keys.argsort(1).argsort(1)
    starts = torch.zeros(len(many), int(groups.max()) + 2, dtype=torch.long)
    starts.scatter_add_(1, groups + 1, torch.ones_like(groups))
    rank = order - starts.cumsum(1).gather(1, groups)
    if spec.attention == "full":
        # One block over the response, so that steps inside the block are steps of the response.
        spec = spec.replace(block_size=many.canvas_ids.shape[1])
    steps = torch.where(
        drawn, rank + int(spec.first_token == "autoregressive"), torch.where(many.steps == NEVER, NEVER, 0)
    )
    random_order = replace(many, steps=steps)
    dtrpo, dtrpo_error = mean_and_error(random_order, EstimatorConfig("dtrpo"))
    assert ((elbo - dtrpo).abs() < 5 * (elbo_error**2 + dtrpo_error**2).sqrt()).all()
    assert (elbo_error < dtrpo_error).all()  # and it is the less noisy one


def test_elbo_draws_average(named_spec):
    """K masks: the mean of K estimates, with one token's log-probabilities averaged by weight."""
    policy, spec = named_spec
    batch = rollout(policy, DECODINGS["two-per-step"])
    states = states_of(batch, spec, EstimatorConfig("elbo", num_draws=3))
    assert states.hidden.shape[1] == 3
    sums = states.coefficients.sum(1)
    torch.testing.assert_close(sums[states.weights > 0], torch.ones_like(sums[states.weights > 0]))
    assert (sums[states.weights == 0] == 0).all()
    counted = batch.completion_mask & (batch.steps != NEVER)
    repeats = 200
    many = batch.select(torch.arange(len(batch)).repeat_interleave(repeats))
    weights = states_of(many, spec, EstimatorConfig("elbo", num_draws=3)).weights
    weights = weights.unflatten(0, (len(batch), repeats)).double()
    errors = (weights.mean(1) - 1)[counted].abs()
    assert (errors <= 5 * weights.std(1)[counted] / repeats**0.5 + 1e-6).all()


@pytest.mark.parametrize("name", [*ESTIMATORS, "token-2", "two-blocks"])
@torch.no_grad()
def test_o7_estimates_do_not_depend_on_padding_or_neighbours(policy, spec, name):
    options = DTRPO_OPTIONS.get(name, {})
    skip_unless_it_applies(options, spec)
    config = EstimatorConfig(**options) if name in DTRPO_OPTIONS else EstimatorConfig(name)
    batch = rollout(policy, DECODINGS["two-per-step"])
    seeds = [7 + row for row in range(len(batch))]
    width = int(batch.completion_lengths.max())

    def weighted(batch, seeds):
        estimates, weights = estimate(policy, batch, spec, config, seeds)
        return (estimates * weights)[:, :width]

    expected = weighted(batch, seeds)
    assert_close(weighted(pad_differently(batch), seeds), expected)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    permuted = weighted(batch.select(order), [seeds[i] for i in order])
    assert_close(permuted, expected[order])
    for row in (0, 5):
        alone = weighted(batch.select(torch.tensor([row])), [seeds[row]])[0]
        assert_close(alone, expected[row, : len(alone)])
    before = torch.random.get_rng_state()
    weighted(batch, seeds)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["elbo", "mean_field", "coupled"])
@torch.no_grad()
def test_o9_masked_tokens_do_not_leak(named_spec, name):
    """What a view masks, and later blocks, do not move the log-probabilities of other tokens in that view."""
    policy, spec = named_spec
    batch = rollout(policy, DECODINGS["two-per-step"])
    states = states_of(batch, spec, EstimatorConfig(name))
    last_view = states.hidden.shape[1] - 1
    only = replace(states, coefficients=states.coefficients * (torch.arange(last_view + 1) == last_view)[:, None])
    before = score(policy, pack(batch, spec, only, one_row=False), spec)[0]
    blocks = response_blocks(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
    last = blocks == torch.where(batch.completion_mask, blocks, -1).amax(1, keepdim=True)
    hidden = states.hidden[:, last_view] & (last | torch.tensor(spec.attention == "full"))
    for parity in (0, 1):  # change every other hidden token; the rest of them must not notice
        moved = hidden & (torch.arange(hidden.shape[1]) % 2 == parity)
        changed = replace(batch, canvas_ids=torch.where(moved, (batch.canvas_ids + 7) % MASK, batch.canvas_ids))
        after = score(policy, pack(changed, spec, only, one_row=False), spec)[0]
        kept = (before != 0) & ~moved
        assert kept.any()
        assert_close(before[kept], after[kept])


BLOCK_SPECS = [name for name, spec in SPECS.items() if spec.attention == "block"]


@pytest.mark.parametrize("name", BLOCK_SPECS)
@pytest.mark.parametrize("estimator", ["dtrpo", "exact", "coupled", "two-blocks"])
@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 3, 4)])
def test_shared_prompts_change_no_number(name, estimator, sizes):
    """Log-probabilities and gradients with shared prompts, segmented or dense, equal those of separate rows."""
    spec = SPECS[name]
    policy, segmented = make_policy(spec), make_policy(spec)
    assert enable_plans(segmented) and segmented.config._attn_implementation == PLANNED
    batch = group_rollout(policy, sizes)
    config = EstimatorConfig(num_blocks=2) if estimator == "two-blocks" else EstimatorConfig(estimator)
    results = []
    for model, share in ((policy, False), (policy, True), (segmented, True)):
        layout = pack(batch, spec, states_of(batch, spec, config), ESTIMATORS[config.name].one_row, share)
        assert (layout.allowed.count > 1) == share
        logps, entropies = score(model, layout, spec, compute_entropy=True)
        model.zero_grad()
        (logps * layout.weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logps.detach(), entropies, gradient, layout.input_ids.numel()))
    for other in results[1:]:
        assert_close(other[0], results[0][0])
        assert_close(other[1], results[0][1])
        assert_close_gradients(other[2], results[0][2])
    assert results[1][3] < results[0][3]  # and there is less to run


@pytest.mark.parametrize("counted", [0, 1])
@torch.no_grad()
def test_shared_prompts_of_responses_of_next_to_nothing(counted):
    """All is read from the prompt, or nothing is scored: the responses' own parts of a row are empty."""
    spec = SPECS["shift-autoregressive-first"]
    policy, planned = make_policy(spec), make_policy(spec)
    assert enable_plans(planned)
    batch = group_rollout(policy, (2, 2), (8, 24))
    batch = replace(batch, completion_lengths=torch.full_like(batch.completion_lengths, counted))
    results = []
    for model, share in ((policy, False), (policy, True), (planned, True)):
        layout = pack(batch, spec, states_of(batch, spec, EstimatorConfig()), True, share)
        results.append(score(model, layout, spec)[0])
    assert (results[0] != 0).sum() == 4 * counted
    for other in results[1:]:
        assert_close(other, results[0])


def test_who_shares_a_prompt():
    policy = make_policy(SPECS["block-from-sequence"])
    assert shared_prompts(group_rollout(policy, (2, 2, 2))).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert shared_prompts(group_rollout(policy, (2, 1, 2))).tolist() == [[0, 1], [2, -1], [3, 4]]
    assert shared_prompts(group_rollout(policy, (1, 1, 1))) is None
    assert shared_prompts(group_rollout(policy, (6, 1, 1))) is None  # rows would be mostly padding
    same_ids = group_rollout(policy, (2, 2, 2), lengths=(8, 8, 8))
    assert shared_prompts(same_ids).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_segmented_model_runs_everything_else_as_before():
    spec = SPECS["block-from-sequence"]
    policy, segmented = make_policy(spec), make_policy(spec)
    enable_plans(segmented)
    ids = torch.randint(6, MASK, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    for arguments in ({}, {"attention_mask": mask}):
        assert_close(policy(ids, **arguments).logits[1], segmented(ids, **arguments).logits[1])
    eager = make_policy(spec, attn_implementation="eager")
    assert not enable_plans(eager) and eager.config._attn_implementation == "eager"


@pytest.mark.slow
@torch.no_grad()
def test_quality_of_an_estimate():
    spec = SPECS["block-from-sequence"]
    policy = make_policy(spec)
    reference = another(policy)
    batch = rollout(policy, DECODINGS["two-per-step"])

    def log_ratios(layout):
        return score(policy, layout, spec)[0] - score(reference, layout, spec)[0]

    seeds = list(range(len(batch)))
    quality = estimate_quality(log_ratios, batch, spec, EstimatorConfig(), seeds, num_estimates=64)
    plain = plain_forward_logps(policy, spec, batch, 1.0) - plain_forward_logps(reference, spec, batch, 1.0)
    exact = (plain * writes_that_count(spec, batch)).sum(1)
    assert_close(quality.exact, exact.double())
    standard_error = quality.std / (quality.estimates.numel()) ** 0.5
    assert abs(quality.bias) < 4 * standard_error
    assert 0.2 < quality.correlation <= 1.0
    better = estimate_quality(log_ratios, batch, spec, EstimatorConfig(num_draws=8), seeds, num_estimates=8)
    assert better.std < 1e-3 < quality.std / 10  # 8 draws of blocks of 8 leave nothing to chance
    assert better.correlation > 0.999
    same = estimate_quality(lambda layout: torch.zeros_like(layout.weights), batch, spec, EstimatorConfig(), seeds)
    assert same.correlation != same.correlation


def test_ratio_statistics():
    log_ratios = torch.tensor([[0.5, -1.0, 9.0], [0.0, 0.3, 9.0]])
    weights = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 0.0]])
    halves = [ratio_statistics(log_ratios[i : i + 1], weights[i : i + 1]) for i in (0, 1)]
    found = summarise_ratios(halves[0] + halves[1])
    flat, w = log_ratios[:, :2].flatten().double(), weights[:, :2].flatten().double()
    mean = (w * flat).sum() / w.sum()
    assert found["log_ratio_std"] == pytest.approx(((w * (flat - mean) ** 2).sum() / w.sum()).sqrt().item(), rel=1e-5)
    ratios = flat.exp()
    size = (w * ratios).sum() ** 2 / (w.sum() * (w * ratios**2).sum())
    assert found["effective_sample_size"] == pytest.approx(size.item(), rel=1e-5)
    assert found["kl_to_old"] == pytest.approx(((w * (ratios - 1 - flat)).sum() / w.sum()).item(), rel=1e-5)
    equal = summarise_ratios(ratio_statistics(torch.zeros(2, 3), weights))
    draws = w.sum() ** 2 / (4 * (w**2).sum())
    assert found["effective_draws"] == pytest.approx(draws.item(), rel=1e-5)
    same = {"log_ratio_std": 0.0, "effective_sample_size": 1.0, "kl_to_old": 0.0}
    assert equal == {**same, "effective_draws": pytest.approx(draws.item(), rel=1e-5)}
    assert summarise_ratios(torch.zeros(8)) == {**same, "effective_draws": 1.0}


@pytest.mark.parametrize(
    "options",
    [
        {"name": "vrpo"},
        {"num_draws": 0},
        {"num_blocks": 0},
        {"step_distribution": "best"},
        {"weighting": "half"},
        {"name": "mean_field", "prompt_mask_probability": 1.0},
        {"name": "exact", "num_draws": 2},
        {"name": "elbo", "step_distribution": "token"},
        {"name": "coupled", "num_blocks": 3},
        {"name": "dtrpo", "prompt_mask_probability": 0.5},
    ],
)
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=list(options)[-1] if options != {"name": "vrpo"} else "estimator"):
        EstimatorConfig(**options)


def test_blocks_are_for_block_attention():
    spec = SPECS["full"]
    policy = make_policy(spec)
    with pytest.raises(ValueError, match="num_blocks"):
        states_of(rollout(policy, DECODINGS["greedy"]), spec, EstimatorConfig(num_blocks=2))
    assert STOP in spec.stop_token_ids
