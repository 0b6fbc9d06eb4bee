"""Share of 4x4 sudoku puzzles that are solved."""

from __future__ import annotations

from statistics import fmean
from typing import cast

import evaluate
from datasets import Features, Value

from ..rewards.sudoku import sudoku_solved, sudoku_units


class SudokuSolved(evaluate.Metric):
    """
    How many puzzles are solved.

    Inputs: `predictions` (`list[str]`), completed grids, 16 digits each; `references` (`list[str]`), the puzzles, 0 for a
    blank.

    Results: `solved` (`float`), share of puzzles that are solved, and `units` (`float`), mean share of a puzzle's rows,
    columns and boxes that are right.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How many 4x4 sudoku puzzles are solved.",
            citation="",
            inputs_description=type(self).__doc__,
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {
            "solved": fmean(cast("list[float]", sudoku_solved(predictions, puzzle=references))),
            "units": fmean(cast("list[float]", sudoku_units(predictions, puzzle=references))),
        }
