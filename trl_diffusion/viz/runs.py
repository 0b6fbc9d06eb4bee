"""
What happened in a run, as six panels: which metrics of its log they show, and the numbers in words. Needs no matplotlib.

The panels of a run that samples its responses are the reward, the held-out solve rate, the KL divergence, the effective sample
size, the gradient norm and the length. Stored responses never change, so their rewards and lengths say nothing about the
policy: for such a run the loss stands for the reward, and the entropy for the length. If its loss compares pairs, the order of
the pairs stands for the effective sample size, and their implicit rewards for the length. Supervised fine-tuning shows the loss,
what was measured on held-out rows, the accuracy and the entropy of masked tokens, the gradient norm and the learning rate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ..utils import read_record, wilson


STATE, RESULTS = "trainer_state.json", "results.json"
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # characters of a curve in words
LEAST_KL = 1e-3  # smaller divergences are shown as a line at 0: they are those of rounding


@dataclass
class Series:
    """
    A curve.

    Attributes:
        label (`str`): its name among the curves of a panel.
        steps (`list[int]`): optimizer steps.
        values (`list[float]`): a finite number for each step.
        low, high (`list[float]`): ends of the band or interval around each value. Empty if there is none.
    """

    label: str
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass
class Panel:
    """
    What one panel shows of some runs.

    Attributes:
        title (`str`): what is shown.
        band (`str`): what its bands or intervals are. Empty if it has none.
        curves (`list[list[Series]]`): the curves of each run. A run that did not log this has none.
        percent (`bool`): whether the values are shares, to be shown in percent.
        measured (`bool`): whether the bands are intervals of separate measurements.
        lowest, highest (`float`, *optional*): ends of the axis, if no value lies outside.
    """

    title: str
    curves: list[list[Series]]
    band: str = ""
    percent: bool = False
    measured: bool = False
    lowest: float | None = None
    highest: float | None = None


@dataclass
class Run:
    """
    A run of a trainer.

    Attributes:
        name (`str`): what it is called beside others.
        log (`list[dict]`): `trainer.state.log_history`.
        results (`dict`): what `results.json` holds, if the run was measured before and after training.
    """

    name: str
    log: list[dict[str, Any]]
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def stored(self) -> bool:
        """Whether the run trained on stored responses: then no step took time for a rollout."""
        seconds = [entry["time/rollout"] for entry in self.log if _is_number(entry.get("time/rollout"))]
        return bool(seconds) and not any(seconds)

    @property
    def supervised(self) -> bool:
        """Whether this was supervised fine-tuning."""
        return any("mean_token_accuracy" in entry for entry in self.log)

    @property
    def updates(self) -> int:
        """Optimizer steps so far."""
        return max((entry.get("step", 0) for entry in self.log), default=0)

    def series(self, name: str, label: str = "", spread: str = "", ends: tuple[str, str] | None = None) -> Series:
        """
        A metric of the log.

        Args:
            name (`str`): the metric. Logs without a finite value of it do not count.
            label (`str`, *optional*): name of the curve.
            spread (`str`, *optional*): the metric that is its standard deviation, for a band of one on each side.
            ends (`tuple[str, str]`, *optional*): the metrics that are its smallest and its largest value, for a band.
        """
        needed = [name, *([spread] if spread else []), *(ends or ())]
        logs = [entry for entry in self.log if all(_is_number(entry.get(key)) for key in needed)]
        found = Series(label, [entry["step"] for entry in logs], [entry[name] for entry in logs])
        if spread:
            found.low = [entry[name] - entry[spread] for entry in logs]
            found.high = [entry[name] + entry[spread] for entry in logs]
        elif ends:
            found.low, found.high = ([entry[key] for entry in logs] for key in ends)
        return found

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """The metrics of the log whose names begin and end so, in order."""
        keys = {key for entry in self.log for key in entry}
        return sorted(key for key in keys if key.startswith(prefix) and key.endswith(suffix))


def read_run(path: str | Path) -> Run:
    """
    Reads what a run has left behind.

    Args:
        path (`str` or `Path`): output directory of the run, or one of its checkpoints. If the run is not over, its newest
            checkpoint counts.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: naming the file, if one is damaged.
    """
    directory, state = Path(path), state_file(path)
    if state is None:
        raise FileNotFoundError(f"There is no run in {path}: neither it nor a checkpoint in it has a {STATE}.")
    advice = "Draw another run, or train it again."
    log = read_record(state, ["log_history"], advice)["log_history"]
    if not isinstance(log, list) or not all(isinstance(entry, dict) and "step" in entry for entry in log):
        raise ValueError(f"{state}: `log_history` must be a list of objects, each with its `step`. {advice}")
    results = directory / RESULTS
    over = state.parent == directory and results.is_file()
    return Run(str(path), log, read_record(results, advice=advice) if over else {})


def state_file(path: str | Path) -> Path | None:
    """The newest state of the run in a directory: at its end, or in a checkpoint. `None` if there is none."""
    directory = Path(path)
    if (directory / STATE).is_file():
        return directory / STATE
    numbers = {
        int(end): file
        for file in directory.glob(f"checkpoint-*/{STATE}")
        if (end := file.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    return numbers[max(numbers)] if numbers else None


def panels(runs: Sequence[Run]) -> list[Panel]:
    """
    The six panels of some runs. A run on stored responses has no curve in the panels of rewards and lengths.

    Args:
        runs (`Sequence[Run]`): the runs. Panels for stored responses are shown if no run samples its responses.
    """
    stored = all(run.stored or run.supervised for run in runs)
    paired = stored and any(run.names("rewards/accuracies") for run in runs)

    def panel(title: str, *metrics: tuple[str, str], **options: Any) -> Panel:
        curves = [_curves(run.series(name, label) for name, label in metrics) for run in runs]
        return Panel(title, curves, **options)

    norm = panel("gradient norm", ("grad_norm", ""), lowest=0.0)
    divergence = panel(
        "KL divergence per token, in nats", ("kl", "from reference"), ("diffusion/kl_to_old", "from old policy"),
        lowest=0.0, highest=LEAST_KL,
    )  # fmt: skip
    size = panel("effective sample size", ("diffusion/effective_sample_size", ""), lowest=0.0, highest=1.05)
    if not stored:
        return [_reward(runs), _held_out(runs), divergence, size, norm, _length(runs)]
    loss = Panel("loss", [_loss(run) for run in runs])
    if all(run.supervised for run in runs):
        right = panel(
            "right guesses of masked tokens", ("mean_token_accuracy", ""), percent=True, lowest=0.0, highest=1.05
        )
        entropy, rate = (
            panel("entropy per token, in nats", ("entropy", "")),
            panel("learning rate", ("learning_rate", "")),
        )
        return [loss, _held_out(runs), right, entropy, norm, rate]
    if not paired:
        return [loss, _held_out(runs), divergence, size, norm, panel("entropy per token, in nats", ("entropy", ""))]
    order = panel("pairs in the right order", ("rewards/accuracies", ""), percent=True, lowest=0.0, highest=1.05)
    implicit = panel(
        "implicit rewards of the pairs", ("rewards/chosen", "better response"), ("rewards/rejected", "worse response")
    )
    return [loss, _held_out(runs), divergence, order, norm, implicit]


def _curves(found: Iterator[Series]) -> list[Series]:
    return [series for series in found if series.steps]


def _reward(runs: Sequence[Run]) -> Panel:
    """The total reward with its standard deviation; of a single run, the mean of each reward function, too."""
    curves = []
    for run in runs:
        names = run.names("rewards/", "/mean") if len(runs) == 1 else []
        total = run.series("reward", "total" if len(names) > 1 else "", spread="reward_std")
        parts = [run.series(name, name.removeprefix("rewards/").removesuffix("/mean")) for name in names]
        curves.append([] if run.stored else _curves(iter([total, *(parts if len(names) > 1 else [])])))
    return Panel("reward", curves, "one standard deviation")


def _length(runs: Sequence[Run]) -> Panel:
    ends = ("completions/min_length", "completions/max_length")
    curves = [[] if run.stored else _curves(iter([run.series("completions/mean_length", ends=ends)])) for run in runs]
    return Panel("tokens of a response", curves, "least to most", lowest=0.0)


def _loss(run: Run) -> list[Series]:
    """The loss and, if there are several, the losses that it is the sum of."""
    names = run.names("losses/")
    parts = [run.series(name, name.removeprefix("losses/")) for name in names] if len(names) > 1 else []
    return _curves(iter([run.series("loss", "total" if parts else ""), *parts]))


def _held_out(runs: Sequence[Run]) -> Panel:
    """
    What was measured on rows that training does not see: the solve rates of the command `train`, or else the metrics that
    callbacks logged, or else the reward, the order of pairs or the loss of evaluations.
    """
    curves = [_solve_rate(run) for run in runs]
    if any(curves):
        options: dict[str, Any] = {"percent": True, "measured": True, "lowest": 0.0, "highest": 1.05}
        return Panel("held-out solve rate", curves, "95 % interval", **options)
    curves = [_mean_reward(run) for run in runs]
    if any(curves):
        return Panel("held-out mean reward", curves, "95 % interval", measured=True)
    curves = [_curves(run.series(name, name.removeprefix("eval_")) for name in _of_callbacks(run)) for run in runs]
    if any(curves):
        return Panel("held-out metrics", curves, measured=True)
    for name, title in (
        ("eval_reward", "held-out reward"),
        ("eval_rewards/accuracies", "held-out pairs in the right order"),
    ):
        curves = [_curves(iter([run.series(name)])) for run in runs]
        if any(curves):
            return Panel(title, curves, percent="pairs" in title, measured=True)
    return Panel("held-out loss", [_held_out_loss(run) for run in runs], measured=True)


def _solve_rate(run: Run) -> list[Series]:
    """Before and after training, with Wilson's intervals."""
    last = run.results.get("steps", run.updates)
    measured = [(0, run.results.get("solve_rate_before")), (last, run.results.get("solve_rate_after"))]
    known = [(step, rate) for step, rate in measured if _is_number(rate)]
    rows = run.results.get("rows")
    intervals = [wilson(rate, int(rows)) for _, rate in known] if _is_number(rows) else []
    low, high = ([interval[end] for interval in intervals] for end in (0, 1))
    return _curves(iter([Series("", [step for step, _ in known], [rate for _, rate in known], low, high)]))


