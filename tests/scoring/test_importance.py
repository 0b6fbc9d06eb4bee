"""
Importance draws: a step is drawn nearly in proportion to how surprised the policy was by its tokens (docs/method.md, section 2).
O1, O2 and O4 for them; everything else about draws is tested for every distribution alike.
"""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch

from tests.closeness import assert_close
from tests.conftest import SPECS, make_policy
from tests.reference import DECODINGS, hand_made_steps, possible_sets, rollout, weights_of, writes_that_count
from trl_diffusion.scoring.draws import count_tokens, draw_steps, inclusion, step_sizes
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.trajectories.trajectory import TokenStates


BLOCKS, STEPS, COUNTED = hand_made_steps()
# Surprises that float32 holds exactly. Block 1 of the second response has none.
SURPRISES = torch.tensor(
    [[48, 1, 16, 3, 0, 2, 0, 60, 5, 40], [7, 33, 0, 0, 0, 0, 9, 64, 12, 50]], dtype=torch.float32
) / 64  # fmt: skip


def sizes_of(row: int, block: int) -> dict[int, Fraction]:
    """Of each step of a block that takes part, its share of one draw: nine tenths by surprise, one tenth evenly."""
    here = [
        (int(STEPS[row, c]), Fraction(int(SURPRISES[row, c] * 64), 64))
        for c in range(BLOCKS.shape[1])
        if COUNTED[row, c] and STEPS[row, c] >= 0 and BLOCKS[row, c] == block
    ]
    steps = {step for step, _ in here}
    total = sum(surprise for _, surprise in here)
    if total == 0:
        return dict.fromkeys(steps, Fraction(1, len(steps)))
    masses = {step: sum(surprise for s, surprise in here if s == step) for step in steps}
    return {step: Fraction(9, 10) * masses[step] / total + Fraction(1, 10 * len(steps)) for step in steps}


@pytest.mark.parametrize("num_draws", [1, 2, 3])
def test_o2_draws_follow_the_enumerated_distribution_and_are_unbiased(num_draws):
    repeats = 4000
    tokens = TokenStates(*(values.repeat_interleave(repeats, 0) for values in (BLOCKS, STEPS, COUNTED, COUNTED)))
    draw = draw_steps(
        tokens, list(range(2 * repeats)), "importance", num_draws, surprises=SURPRISES.repeat_interleave(repeats, 0)
    )
    for row, block in itertools.product(range(2), range(3)):
        outcomes = possible_sets(sizes_of(row, block), "token", num_draws)  # as `"token"`, with these sizes
        drawn = draw.steps[row * repeats : (row + 1) * repeats, block]
        found = Counter(tuple(sorted(t for t in steps if t >= 0)) for steps in drawn.tolist())
        assert set(found) == set(outcomes)
        for outcome, chance in outcomes.items():
            assert abs(found[outcome] / repeats - chance) <= 4 * (chance * (1 - chance) / repeats) ** 0.5
        for step, weight in weights_of(outcomes).items():
            weights = draw.weights[row * repeats : (row + 1) * repeats, block][drawn == step]
            assert_close(weights, torch.full_like(weights, weight))
            # Probability times weight is 1 for every step, so the expectation is the sum over all steps.
            assert weight * sum(p for steps, p in outcomes.items() if step in steps) == pytest.approx(1.0)


@pytest.mark.parametrize("num_draws", [1, 2, 5])
def test_weights_are_bounded_as_documented(num_draws):
    generator = torch.Generator().manual_seed(num_draws)
    steps = torch.randint(0, 9, (200, 40), generator=generator)
    surprises = torch.rand(200, 40, generator=generator) ** 12  # most are next to nothing
    everything = torch.ones_like(steps, dtype=torch.bool)
    tokens = TokenStates(torch.zeros_like(steps), steps, everything, everything)
    counts = count_tokens(*tokens[:3])
    chances = inclusion(step_sizes(tokens, counts, "importance", surprises), num_draws)
    taking_part = counts > 0
    number = taking_part.sum(-1, keepdim=True)
    bound = (10 * number.double() / num_draws).clamp(min=1.0).expand_as(chances)
    assert (1 / chances[taking_part] <= bound[taking_part] * (1 + 1e-9)).all()
    assert_close(chances.sum(-1), number[..., 0].clamp(max=num_draws).double())
    assert (1 / chances[taking_part]).max() > 5  # some steps are drawn rarely indeed


