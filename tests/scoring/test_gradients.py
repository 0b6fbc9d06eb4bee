"""
O6 of docs/method.md for every option: the gradient of an estimator, averaged over all that it can draw, is that of the exact
objective. What can be drawn, and how likely it is, is enumerated from section 2; states and weights are the estimator's.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from functools import cache

import pytest
import torch

from tests.conftest import SPECS, make_policy, make_prompts
from tests.reference import (
    another,
    masked_logps,
    plain_forward_logps,
    possible_sets,
    rows_of,
    weights_of,
    writes_that_count,
)
from trl_diffusion.scoring import estimators
from trl_diffusion.scoring.draws import draw_steps
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score
from trl_diffusion.trajectories.trajectory import (
    NEVER,
    TrajectoryBatch,
    autoregressive_positions,
    response_blocks,
    token_states,
)


OPTIONS = {
    "importance": {},
    "importance-2": {"num_draws": 2},
    "importance-one-block": {"num_blocks": 1},
    "uniform": {"step_distribution": "uniform"},
    "uniform-2": {"step_distribution": "uniform", "num_draws": 2},
    "uniform-4": {"step_distribution": "uniform", "num_draws": 4},  # more than a block has steps
    "token": {"step_distribution": "token"},
    "token-2": {"step_distribution": "token", "num_draws": 2},
    "one-block": {"step_distribution": "uniform", "num_blocks": 1},
    "one-block-token-2": {"num_blocks": 1, "step_distribution": "token", "num_draws": 2},
    "none-uniform-2": {"weighting": "none", "step_distribution": "uniform", "num_draws": 2},
    "none-token": {"weighting": "none", "step_distribution": "token"},
    "none-one-block-token-2": {
        "weighting": "none", "num_blocks": 1, "step_distribution": "token", "num_draws": 2,
    },
}  # fmt: skip
NAMES = [
    "block-from-sequence",
    "block-from-response",
    "shift-autoregressive-first",
    "full",
    "clean-causal-autoregressive-first",
]
ADVANTAGES = (0.7, -1.3)


PROBABILITIES = (torch.arange(16) * 7) % 40 + 12  # of each position, recorded, in 64ths


def hand_made(spec, block_size: int) -> TrajectoryBatch:
    """
    Two responses of at most two blocks, whose steps unmask unequal numbers of tokens. The second one begins inside a
    block if blocks are counted from the prompt, stops before its canvas does, and has a token that is never unmasked.
    """
    prompts = make_prompts((block_size, block_size + 2))
    by_position = [[1, 2, 0, 1], [0, 2, 0, 1]]  # the step of each position of the first and of the second block
    rows = []
    for row, prompt in enumerate(prompts):
        tail = len(prompt) % block_size if spec.block_origin == "sequence" else 0
        steps = []
        for place in range(tail, 2 * block_size):
            first = place % block_size == 0 and spec.first_token == "autoregressive"
            after_first = int(spec.first_token == "autoregressive")
            steps.append(0 if first else by_position[place // block_size][place % block_size] + after_first)
        if row == 1:
            steps[-2] = NEVER
        rows.append(steps)
    width = 2 * block_size
    lengths = torch.tensor([len(steps) for steps in rows])
    canvas = torch.randint(6, 30, (2, width), generator=torch.Generator().manual_seed(7))
    return TrajectoryBatch(
        prompt_ids=torch.tensor([[0] * (block_size + 2 - len(prompt)) + prompt for prompt in prompts]),
        prompt_mask=torch.tensor([[0] * (block_size + 2 - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        canvas_ids=canvas,
        steps=torch.tensor([steps + [NEVER] * (width - len(steps)) for steps in rows]),
        logps=(PROBABILITIES[:width].double() / 64).log().float().expand(2, -1),
        canvas_lengths=lengths,
        completion_lengths=torch.tensor([width, int(lengths[1]) - 1]),
    )


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A policy, its spec with blocks of 4, the responses above; log-probabilities that the policy, with a graph, and an
    old one give their tokens."""
    spec = SPECS[request.param].replace(block_size=4)
    policy, batch = make_policy(spec).double(), hand_made(spec, 4)
    with torch.no_grad():
        old = plain_forward_logps(another(policy), spec, batch, 1.0)
    return policy, spec, batch, plain_forward_logps(policy, spec, batch, 1.0), old