def _mean_reward(run: Run) -> list[Series]:
    """Before and after training on rows without a checker, with the intervals that are there."""
    steps, values, low, high = [], [], [], []
    for step, when in ((0, "before"), (run.results.get("steps", run.updates), "after")):
        value, ends = run.results.get(f"mean_reward_{when}"), run.results.get(f"interval_{when}")
        if _is_number(value) and isinstance(ends, list | tuple) and len(ends) == 2 and all(map(_is_number, ends)):
            steps.append(step)
            values.append(value)
            low.append(ends[0])
            high.append(ends[1])
    return _curves(iter([Series("", steps, values, low, high)]))


def _of_callbacks(run: Run) -> list[str]:
    """Metrics of held-out rows that callbacks logged: an evaluation logs its own together with its seconds."""
    logs = [entry for entry in run.log if "eval_runtime" not in entry]
    return sorted({key for entry in logs for key in entry if key.startswith("eval_")})


def _held_out_loss(run: Run) -> list[Series]:
    found = run.series("eval_loss")
    before, after = run.results.get("loss_before"), run.results.get("loss_after")
    if _is_number(before):
        found.steps, found.values = [0, *found.steps], [before, *found.values]
    if _is_number(after):
        found.steps, found.values = [*found.steps, run.results.get("steps", run.updates)], [*found.values, after]
    return _curves(iter([found]))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --------------------------------------------------------------------------------------------------------- words


