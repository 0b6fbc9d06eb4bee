"""The pairwise objective against its formula, pair by pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trl_diffusion.objectives.pairwise import make_pairs, pairwise_loss


SCORES = torch.tensor([[0.0, 1.0, 0.5, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, -1.0, float("nan"), 0.0]])


def expected_pairs(which):
    pairs = {}
    for group, scores in enumerate(SCORES.tolist()):
        found = [
            (a, b) for a, b in itertools.permutations(range(4), 2) if scores[a] > scores[b]
        ]  # NaN compares as False
        if which == "best_worst" and found:
            best = max(scores[a] for a, _ in found)
            worst = min(scores[b] for _, b in found)
            found = [next((a, b) for a, b in found if scores[a] == best and scores[b] == worst)]
        pairs[group] = [(4 * group + a, 4 * group + b) for a, b in found]
    return pairs


@pytest.mark.parametrize("which", ["best_worst", "all"])
def test_pairs(which):
    pairs = make_pairs(SCORES, which)
    expected = expected_pairs(which)
    assert sorted(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)) == sorted(
        sum(expected.values(), [])
    )
    assert pairs.tied == 1
    for chosen, weight in zip(pairs.chosen.tolist(), pairs.weights.tolist(), strict=True):
        assert weight == pytest.approx(1 / 3 / len(expected[chosen // 4]))


@pytest.mark.parametrize("which", ["best_worst", "all"])
@pytest.mark.parametrize("normalise", [False, True])
def test_loss(which, normalise):
    log_ratios = torch.randn(12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    lengths = torch.arange(1, 13)
    loss, sums = pairwise_loss(log_ratios, make_pairs(SCORES, which), 0.3, lengths if normalise else None)
    d = log_ratios.tolist()
    if normalise:
        d = [value / length for value, length in zip(d, lengths.tolist(), strict=True)]
    total = 0.0
    margins = []
    for pairs in expected_pairs(which).values():
        for a, b in pairs:
            margin = 0.3 * (d[a] - d[b])
            total += math.log(1 + math.exp(-margin)) / len(pairs) / 3
            margins.append(margin)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert sums["margin"].item() == pytest.approx(sum(margins), rel=1e-4)
    assert sums["accuracy"].item() == sum(margin > 0 for margin in margins)
    assert sums["count"].item() == len(margins)
    loss.backward()
    assert log_ratios.grad[4:8].abs().max() == 0  # the tied group


def test_groups_may_be_cut_apart():
    log_ratios = torch.randn(12, generator=torch.Generator().manual_seed(1))
    whole = pairwise_loss(log_ratios, make_pairs(SCORES, "all"), 0.5)[0]
    parts = [
        pairwise_loss(log_ratios[4 * g : 4 * g + 4], make_pairs(SCORES[g : g + 1], "all"), 0.5)[0] for g in range(3)
    ]
    assert whole.item() == pytest.approx(sum(parts).item() / 3, rel=1e-6)


def test_nothing_but_ties_is_no_loss():
    log_ratios = torch.randn(4, requires_grad=True)
    loss, sums = pairwise_loss(log_ratios, make_pairs(torch.ones(1, 4)), 0.1)
    loss.backward()
    assert loss.item() == 0 and sums["count"] == 0 and log_ratios.grad.abs().max() == 0
    with pytest.raises(ValueError, match="which"):
        make_pairs(torch.ones(1, 4), "some")
