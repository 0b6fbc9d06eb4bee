"""Chance that at least one of k answers is right."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import fmean

import evaluate
from datasets import Features, List, Value


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """
    Unbiased estimate of the chance that at least one of `k` answers to a problem is right.

    It is `1 - C(n - c, k) / C(n, k)`: of the ways to pick `k` of the `n` answers at hand, the share with one of the `c`
    right ones.

    Args:
        num_answers (`int`): answers at hand, `n`.
        num_right (`int`): how many of them are right, `c`.
        k (`int`): answers that one is allowed, from 1 to `n`.

    Raises:
        ValueError: if `k` is not from 1 to `n`, or `c` not from 0 to `n`.
    """
    if not 1 <= k <= num_answers:
        raise ValueError(f"`k` must be from 1 to the number of answers, {num_answers}, got {k}.")
    if not 0 <= num_right <= num_answers:
        raise ValueError(f"{num_right} of {num_answers} answers cannot be right.")
    return 1 - comb(num_answers - num_right, k) / comb(num_answers, k)


class PassAtK(evaluate.Metric):
    """
    Pass@k, averaged over problems.

    Inputs: `predictions` (`list[list[float]]`), for each problem the rewards of its answers by whatever checker, where 1
    means right and anything below wrong. `compute` takes `k` (`Sequence[int]`, defaults to `(1,)`).

    Results: `pass@k` (`float`) for each `k`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Chance that at least one of k answers is right, averaged over problems.",
            citation="",
            inputs_description=type(self).__doc__,
            features=Features({"predictions": List(Value("float64"))}),
        )

    def _compute(self, predictions: list[list[float]], k: Sequence[int] = (1,)) -> dict[str, float]:
        counts = [(len(rewards), sum(reward == 1 for reward in rewards)) for rewards in predictions]
        return {f"pass@{size}": fmean(pass_at_k(n, c, size) for n, c in counts) for size in k}