def heading(run: Run) -> str:
    """What a run was, such as `outputs/tiny_sudoku: 60 updates on fresh responses`."""
    if run.supervised:
        return f"{run.name}: {run.updates} updates on documents"
    return f"{run.name}: {run.updates} updates on {'stored' if run.stored else 'fresh'} responses"


def short_names(names: Sequence[str]) -> list[str]:
    """Names of several runs without the directories that all of them are in."""
    if len(set(names)) < 2:
        return list(names)
    common = os.path.commonpath([os.path.abspath(name) for name in names])
    short = [os.path.relpath(name, common) for name in names]
    return [os.path.basename(common) if name == os.curdir else name for name in short]


def describe(run: Run) -> str:
    """The panels of a run as text: a line for each curve, with its first value, its shape and its last value."""
    rows = []
    for panel in panels([run]):
        if not panel.curves[0]:
            rows.append((panel.title, "not logged", "", ""))
        for series in panel.curves[0]:
            name = f"{panel.title}, {series.label}" if series.label else panel.title
            first, last = (_value(panel, series, place) for place in (0, -1))
            rows.append((name, first, spark(series.values, panel.lowest, panel.highest), last))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"  {name:{widths[0]}}  {first:>{widths[1]}}  {shape:{widths[2]}}  {last}" for name, first, shape, last in rows
    ]
    return "\n".join([heading(run), *(line.rstrip() for line in lines)])


def _value(panel: Panel, series: Series, place: int) -> str:
    def text(value: float) -> str:
        return f"{value:.1%}" if panel.percent else f"{round(value, 6) + 0.0:.4g}"

    if panel.measured and series.low:
        return f"{text(series.values[place])} ({text(series.low[place])} to {text(series.high[place])})"
    return text(series.values[place])


def spark(values: Sequence[float], lowest: float | None = None, highest: float | None = None) -> str:
    """
    A curve in one line of text, of at most [`WIDTH`] characters.

    Args:
        values (`Sequence[float]`): the curve.
        lowest, highest (`float`, *optional*): ends of the axis, if no value lies outside.
    """
    width = min(len(values), WIDTH)
    groups = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(group) / len(group) for group in groups]
    low, high = (
        min([*means, *([] if lowest is None else [lowest])]),
        max([*means, *([] if highest is None else [highest])]),
    )
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)