def tokens_of(spec, batch: TrajectoryBatch, row: int, distribution: str = "token"):
    """
    Per block (full attention: of the response): what the draw of a state is proportional to, which is the number of counted
    tokens that it unmasked, or nine tenths surprise and one tenth evenly; and of each counted token its block and state, or
    `None` if it is made autoregressively. Counted with plain loops.
    """
    block_of = response_blocks(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])[row].tolist()
    alone = autoregressive_positions(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])[row].tolist()
    steps = batch.steps[row].tolist()
    order = sorted({(block_of[i], step) for i, step in enumerate(steps) if step != NEVER})
    places = {}
    for i in writes_that_count(spec, batch)[row].nonzero().flatten().tolist():
        if spec.attention == "full":
            places[i] = (0, order.index((block_of[i], steps[i])))
        else:
            places[i] = (block_of[i], None if alone[i] else steps[i])
    blocks = sorted({block for block, _ in places.values()})
    assert blocks == list(range(len(blocks)))
    sizes = [Counter(s for b, s in places.values() if b == block and s is not None) for block in blocks]
    if distribution == "importance":
        surprises = [Counter() for _ in blocks]
        for i, (block, state) in places.items():
            if state is not None:
                surprises[block][state] += Fraction(64 - int(PROBABILITIES[i]), 64)
        sizes = [
            {t: Fraction(9, 10) * m / sum(masses.values()) + Fraction(1, 10 * len(masses)) for t, m in masses.items()}
            for masses in surprises
        ]
    return sizes, places


def enumerated(step_distribution: str) -> str:
    """How `possible_sets` calls a distribution: importance draws are in proportion to sizes, as those by tokens are."""
    return "uniform" if step_distribution == "uniform" else "token"


def possible_draws(blocks: list[Counter], step_distribution="importance", num_draws=1, num_blocks=None):
    """
    Every draw and its probability: per block the drawn steps in ascending order, or `None` for a block left out.
    """

    def of_block(sizes: Counter) -> dict[tuple[int, ...], float]:
        return possible_sets(dict(sizes), enumerated(step_distribution), num_draws) if sizes else {(): 1.0}

    subsets = list(itertools.combinations(range(len(blocks)), min(num_blocks or len(blocks), len(blocks))))
    result: dict[tuple, float] = Counter()
    for subset in subsets:
        per_block = [of_block(sizes) if b in subset else {None: 1.0} for b, sizes in enumerate(blocks)]
        for combination in itertools.product(*(chances.items() for chances in per_block)):
            result[tuple(drawn for drawn, _ in combination)] += math.prod(p for _, p in combination) / len(subsets)
    assert sum(result.values()) == pytest.approx(1.0)
    return result


def seeds_of_draws(spec, batch: TrajectoryBatch, row: int, options: dict, chances: dict, repeats: int):
    """A seed with which each possible draw is drawn. Nothing else is, and each as often as its probability says."""
    many = batch.select(torch.full((repeats,), row))
    names = {"step_distribution": "distribution"}
    options = {"distribution": "importance", **{names.get(k, k): v for k, v in options.items()}}
    draw = draw_steps(token_states(spec, many), list(range(repeats)), surprises=1 - many.logps.exp(), **options)
    scored = (draw.block_weights > 0).tolist()
    found = [
        tuple(tuple(sorted(s for s in steps if s >= 0)) if own else None for steps, own in zip(*pair, strict=True))
        for pair in zip(draw.steps.tolist(), scored, strict=True)
    ]
    counts = Counter(found)
    assert set(counts) == set(chances)
    for outcome, chance in chances.items():
        assert abs(counts[outcome] / repeats - chance) <= 5 * (chance * (1 - chance) / repeats) ** 0.5
    return [found.index(outcome) for outcome in chances]


