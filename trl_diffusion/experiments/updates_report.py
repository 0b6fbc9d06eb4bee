"""What came out of the study of aggressive updates: where training breaks, and which signs came before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..trainer.health import signs_of
from .queue import Row
from .report import estimate, table
from .updates import GROUP, PAIRS


DROP = 0.25  # a run breaks if it ends this share below its best measurement, and by more than chance
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


@dataclass(frozen=True)
class TrainerWarning:
    """
    A warning of the trainer.

    Attributes:
        sign (`Callable`): what it looks for in the log, one of [`~trainer.health.signs_of`].
    """

    sign: Callable[[Sequence[dict[str, Any]]], bool]

    def first(self, row: Row) -> int | None:
        """The first update at which the trainer warned, counted from 1; `None` if it never did."""
        names, values = row["signs"].keys(), zip(*row["signs"].values(), strict=True)
        logs = [dict(zip(names, one, strict=True)) for one in values]
        return next((update for update in range(1, len(logs) + 1) if self.sign(logs[:update])), None)

    def __str__(self) -> str:
        return f"the trainer warns: `{self.sign.__name__}`"


GROUP_SIGNS: tuple[Sign | TrainerWarning, ...] = (
    Sign("diffusion/effective_sample_size", 0.9, False), Sign("diffusion/effective_sample_size", 0.5, False),
    Sign("diffusion/kl_to_old", 0.05, True), Sign("diffusion/kl_to_old", 0.5, True), Sign("grad_norm", 5.0, True),
    Sign("kl", 1.0, True), *map(TrainerWarning, signs_of("grpo", online=True)),
)  # fmt: skip
PAIRS_SIGNS: tuple[Sign | TrainerWarning, ...] = (
    Sign("rewards/chosen", 0.0, False), Sign("rewards/chosen", -1.0, False), Sign("rewards/chosen", -3.0, False),
    Sign("kl", 1.0, True), Sign("kl", 10.0, True), Sign("grad_norm", 20.0, True), *map(TrainerWarning, signs_of("dpo", online=False)),
)  # fmt: skip


def broke(row: Row) -> bool:
    """Whether a run diverged, or ended far below its best measurement."""
    return row.get("diverged") is not None or _is_far_below(row["curve"][-1][1], row)


def _is_far_below(rate: float, row: Row) -> bool:
    """Whether a solve rate is below the best one of a run by more than [`DROP`] of it, and by more than chance."""
    best = max(rate for _, rate in row["curve"])
    chance = 1.96 * ((best * (1 - best) + rate * (1 - rate)) / row["puzzles"]) ** 0.5
    return best - rate > max(DROP * best, chance)


def last_good_update(row: Row) -> int:
    """The update of the best measurement of a run."""
    return max(row["curve"], key=lambda point: point[1])[0]


def updates_report(rows: Sequence[Row]) -> str:
    """The report of the study, in Markdown."""
    parts = [
        "Share of sudokus that are solved greedily: before training, the best measurement on the way, and at the end. "
        f"A run breaks if its numbers are no longer finite, or if it ends below its best measurement by more than {DROP:.0%} of it, and by "
        "more than the 95 % interval of the difference. "
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


def _signs_table(rows: Sequence[Row], signs: Sequence[Sign | TrainerWarning]) -> str:
    """For each sign, how many of the runs that broke showed it, before their solve rate fell or at all, and how many of the others."""
    broken, whole = [row for row in rows if broke(row)], [row for row in rows if not broke(row)]
    lines = []
    for sign in signs:
        firsts = [(sign.first(row), _fall(row)) for row in broken]
        shown = [(first, fall) for first, fall in firsts if first is not None]
        warned = sum(first <= fall for first, fall in shown)
        alarms = sum(sign.first(row) is not None for row in whole)
        lines.append(
            [sign, *(f"{count} of {len(broken)}" for count in (warned, len(shown))), f"{alarms} of {len(whole)}"]
        )
    names = [
        "sign",
        "runs that broke, shown before the fall was measured",
        "runs that broke, shown at all",
        "other runs, shown at all",
    ]
    return table(names, lines)


def _fall(row: Row) -> int:
    """The update at which the solve rate of a run was first measured far below its best."""
    best = last_good_update(row)
    fallen = (update for update, rate in row["curve"] if update > best and _is_far_below(rate, row))
    return next(fallen, row["curve"][-1][0])
