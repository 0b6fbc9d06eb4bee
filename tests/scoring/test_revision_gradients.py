"""
Decoders that take tokens back: the score whose expected gradient is the gradient of the expected reward (O13), and ratios with mean 1
(O14). All decodings of toy policies are enumerated, in float64.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from tests.conftest import make_policy
from tests.events import events_of, moments
from tests.scoring.test_expected_gradients import stated
from tests.scoring.toys import MASK, STOP, TOKENS, Chain, Node, Toy
from trl_diffusion.decoding import loop
from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.decoding.decode import decode
from trl_diffusion.decoding.revising import Revising
from trl_diffusion.decoding.strategies import SELECT_BY_SAMPLE
from trl_diffusion.trajectories.trajectory import counted_writes


BLIND = ("confidence", "threshold", "entropy", "entropy_bound", "margin", "random", "left_to_right")
REVISIONS = ("confidence", "self_planning", "random", "edit")
NEVER_WHEN_FULL = ("self_planning", "random")  # they take a token back only while others are masked


def leftmost_unlikely(view):
    """A strategy of a user: the leftmost visible token with a probability below 0.3."""
    places = torch.arange(view.visible.shape[1], dtype=torch.float).expand(view.visible.shape)
    return view.first(places, view.visible & (view.shown_logps.exp() < 0.3), view.limit)


# Every way to end: limits of writes, of steps of a block, of steps after it was filled, and none of them.
SCHEDULES = {
    "once each": {"revision_limit": 1},
    "once each, two at a time": {"revision_limit": 1, "tokens_per_step": 2, "revision_max": 2},
    "steps": {"revision_limit": 2, "steps_per_block": 4, "fill_share": 0.5, "revision_max": 2},
    "steps, filled late": {"revision_limit": 1, "steps_per_block": 4, "fill_share": 0.8},
    "steps after filling": {"revision_limit": 3, "revision_steps": 2, "tokens_per_step": 2, "revision_max": 3},
    "no step after filling": {"revision_limit": 2, "revision_steps": 1},
}  # fmt: skip


def settings(revision, strategy: str, cells: int = 3, **more) -> DecodingConfig:
    values = {
        "threshold": 0.6, "entropy_bound": 1.2, "revision_threshold": 0.45, "edit_threshold": 0.4, "revision_rate": 0.35, **more,
    }  # fmt: skip
    return DecodingConfig(cells, temperature=1.0, strategy=strategy, revision=revision, **values)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("revision", REVISIONS)
def test_o13_and_o14_hold_for_every_write(revision, schedule):
    """Whether it was taken back or not, with every strategy that does not look at the sampled token."""
    cells, seen = 4 if schedule == "once each" else 3, set()
    toy, new = Toy(cells, 0), Toy(cells, 1)
    for strategy in BLIND:
        if strategy == "entropy_bound" and "steps_per_block" in SCHEDULES[schedule]:
            continue  # it has no schedule
        chain = Chain(toy, settings(revision, strategy, cells, **SCHEDULES[schedule]))
        scores = chain.scores()
        total, error, _ = chain.expectations(scores)
        assert total == pytest.approx(1.0, rel=1e-12)
        assert error <= 1e-10
        # What the old policy wrote and took back, and where, is taken as given.
        assert chain.mean_ratio((chain.scores(new) - scores).detach()) == pytest.approx(1.0, rel=1e-10)
        seen |= taken_back(chain)
    assert seen == {*TOKENS} or (revision in NEVER_WHEN_FULL and schedule != "once each")


def taken_back(chain: Chain) -> set[int]:
    """Tokens that a decoding can take back."""
    found = set()
    for situation, (writes, erased) in chain.changes:
        cells = [*erased, *(cell for cell, _ in writes if situation[0][cell] != MASK)]
        found |= {situation[0][cell] for cell in cells}
    return found


def test_o13_and_o14_in_several_blocks_and_with_a_strategy_of_a_user():
    """Earlier blocks are revised until the response ends."""
    for way in (Revising(leftmost_unlikely), Revising(leftmost_unlikely, edits=True), *REVISIONS):
        toy = Toy(4, 2, block_size=2)
        chain = Chain(toy, settings(way, "confidence", 4, revision_limit=1))
        scores = chain.scores()
        total, error, _ = chain.expectations(scores)
        assert total == pytest.approx(1.0, rel=1e-12) and error <= 1e-10
        assert chain.mean_ratio((chain.scores(Toy(4, 1)) - scores).detach()) == pytest.approx(1.0, rel=1e-10)
        # A token of the first block is taken back while the second one is denoised.
        later = [(node, chain.changes[number]) for node, number, _ in chain.edges if node.block == 1]
        cells = {cell for _, (_, (writes, erased)) in later for cell in (*erased, *(cell for cell, _ in writes))}
        assert cells & {0, 1}


@pytest.mark.parametrize("revision", REVISIONS)
@pytest.mark.parametrize("strategy", SELECT_BY_SAMPLE)
def test_o13_holds_with_the_selection(strategy, revision):
    """Strategies that unmask by the sampled token. An edit is no part of the selection."""
    for more in (
        {"revision_limit": 1, "tokens_per_step": 2},
        {"revision_limit": 2, "steps_per_block": 3, "fill_share": 1.0},
    ):
        config = settings(revision, strategy, score_selection=True, **more)
        chain = Chain(Toy(3, 0), config)
        total, error, _ = chain.expectations(chain.scores())
        assert total == pytest.approx(1.0, rel=1e-12) and error <= 1e-10
        possible = chain.chances() > 0
        assert torch.allclose(
            chain.scores()[possible].exp(), chain.chances()[possible] / erasing(chain)[possible], rtol=1e-10
        )


def erasing(chain: Chain) -> torch.Tensor:
    """The probability with which a random decoder erases what each change erases, which depends on no weights."""
    found = []
    for (_, masked, visible, quota), (_, erased) in chain.changes:
        rate = chain.rate(sum(visible), sum(masked), quota) if chain.config.revision == "random" else 0.0
        found.append(rate ** len(erased) * (1 - rate) ** (sum(visible) - len(erased)) if rate else 1.0)
    return torch.tensor(found, dtype=torch.float64)


def test_choosing_edits_by_the_sampled_token_is_biased():
    """Tokens that are written because they are likely are no samples of the policy's distribution."""
    low, high = stated("relative error of the gradient, edits by the sampled token")
    for cells, seed, strategy in [
        *itertools.product((3,), range(6), ("confidence", "threshold")),
        (4, 0, "confidence"),
    ]:
        chain = Chain(Toy(cells, seed), settings("sampled_edit", strategy, cells, revision_limit=1))
        scores = chain.scores()
        _, error, cosine = chain.expectations(scores)
        assert low <= error <= high and 0.5 < cosine < 0.98
        # Of what the old policy wrote, the new one is said to have written less than it would have.
        assert 0.1 < chain.mean_ratio((chain.scores(Toy(cells, seed + 10)) - scores).detach()) < 0.7


