"""What came out of the study of aggressive updates: where training breaks, and which signs came before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .queue import Row
from .report import estimate, table
from .updates import GROUP, PAIRS


DROP = 0.1  # a run breaks if it ends this far below its best measurement
Key = tuple[str, tuple[tuple[str, float], ...]]


@dataclass(frozen=True)
class Sign:
    """
    Something in the log that may come before a run breaks.

    Attributes:
        name (`str`): the metric.
        limit (`float`): its bound.
        above (`bool`): whether it is above the bound that alarms.
    """

    name: str
    limit: float
    above: bool

    def first(self, row: Row) -> int | None:
        """The first update at which a run shows the sign, counted from 1; `None` if it never does."""
        for update, value in enumerate(row["signs"].get(self.name, ()), start=1):
            if value is not None and (value > self.limit if self.above else value < self.limit):
                return update
        return None

    def __str__(self) -> str:
        return f"`{self.name}` {'above' if self.above else 'below'} {self.limit:g}"


GROUP_SIGNS = (
    Sign("diffusion/effective_sample_size", 0.9, False), Sign("diffusion/effective_sample_size", 0.5, False),
    Sign("diffusion/kl_to_old", 0.05, True), Sign("diffusion/kl_to_old", 0.5, True), Sign("grad_norm", 5.0, True),
    Sign("kl", 1.0, True),
)  # fmt: skip
PAIRS_SIGNS = (
    Sign("rewards/chosen", 0.0, False), Sign("rewards/chosen", -1.0, False), Sign("rewards/chosen", -3.0, False),
    Sign("kl", 1.0, True), Sign("kl", 10.0, True), Sign("grad_norm", 20.0, True),
)  # fmt: skip


def broke(row: Row) -> bool:
    """Whether a run diverged, or ended far below its best measurement."""
    rates = [rate for _, rate in row["curve"]]
    return row.get("diverged") is not None or rates[-1] < max(rates) - DROP


def last_good_update(row: Row) -> int:
    """The update of the best measurement of a run."""
    return max(row["curve"], key=lambda point: point[1])[0]


def updates_report(rows: Sequence[Row]) -> str:
    """The report of the study, in Markdown."""
    parts = [
        "Share of sudokus that are solved greedily: before training, the best measurement on the way, and at the end. "
        f"A run breaks if its numbers are no longer finite, or if it ends more than {100 * DROP:.0f} points below its best measurement. "
        "Intervals of 95 % over seeds, or over puzzles if there is one seed."
    ]
    for kind, signs in ((GROUP, GROUP_SIGNS), (PAIRS, PAIRS_SIGNS)):
        own = [row for row in rows if row["kind"] == kind]
        if own:
            title = "Loss of groups, online" if kind == GROUP else "Pairwise loss, offline"
            parts += [f"## {title}", _settings_table(own), _signs_table(own, signs)]
    return "\n\n".join(parts) + "\n"


def _settings_table(rows: Sequence[Row]) -> str:
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["kind"], tuple((name, value) for name, value in row["settings"])].append(row)
    names = list(dict.fromkeys(name for _, settings in found for name, _ in settings))
    lines = []
    for (_, settings), own in found.items():
        values: dict[str, Any] = dict(settings)
        ends = [[rates[0], max(rates), rates[-1]] for rates in ([rate for _, rate in row["curve"]] for row in own)]
        cells = [str(estimate([one[i] for one in ends], own[0]["puzzles"])) for i in range(3)]
        lines.append([*(f"{values.get(name, ''):g}" for name in names), *cells, f"{sum(map(broke, own))} of {len(own)}",
                      *_extremes(own)])  # fmt: skip
    shown = [
        "before",
        "best",
        "end",
        "broke",
        "largest KL to the reference",
        "largest KL to the old policy",
        "smallest effective sample size",
        "smallest chosen reward",
    ]
    return table([f"`{name}`" for name in names] + shown, lines)


def _extremes(rows: Sequence[Row]) -> list[str]:
    cells = []
    for names, worst in ((("kl",), max),
        (("diffusion/kl_to_old",), max), (("diffusion/effective_sample_size",), min),
                         (("rewards/chosen",), min)):  # fmt: skip
        values = []
        for row in rows:
            series: list[float | None] = next(
                (row["signs"][name] for name in names if any(row["signs"].get(name, ()))), []
            )
            known = [value for value in series if value is not None]
            values += [worst(known)] if known else []
        cells.append(f"{fmean(values):.3g}" if values else "")
    return cells


def _signs_table(rows: Sequence[Row], signs: Sequence[Sign]) -> str:
    """For each sign, how many of the runs that broke showed it before their solve rate fell, and how many of the others showed it at all."""
    broken, whole = [row for row in rows if broke(row)], [row for row in rows if not broke(row)]
    lines = []
    for sign in signs:
        warned = [first for row in broken if (first := sign.first(row)) is not None and first <= _fall(row)]
        alarms = sum(sign.first(row) is not None for row in whole)
        lines.append([sign, f"{len(warned)} of {len(broken)}", f"{alarms} of {len(whole)}"])
    return table(["sign", "runs that broke, shown before the fall was measured", "other runs, shown at all"], lines)


def _fall(row: Row) -> int:
    """The update at which the solve rate of a run was first measured far below its best."""
    best, highest = last_good_update(row), max(rate for _, rate in row["curve"])
    fallen = (update for update, rate in row["curve"] if update > best and rate < highest - DROP)
    return next(fallen, row["curve"][-1][0])