def test_without_surprises_the_draw_is_uniform():
    tokens = TokenStates(BLOCKS, STEPS, COUNTED, COUNTED)
    counts = count_tokens(BLOCKS, STEPS, COUNTED)
    for surprises in (torch.zeros(BLOCKS.shape), torch.full(BLOCKS.shape, -0.0)):
        found = inclusion(step_sizes(tokens, counts, "importance", surprises), 2)
        assert torch.equal(found, inclusion(step_sizes(tokens, counts, "uniform"), 2))


def test_what_an_importance_draw_cannot_do():
    tokens = TokenStates(BLOCKS, STEPS, COUNTED, COUNTED)
    for options in ({}, {"surprises": SURPRISES, "weighting": "none"}):
        with pytest.raises(ValueError, match="needs `surprises` and `weighting='unbiased'`"):
            draw_steps(tokens, [0, 1], "importance", **options)
    with pytest.raises(ValueError, match="'importance'` needs `weighting='unbiased'`"):
        EstimatorConfig(step_distribution="importance", weighting="none")


OPTIONS = {"one": {}, "two": {"num_draws": 2}, "one-block": {"num_blocks": 1, "num_draws": 2}}


@pytest.mark.parametrize(
    "name", ["block-from-sequence", "shift-autoregressive-first", "clean-causal-autoregressive-first", "full"]
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_o1_and_o2_through_the_packed_pass(name, options):
    """Drawn tokens have the log-probability that was recorded, and every token weighs one on average."""
    spec = SPECS[name]
    if "num_blocks" in options and spec.attention == "full":
        pytest.skip("a full-attention response is one group")
    policy = make_policy(spec)
    batch = rollout(policy, DECODINGS["two-per-step"])
    config, repeats = EstimatorConfig(step_distribution="importance", **options), 800
    few = ESTIMATORS["dtrpo"].states(batch, spec, list(range(len(batch))), config)
    layout = pack(batch, spec, few)
    logps, _ = score(policy, layout, spec)
    scored = layout.weights > 0
    assert scored.any()
    assert_close(logps[scored], batch.logps[scored])

    rows = torch.arange(len(batch)).repeat_interleave(repeats)
    states = ESTIMATORS["dtrpo"].states(batch.select(rows), spec, list(range(len(rows))), config)
    weights = states.weights.unflatten(0, (len(batch), repeats)).double()
    counted = writes_that_count(spec, batch)
    errors = (weights.mean(1) - 1)[counted]
    assert (errors.abs() <= 5 * weights.std(1)[counted] / repeats**0.5 + 1e-6).all()
    assert (weights.mean(1)[~counted] == 0).all()


@pytest.mark.parametrize("num_draws", [1, 2])
def test_o4_variance(num_draws):
    """That of all possible draws, against 8,000 of them; far below a uniform draw's where log-ratios go with surprise."""
    blocks, steps, counted, surprises = (values[:1] for values in (BLOCKS, STEPS, COUNTED, SURPRISES))
    ratios = (surprises + 0.01).double()
    expected, repeats = 0.0, 8000
    for block in range(3):
        sizes = sizes_of(0, block)
        worth = {t: ratios[0][(blocks[0] == block) & (steps[0] == t)].sum().item() for t in sizes}
        outcomes = possible_sets(sizes, "token", num_draws)
        weights = weights_of(outcomes)
        for drawn, chance in outcomes.items():
            expected += chance * (sum(weights[t] * worth[t] for t in drawn) - sum(worth.values())) ** 2
    found = {}
    for distribution in ("importance", "uniform"):
        tokens = TokenStates(*(values.expand(repeats, -1) for values in (blocks, steps, counted, counted)))
        draw = draw_steps(
            tokens, list(range(repeats)), distribution, num_draws, surprises=surprises.expand(repeats, -1)
        )
        hit = draw.steps[:, blocks[0]] == steps[0, :, None]
        estimates = ((hit * draw.weights[:, blocks[0]]).sum(-1) * ratios).sum(1)
        found[distribution] = (estimates - ratios.sum()) ** 2
    squares = found["importance"]
    assert abs(squares.mean() - expected) < 5 * squares.std() / repeats**0.5
    assert squares.mean() < 0.2 * found["uniform"].mean()
