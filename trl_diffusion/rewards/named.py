"""Reward functions that a command line knows by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import countdown, math, sudoku, word_sums


REWARDS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        math.math_accuracy,
        math.answer_format,
        sudoku.sudoku_solved,
        sudoku.sudoku_units,
        countdown.countdown_solved,
        countdown.countdown_near,
        countdown.countdown_numbers,
        word_sums.word_sums_solved,
        word_sums.word_sums_digits,
    )
}


def check_different(names: Sequence[str]) -> None:
    """Raises a `ValueError` if two reward functions have the same name."""
    if len(set(names)) != len(names):
        raise ValueError(
            f"Reward functions need different names, got {list(names)}: metrics are called after them. Rename one of them."
        )