def test_writes_that_stand_in_the_end_are_not_enough():
    """What was taken back is part of the score."""
    for revision in ("confidence", "edit"):
        chain = Chain(Toy(3, 0), settings(revision, "confidence", revision_limit=1))
        scores = chain.scores().clone()
        for number, (situation, (writes, _)) in enumerate(chain.changes):
            if any(situation[0][cell] != MASK for cell, _ in writes) or situation[1].count(True) < 3:
                scores[number] = 0.0
        assert chain.expectations(scores)[1] > 0.1


# ------------------------------------------------------------------------------------------------ the package's decoder


@pytest.fixture
def decoded(monkeypatch):
    """Decodes with a toy as the policy, one response for each seed."""

    def run(toy: Toy, config: DecodingConfig, count: int):
        def policy_logits(model, input_ids, position_ids, allowed, rows, columns, cache=None):
            state = tuple(input_ids[0, 1:].tolist())
            logits = toy.log_probs.detach()[toy.numbers[state], columns - 1]
            return torch.cat([logits, torch.full((len(logits), 1), -torch.inf)], 1).float()

        monkeypatch.setattr(loop, "policy_logits", policy_logits)
        model = make_policy(toy.spec, vocab_size=4, num_hidden_layers=1)
        return decode(model, [[0]] * count, config, toy.spec, seeds=list(range(count)), batch_size=1)

    return run


WAYS = {
    "confidence": settings("confidence", "confidence", **SCHEDULES["once each, two at a time"]),
    "confidence, steps": settings("confidence", "entropy", **SCHEDULES["steps"]),
    "confidence, at most steps": settings("confidence", "margin", **SCHEDULES["steps after filling"]),
    "self-planning": settings("self_planning", "confidence", **SCHEDULES["steps, filled late"]),
    "random": settings("random", "random", **SCHEDULES["once each"]),
    "edit": settings("edit", "threshold", **SCHEDULES["steps after filling"]),
    "edit, steps": settings("edit", "confidence", **SCHEDULES["steps"]),
    "sampled edit": settings("sampled_edit", "confidence", **SCHEDULES["once each, two at a time"]),
    "own": settings(Revising(leftmost_unlikely), "left_to_right", **SCHEDULES["once each"]),
    "entropy bound": settings(
        "confidence", "entropy_bound", **{**SCHEDULES["steps after filling"], "entropy_bound": 0.1}
    ),
    "selection": settings("confidence", "sampled_confidence", score_selection=True, **SCHEDULES["once each"]),
    "selection, edits": settings("edit", "sampled_threshold", score_selection=True, **SCHEDULES["once each"]),
}


