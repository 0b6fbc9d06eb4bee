"""Share of countdown games that are solved."""

from __future__ import annotations

from statistics import fmean
from typing import cast

import evaluate
from datasets import Features, List, Value

from ..rewards.countdown import countdown_numbers, countdown_solved


class CountdownSolved(evaluate.Metric):
    """
    How many games are solved.

    Inputs: `predictions` (`list[str]`), expressions; `references` (`list[dict]`), the games: `numbers` (`list[int]`) and
    `target` (`int`).

    Results: `solved` (`float`), share of games that are solved, and `numbers` (`float`), share of games whose numbers
    are each used exactly once.
    """

    def _info(self) -> evaluate.MetricInfo:
        game = {"numbers": List(Value("int64")), "target": Value("int64")}
        return evaluate.MetricInfo(
            description="How many countdown games are solved.",
            citation="",
            inputs_description=type(self).__doc__,
            features=Features({"predictions": Value("string"), "references": game}),
        )

    def _compute(self, predictions: list[str], references: list[dict]) -> dict[str, float]:
        numbers, targets = [game["numbers"] for game in references], [game["target"] for game in references]
        return {
            "solved": fmean(cast("list[float]", countdown_solved(predictions, numbers=numbers, target=targets))),
            "numbers": fmean(cast("list[float]", countdown_numbers(predictions, numbers=numbers))),
        }
