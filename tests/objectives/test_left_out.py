"""What is in no pair: responses without a score, and pairs of the same tokens."""

from __future__ import annotations

import pytest
import torch

from trl_diffusion.objectives.pairwise import differing_groups, make_pairs, same_responses


NAN = float("nan")
# Two groups of four responses of up to three tokens; in the first, 0 and 2 are the same, and 1 and 3.
IDS = torch.tensor([[5, 6, 7], [5, 6, 0], [5, 6, 7], [5, 6, 9], [1, 2, 3], [1, 2, 3], [3, 2, 1], [9, 9, 9]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
SAME = [{(0, 2), (2, 0), (1, 3), (3, 1)}, set()]


def test_same_responses():
    """Equal up to the last token that counts, whatever is behind it; a part of another is another."""
    same = same_responses(IDS, MASK, 4)
    assert same.shape == (2, 4, 4)
    for group, expected in enumerate(SAME):
        found = {(a, b) for a, b in same[group].nonzero().tolist() if a != b}
        assert found == expected and same[group].diagonal().all()


def pairs_of(scores, which):
    pairs = make_pairs(torch.tensor(scores), which, same_responses(IDS, MASK, 4))
    return sorted(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)), pairs


@pytest.mark.parametrize("which", ["best_worst", "all"])
def test_the_same_tokens_are_no_pair(which):
    scores = [[3.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    found, pairs = pairs_of(scores, which)
    # Best and worst of the first group say the same, 0 and 2; of all its ordered pairs, four do not.
    assert found == ([] if which == "best_worst" else [(0, 1), (0, 3), (1, 2), (3, 2)])
    assert pairs.identical == 1 and pairs.tied == 1
    assert torch.equal(pairs.weights, torch.full((len(found),), 1 / 4 / 2))


@pytest.mark.parametrize("which", ["best_worst", "all"])
def test_groups_without_two_scores_are_not_tied(which):
    found, pairs = pairs_of([[NAN, NAN, 1.0, NAN], [NAN, 2.0, NAN, 5.0]], which)
    assert found == [(7, 5)] and pairs.tied == pairs.identical == 0
    assert pairs_of([[NAN] * 4, [1.0, NAN, 1.0, NAN]], which)[1].tied == 1


@pytest.mark.parametrize(
    ("rewards", "differ"),
    [
        ([[0.1], [0.1], [0.1]], False),
        ([[0.1], [0.2], [0.1]], True),
        ([[NAN], [NAN], [NAN]], False),
        ([[NAN], [0.5], [NAN]], False),  # the only one that is scored
        ([[NAN], [0.5], [0.6]], True),
        ([[NAN, 1.0], [NAN, 1.0], [NAN, 1.0]], False),
        ([[NAN, 1.0], [0.0, 1.0], [NAN, 1.0]], True),
    ],
)
def test_groups_that_differ(rewards, differ):
    padded = torch.tensor([[0.3] * len(rewards[0])] * 3 + rewards)  # a group of equal ones before
    assert differing_groups(padded, 3).tolist() == [False] * 3 + [differ] * 3
