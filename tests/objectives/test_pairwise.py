"""The pairwise objective against its formula, pair by pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from trl_diffusion.objectives.pairwise import LOSSES, PairwiseConfig, Responses, make_pairs, pairwise_loss


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


def compared(log_ratios, lengths=None):
    """Responses of which only the log-ratios matter."""
    lengths = torch.ones(len(log_ratios)) if lengths is None else lengths
    return Responses(torch.zeros(len(log_ratios)), log_ratios, lengths)


@pytest.mark.parametrize("which", ["best_worst", "all"])
@pytest.mark.parametrize("normalise", [False, True])
def test_loss(which, normalise):
    log_ratios = torch.randn(12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    lengths = torch.arange(1, 13)
    pairs = make_pairs(SCORES, which)
    loss, sums = pairwise_loss(
        compared(log_ratios, lengths), pairs, PairwiseConfig(beta=0.3, length_normalization=normalise)
    )
    d = log_ratios.tolist()
    if normalise:
        d = [value / length for value, length in zip(d, lengths.tolist(), strict=True)]
    total = 0.0
    margins = []
    for own in expected_pairs(which).values():
        for a, b in own:
            margin = 0.3 * (d[a] - d[b])
            total += math.log(1 + math.exp(-margin)) / len(own) / 3
            margins.append(margin)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert sums["rewards/margins"].item() == pytest.approx(sum(margins), rel=1e-4)
    assert sums["rewards/accuracies"].item() == sum(margin > 0 for margin in margins)
    assert len(pairs.chosen) == len(margins)
    loss.backward()
    assert log_ratios.grad[4:8].abs().max() == 0  # the tied group


def test_groups_may_be_cut_apart():
    log_ratios = torch.randn(12, generator=torch.Generator().manual_seed(1))
    config = PairwiseConfig(beta=0.5)
    whole = pairwise_loss(compared(log_ratios), make_pairs(SCORES, "all"), config)[0]
    parts = [
        pairwise_loss(compared(log_ratios[4 * g : 4 * g + 4]), make_pairs(SCORES[g : g + 1], "all"), config)[0]
        for g in range(3)
    ]
    assert whole.item() == pytest.approx(sum(parts).item() / 3, rel=1e-6)


@pytest.mark.parametrize("which", ["best_worst", "all"])
def test_responses_in_no_pair_may_be_left_out(which):
    """The loss of those that are in a pair is that of all."""
    log_ratios = torch.randn(12, generator=torch.Generator().manual_seed(2))
    pairs = make_pairs(SCORES, which)
    used, fewer = pairs.used()
    assert sorted(used.tolist()) == sorted({*pairs.chosen.tolist(), *pairs.rejected.tolist()})
    assert used[fewer.chosen].equal(pairs.chosen) and used[fewer.rejected].equal(pairs.rejected)
    config = PairwiseConfig(beta=0.5)
    assert pairwise_loss(compared(log_ratios[used]), fewer, config)[0].item() == pytest.approx(
        pairwise_loss(compared(log_ratios), pairs, config)[0].item(), rel=1e-6
    )


def test_nothing_but_ties_is_no_loss():
    pairs = make_pairs(torch.ones(1, 4))
    used, fewer = pairs.used()
    assert len(used) == 1 and len(fewer.chosen) == len(fewer.rejected) == 0  # a pass needs something to score
    logps = torch.randn(4, requires_grad=True)
    config = PairwiseConfig(dict.fromkeys(LOSSES, 1.0), beta=0.1)
    loss, _ = pairwise_loss(Responses(logps, 2 * logps, torch.ones(4)), pairs, config)
    loss.backward()
    assert loss.item() == 0 and logps.grad.abs().max() == 0
    with pytest.raises(ValueError, match="which"):
        make_pairs(torch.ones(1, 4), "some")
