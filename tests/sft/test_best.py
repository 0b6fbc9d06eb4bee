"""Rejection sampling: which responses of a collection are kept."""

from __future__ import annotations

import pytest
from datasets import Dataset

from trl_diffusion.sft.best import best_responses


def group(prompt: list[int], responses: list[list[int]], *rewards: list) -> dict:
    """A row of a trajectory dataset, of which each response was written from its end to its beginning."""
    return {
        "format_version": 1,
        "tokenizer_fingerprint": "abc",
        "prompt_ids": prompt,
        "event_steps": [list(range(len(one))) for one in responses],
        "event_positions": [list(range(len(one)))[::-1] for one in responses],
        "event_tokens": [one[::-1] for one in responses],
        "completion_lengths": [len(one) for one in responses],
        **{f"reward_{number}": values for number, values in enumerate(rewards)},
    }


def kept(*groups: dict) -> list[tuple[list[int], list[int]]]:
    found = best_responses(Dataset.from_list(list(groups)))
    return list(zip(found["input_ids"], found["labels"], strict=True))


def test_the_best_of_each_group_if_it_is_better_than_the_mean():
    rows = kept(
        group([1, 2], [[5], [6, 7], [8]], [0.0, 1.0, 0.0], [0.5, 0.25, 1.0]),  # sums 0.5, 1.25, 1.0
        group([1], [[5], [6]], [1.0, 1.0], [0.5, 0.5]),  # no better one
        group([3], [[4], [5], [6]], [None, 0.1, 0.2], [None, None, 0.3]),  # the first is not scored
        group([4], [[4], [5]], [None, None], [None, None]),
        group([5], [[4], [5]], [None, 2.0], [None, None]),  # alone
    )
    assert rows == [([1, 2, 6, 7], [-100, -100, 6, 7]), ([3, 6], [-100, 6])]


def test_the_first_of_equally_good_ones_and_no_duplicates():
    first = group([1], [[5], [6], [7]], [0.0, 1.0, 1.0])
    again = group([1], [[8], [6], [7]], [0.0, 0.3, 0.2])  # another collection, the same best response
    other = group([2], [[8], [6], [7]], [0.0, 0.3, 0.2])
    assert kept(first, again, other) == [([1, 6], [-100, 6]), ([2, 6], [-100, 6])]


def test_rewards_that_differ_by_rounding_are_equal():
    with pytest.raises(ValueError, match="In each of the 1 groups all responses have the same reward"):
        kept(group([1], [[5], [6], [7]], [0.1 + 0.2, 0.3, 0.3]))


def test_what_cannot_be_used():
    rows = Dataset.from_list([group([1], [[5], [6]], [0.0, 1.0])])
    with pytest.raises(ValueError, match=r"Row 0, column `tokenizer_fingerprint`: is abc, but .* has xyz"):
        best_responses(rows, "xyz")
    assert len(best_responses(rows, "abc")) == 1
    with pytest.raises(ValueError, match=r"no trajectory dataset: it has the columns \['prompt'\]"):
        best_responses(Dataset.from_dict({"prompt": ["x"]}))
