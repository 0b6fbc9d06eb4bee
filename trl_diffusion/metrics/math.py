"""Share of mathematics problems whose final answer equals the gold one."""

from __future__ import annotations

import evaluate
from datasets import Features, Value

from ..rewards.math import math_accuracy


class MathExactMatch(evaluate.Metric):
    """
    Exact match of final answers, as math-verify sees it.

    Inputs: `predictions` (`list[str]`), what was answered; `references` (`list[str]`), gold answers, alone or at the end
    of a GSM8K solution.

    Results: `exact_match` (`float`), share of the problems whose gold answer can be read (`nan` if there are none), and
    `skipped` (`int`), number of the others.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match of final answers, as math-verify sees it.",
            citation="",
            inputs_description=type(self).__doc__,
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | int]:
        rewards = [reward for reward in math_accuracy(predictions, references) if reward is not None]
        share = sum(rewards) / len(rewards) if rewards else float("nan")
        return {"exact_match": share, "skipped": len(predictions) - len(rewards)}
