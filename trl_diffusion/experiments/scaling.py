"""Scaling: solve rates over the size of the backbone, the amount of data, and the length of reinforcement."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ..utils import student
from .comparison import PRETRAIN, REINFORCE, Comparison, at_training
from .queue import Row
from .report import estimate, table
from .settings import Sizes


SHAPES = ((32, 2), (64, 3), (128, 4), (256, 5))  # width and layers
DATA = (0.25, 0.5, 1.0)  # shares of `Sizes.pretrain_updates` and `Sizes.corpus_size`: documents are seen equally often
MARKS = (10, 20)  # and `Sizes.updates`


def scaling(base: Sizes, tasks: tuple[str, ...] = ("backward_chain",), arms: tuple[str, ...] = ("autoregressive", "full"),
            seeds: tuple[int, ...] = (0, 1, 2), shapes: Sequence[tuple[int, int]] = SHAPES) -> Comparison:  # fmt: skip
    """
    A comparison with a variant for each shape and amount of data.

    Args:
        base ([`Sizes`]): everything else. Learning rates are not chosen for each size: the middle one is used, divided by the square root
            of the width in units of 64.
        tasks, arms, seeds: as for [`Comparison`].
        shapes (`Sequence[tuple[int, int]]`): widths and numbers of layers.
    """
    variants = {}
    for width, layers in shapes:
        for share in DATA:
            rate = sorted(base.learning_rates)[len(base.learning_rates) // 2] * math.sqrt(64 / width)
            variants[f"{width}x{layers}-{share:g}"] = replace(
                base, hidden_size=width, num_layers=layers, pretrain_updates=round(base.pretrain_updates * share),
                corpus_size=round(base.corpus_size * share),
                pretrain_learning_rate=base.pretrain_learning_rate * math.sqrt(64 / width), learning_rates=(rate,),
                marks=tuple(mark for mark in MARKS if mark < base.updates),
            )  # fmt: skip
    return Comparison(tasks, arms, seeds, variants)


@dataclass(frozen=True)
class Fit:
    """
    A straight line through points, by least squares.

    Attributes:
        slope, intercept (`float`): of the line.
        half (`float`): half of the width of the 95 % interval of the slope.
        ends (`tuple[float, float]`): smallest and largest x. The line is extrapolated outside.
    """

    slope: float
    intercept: float
    half: float
    ends: tuple[float, float]


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """
    Fits a line.

    Args:
        points (`Sequence[tuple[float, float]]`): x and y.

    Raises:
        ValueError: if there are fewer than three points, or all have the same x.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(points) < 3 or len(set(xs)) < 2:
        raise ValueError(f"A line with an interval needs three points and two values of x, got {len(points)} points.")
    centre, mean = fmean(xs), fmean(ys)
    spread = sum((x - centre) ** 2 for x in xs)
    slope = sum((x - centre) * (y - mean) for x, y in points) / spread
    intercept = mean - slope * centre
    left = sum((y - intercept - slope * x) ** 2 for x, y in points) / (len(points) - 2)
    return Fit(slope, intercept, student(len(points) - 2) * math.sqrt(left / spread), (min(xs), max(xs)))


def log_odds(share: float, puzzles: int) -> float:
    """Log-odds of a share, with half a puzzle added on each side, so that 0 and 1 have one."""
    right = share * puzzles
    return math.log((right + 0.5) / (puzzles - right + 0.5))


Curve = dict[tuple[str, str, float, int], list[tuple[int, float, int]]]


def collect(rows: Sequence[Row]) -> Curve:
    """By task, arm, share of the data and updates of reinforcement: parameters, solve rate at temperature 1, and puzzles."""
    parameters = {(row["variant"], row["task"]): row["parameters"] for row in rows if row["kind"] == PRETRAIN}
    found: Curve = defaultdict(list)
    for row in rows:
        if row["kind"] != REINFORCE:
            continue
        share = float(row["variant"].split("-")[1])
        number = parameters[row["variant"], row["task"]]
        before = {"updates": 0, "points": row["before"]}
        for one in (before, *row["marks"], row["updates"]):
            solved = at_training(one["points"], row["training"], 1.0)["solved"]
            found[row["task"], row["what"], share, one["updates"]].append((number, solved, row["puzzles"]))
    return found


def scaling_report(rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """The report of the study, in Markdown."""
    parts = [f"![{name}]({name})" for name in pictures]
    parts.append(
        "Solve rates at temperature 1 and the settings of training, with 95 % intervals over seeds. The slope says by how much the "
        "log-odds of a solved puzzle rise when the backbone has ten times as many parameters."
    )
    found = collect(rows)
    sizes = sorted({number for points in found.values() for number, *_ in points})
    lines = []
    for (task, arm, share, updates), points in sorted(found.items()):
        cells = []
        for size in sizes:
            rates = [rate for number, rate, _ in points if number == size]
            cells.append(str(estimate(rates, points[0][2])) if rates else "")
        try:
            line = fit([(math.log10(number), log_odds(rate, puzzles)) for number, rate, puzzles in points])
            slope = f"{line.slope:+.2f} ± {line.half:.2f}" + (" (undecided)" if abs(line.slope) <= line.half else "")
        except ValueError:
            slope = ""
        lines.append([task, arm, f"{share:g}", updates, *cells, slope])
    header = ["task", "arm", "data", "updates", *(f"{size:,} parameters" for size in sizes), "slope"]
    return "\n\n".join([*parts, table(header, lines)]) + "\n"