def objectives(logps, old, advantage):
    """Of each token: its log-probability, of which the log-ratio is the sum; and its clipped policy-gradient loss."""
    ratio = (logps - old).exp()
    return logps, -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def gradients(policy, values):
    """The gradient of each of some objectives, as one vector each."""
    parameters = list(policy.parameters())
    found = [torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in values]
    return [torch.cat([g.flatten() for g in grads if g is not None]) for grads in found]


def assert_same_gradients(policy, estimated, exact):
    for ours, theirs in zip(gradients(policy, estimated), gradients(policy, exact), strict=True):
        scale = theirs.abs().max().item()
        assert scale > 1e-2
        torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_o6_enumerated_draws_have_the_exact_gradient(case, name):
    policy, spec, batch, plain, old = case
    options = OPTIONS[name]
    if "num_blocks" in options and spec.attention == "full":
        pytest.skip("a full-attention response is one group")
    how_many = {k: v for k, v in options.items() if k != "weighting"}
    estimated, exact = [0.0, 0.0], [0.0, 0.0]
    for row, advantage in enumerate(ADVANTAGES):
        distribution = options.get("step_distribution", "importance")
        blocks, places = tokens_of(spec, batch, row, distribution)
        chances = possible_draws(blocks, **how_many)
        assert len(chances) > (1 if row == 0 and name != "uniform-4" else 0)
        seeds = seeds_of_draws(spec, batch, row, options, chances, repeats=3000)
        many = batch.select(torch.full((len(seeds),), row))
        states = ESTIMATORS["dtrpo"].states(many, spec, seeds, EstimatorConfig(**options))
        layout = pack(many, spec, states)
        logps = score(policy, layout, spec)[0]
        shares = torch.tensor(list(chances.values()))[:, None] * layout.weights
        for which, values in enumerate(objectives(logps, old[row] * (layout.weights > 0), advantage)):
            estimated[which] = estimated[which] + (shares * values).sum()

        worth = torch.zeros(batch.canvas_ids.shape[1])
        draws = (enumerated(distribution), options.get("num_draws", 1))
        inverse = [weights_of(possible_sets(dict(size), *draws)) if size else {} for size in blocks]
        for place, (block, state) in places.items():
            worth[place] = 1.0
            if options.get("weighting") == "none":  # each step of a block is worth the probability of one draw
                size = blocks[block]
                if state is not None:
                    worth[place] = 1 / inverse[block][state] / min(draws[1], len(size))
                worth[place] *= min(options.get("num_blocks", len(blocks)), len(blocks)) / len(blocks)
        for which, values in enumerate(objectives(plain[row], old[row], advantage)):
            exact[which] = exact[which] + (values * worth).sum()
    assert_same_gradients(policy, estimated, exact)