@pytest.mark.parametrize(("config", "block_size"), [(way, size) for way in WAYS.values() for size in (3, 1)],
                         ids=[f"{name}, {size}" for name in WAYS for size in ("one block", "three blocks")])  # fmt: skip
def test_what_the_package_decodes_is_enumerated(decoded, config, block_size):
    """Each response goes along the edges of the chain from its first node to an end, and its scores are those of the changes. The
    frequencies of ends are their probabilities."""
    toy, count = Toy(3, 0, block_size=block_size), 150
    chain = Chain(toy, config)
    scores = chain.scores().detach()
    batch = decoded(toy, config, count)
    recorded = torch.cat([batch.logps, batch.revisions.logps], 1)
    assert torch.equal(counted_writes(toy.spec, batch), torch.cat([batch.steps, batch.revisions.steps], 1) >= 0)
    ends = Counter()
    for row in range(count):
        nodes = closure(chain, {chain.layers[0][0]})
        for here in moments(events_of(toy.spec, batch, row)).values():
            change = (
                tuple((event.position, event.token) for event in here if event.token is not None),
                tuple(event.position for event in here if event.token is None),
            )
            open_ones = [node for node in nodes if not chain.is_end(node)]
            found = {node: chain.by_situation[chain.settle(node)[1]].get(change) for node in open_ones}
            numbers = {node: number for node, number in found.items() if number is not None}
            assert numbers
            logp = sum(recorded[row, event.column].item() for event in here if event.token is not None)
            for number in numbers.values():
                assert logp == pytest.approx(scores[number].item(), abs=1e-5, rel=1e-5)
            nodes = closure(chain, {chain.after[node, number] for node, number in numbers.items()})
        (node,) = (node for node in nodes if chain.is_end(node))
        assert node.canvas == tuple(batch.canvas_ids[row].tolist())
        assert batch.completion_lengths[row] == (node.canvas.index(STOP) + 1 if STOP in node.canvas else 3)
        ends[node.canvas] += 1
    chances = end_chances(chain)
    distance = sum(abs(ends[canvas] / count - chance) for canvas, chance in chances.items())
    # The expected distance of a sample is below the sum of the standard deviations.
    assert distance < 1.5 * sum((chance * (1 - chance) / count) ** 0.5 for chance in chances.values())


def closure(chain: Chain, nodes: set[Node]) -> set[Node]:
    """These nodes, and those after steps that neither write nor take back anything, which leave no event."""
    found, new = set(), nodes
    while new:
        found |= new
        open_ones = [node for node in new if not chain.is_end(node)]
        numbers = {node: chain.by_situation[chain.settle(node)[1]].get(((), ())) for node in open_ones}
        new = {chain.after[node, number] for node, number in numbers.items() if number is not None} - found
    return found


def end_chances(chain: Chain) -> dict:
    numbers, layers = chain.numbered()
    chances = chain.chances().detach()
    reached = torch.zeros(len(numbers), dtype=torch.float64)
    reached[0] = 1.0
    for source, change, target in layers:
        reached.index_add_(0, target, reached[source] * chances[change])
    found = Counter()
    for node in chain.ends:
        found[node.canvas] += reached[numbers[node]].item()
    return found


def test_stop_tokens_are_erased_and_written_again():
    """The chains above hold such decodings: a stop token, which is taken back, and one in the end, there or elsewhere."""
    for revision in REVISIONS:
        chain = Chain(Toy(4, 0), settings(revision, "confidence", 4, **SCHEDULES["once each"]))
        assert STOP in taken_back(chain)
        after = set()  # nodes after a stop token was taken back, which can end with one and without
        for node, number, target in sorted(chain.edges, key=lambda edge: edge[0].depth):
            situation, (writes, erased) = chain.changes[number]
            gone = [*erased, *(cell for cell, _ in writes if situation[0][cell] != MASK)]
            if node in after or any(node.canvas[cell] == STOP for cell in gone):
                after.add(target)
        assert {STOP in node.canvas for node in after if chain.is_end(node)} == {True, False}
