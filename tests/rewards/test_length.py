"""Rewards for length, and rows to which a reward does not apply."""

from __future__ import annotations

import pickle

import pytest

from trl_diffusion.rewards.countdown import countdown_near, countdown_numbers, countdown_solved
from trl_diffusion.rewards.length import get_soft_overlong_punishment, truncation_penalty
from trl_diffusion.rewards.math import math_accuracy
from trl_diffusion.rewards.sudoku import sudoku_solved, sudoku_units


STOP, OTHER_STOP = 2, 9


def test_truncation_penalty():
    reward = truncation_penalty(stop_token_ids=(STOP, OTHER_STOP), penalty=-0.5)
    completion_ids = [[5, STOP], [5, OTHER_STOP], [STOP, 5], [5, 6], []]
    assert reward(prompts=[""] * 5, completions=[""] * 5, completion_ids=completion_ids) == [
        0.0,
        0.0,
        -0.5,
        -0.5,
        -0.5,
    ]
    assert reward.__name__ == "truncation_penalty"
    assert pickle.loads(pickle.dumps(reward))(completion_ids=completion_ids[:3]) == [0.0, 0.0, -0.5]


def test_truncation_penalty_refuses():
    with pytest.raises(ValueError, match="stop_token_ids"):
        truncation_penalty(())
    with pytest.raises(ValueError, match="positive"):
        truncation_penalty([STOP], penalty=1.0)


def test_soft_overlong_punishment_is_trls():
    reward = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    assert reward(completion_ids=[[5] * n for n in (6, 8, 10, 11)]) == [0.0, -0.5, -1.0, -1.0]


def test_rows_of_other_tasks():
    """In a mixed dataset, the columns of one task are `None` in the rows of another."""
    assert sudoku_solved(["", ""], puzzle=[None, "0" * 16]) == [None, 0.0]
    assert sudoku_units(["", ""], puzzle=["0" * 16, None]) == [0.0, None]
    assert countdown_solved(["1", "1"], numbers=[None, [1]], target=[None, 1]) == [None, 1.0]
    assert countdown_near(["1", "1"], numbers=[None, [1]], target=[None, 1]) == [None, 1.0]
    assert countdown_numbers(["1", "1"], numbers=[None, [1]]) == [None, 1.0]
    assert math_accuracy(["1", "1"], answer=[None, "#### 1"]) == [None, 1.0]