def possible_masks(kind: str, groups: list, prompt: int) -> dict[tuple, float]:
    """Every set of masked tokens (mean field: of prompt tokens) and its probability; groups are masked independently."""

    def of_group(group: list[int], subset: tuple[int, ...]) -> float:
        if kind == "elbo":  # a number, then a set of that size
            return 1 / len(group) / math.comb(len(group), len(subset)) if subset else 0.0
        return 0.4 ** len(subset) * 0.6 ** (len(group) - len(subset))

    result = {(): 1.0}
    for group in [list(range(prompt))] if kind == "mean_field" else groups:
        subsets = [s for n in range(len(group) + 1) for s in itertools.combinations(group, n)]
        result = {
            (*before, *subset): chance * of_group(group, subset)
            for before, chance in result.items()
            for subset in subsets
            if not group or of_group(group, subset) > 0
        }
    assert sum(result.values()) == pytest.approx(1.0)
    return result


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("block-from-sequence", kind) for kind in ("elbo", "coupled")),
        *(("shift-autoregressive-first", kind) for kind in ("elbo", "mean_field")),
        *(("full", kind) for kind in ("mean_field", "coupled")),
    ],
)
def test_o6_enumerated_masks_have_the_gradient_of_the_mean(monkeypatch, name, kind):
    """The baselines: their mean over all masks, written out with plain forward passes."""
    monkeypatch.setattr(estimators, "COUPLED_RANGE", (0.4, 0.4))
    spec = SPECS[name].replace(block_size=3)
    policy = make_policy(spec).double()
    batch = hand_made(spec, 3)
    config = EstimatorConfig(kind, **({"prompt_mask_probability": 0.4} if kind == "mean_field" else {}))
    estimated, exact, repeats = 0.0, 0.0, 1500
    for row, prompt, canvas, never, first, counts, blocks in rows_of(batch, spec):
        movable = tuple(i for i in range(len(canvas)) if not never[i] and not first[i])
        always = tuple(i for i in range(len(canvas)) if first[i])  # made autoregressively, with weight 1
        groups = [movable]
        if spec.attention == "block":
            groups = [[i for i in movable if blocks[i] == block] for block in sorted(set(blocks))]
        chances = possible_masks(kind, groups, len(prompt))

        states = ESTIMATORS[kind].states(batch.select(torch.full((repeats,), row)), spec, list(range(repeats)), config)
        if kind == "mean_field":
            hidden = states.prompt_hidden[:, batch.prompt_mask[row] == 1].tolist()
            found = [tuple(i for i, hit in enumerate(hits) if hit) for hits in hidden]
        else:
            hidden = states.hidden[:, int(kind == "coupled")].tolist()
            found = [tuple(i for i in movable if hits[i]) for hits in hidden]
        tally = Counter(found)
        assert set(tally) == set(chances)
        for outcome, chance in chances.items():
            assert abs(tally[outcome] / repeats - chance) <= 5 * (chance * (1 - chance) / repeats) ** 0.5
        seeds = [found.index(outcome) for outcome in chances]
        many = batch.select(torch.full((len(seeds),), row))
        layout = pack(many, spec, ESTIMATORS[kind].states(many, spec, seeds, config), one_row=False)
        shares = torch.tensor(list(chances.values()))[:, None] * layout.weights
        estimated = estimated + (shares * score(policy, layout, spec)[0]).sum()

        @cache
        def table(masked, prompt=tuple(prompt), canvas=canvas, never=never, first=first):
            hidden = [never[i] or i in masked for i in range(len(canvas))]
            return masked_logps(policy, spec, list(prompt), canvas, hidden, first)

        for masked, chance in chances.items():
            if kind == "mean_field":
                shown = tuple(spec.mask_token_id if i in masked else token for i, token in enumerate(prompt))
                values = [(table(movable, shown), movable + always, [1.0] * (len(movable) + len(always)))]
            elif kind == "elbo":
                number = {i: len(group) / len(set(group) & set(masked)) for group in groups for i in group}
                values = [(table(masked), (*masked, *always), [number.get(i, 1.0) for i in (*masked, *always)])]
            else:
                others = tuple(i for i in movable if i not in masked)
                values = [
                    (table(movable), movable, [0.5] * len(movable)),
                    (table(movable), always, [1.0] * len(always)),
                    (table(masked), masked, [0.5 / 0.4] * len(masked)),
                    (table(others), others, [0.5 / 0.6] * len(others)),
                ]
            for logps, places, worths in values:
                exact = exact + chance * sum(logps[i] * w for i, w in zip(places, worths, strict=True) if counts[i])
    assert_same_gradients(policy, [estimated], [exact])


def test_the_responses_cover_what_they_should():
    spec = SPECS["block-from-sequence"].replace(block_size=4)
    batch = hand_made(spec, 4)
    assert tokens_of(spec, batch, 0)[0] == [Counter({0: 1, 1: 2, 2: 1}), Counter({0: 2, 1: 1, 2: 1})]
    sizes = [len(sizes) for sizes in tokens_of(spec, batch, 1)[0]]
    assert sizes == [2, 3] and (batch.steps[1, : batch.canvas_lengths[1]] == NEVER).sum() == 1
    assert batch.completion_lengths[1] < batch.canvas_lengths[1]
