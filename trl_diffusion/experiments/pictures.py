"""Pictures of a comparison. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from ..viz.colours import CURVES, css
from ..viz.plots import MARKERS, new_figure, save
from .queue import Row
from .report import ADAPTIVE, AFTERWARDS, Results, curves
from .scaling import collect, fit, log_odds


PANEL = (3.6, 3.0)  # inches
BEYOND = 1.0  # decades of parameters that a line is extrapolated by


def draw(results: Results, directory: Path) -> list[str]:
    """
    Draws solve rates by forward passes (`passes.png`) and rewards by core seconds (`rewards.png`). Returns the names of the files, none
    if matplotlib is missing.

    Args:
        results ([`Results`]): what came out.
        directory (`Path`): where to write.
    """
    try:
        return [_draw_passes(results, directory / "passes.png"), _draw_rewards(results, directory / "rewards.png")]
    except ImportError as error:
        print(f"No pictures were drawn: {error}")
        return []


def _style(results: Results, name: str) -> dict[str, Any]:
    """Colour and marker of an arm; dashes for adaptive unmasking, dots for revision only when measured."""
    index = results.arms.index(name.removesuffix(AFTERWARDS).removesuffix(ADAPTIVE))
    line = ":" if name.endswith(AFTERWARDS) else "--" if name.endswith(ADAPTIVE) else "-"
    return {
        "color": css(CURVES[index % len(CURVES)]),
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": line,
        "label": name,
    }


def _draw_passes(results: Results, path: Path) -> str:
    figure = new_figure(PANEL[0] * 2, PANEL[1] * len(results.tasks) + 1)
    grid = figure.subplots(len(results.tasks), 2, squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for task, line in zip(results.tasks, grid, strict=True):
        for temperature, axes in zip((0.0, 1.0), line, strict=True):
            for name, curve in curves(results, task, temperature).items():
                means = [one.mean for one in curve.values()]
                ends = [
                    [min(one.half, one.mean) for one in curve.values()],
                    [min(one.half, 1 - one.mean) for one in curve.values()],
                ]
                handles[name] = axes.errorbar(
                    list(curve), means, ends, capsize=2, ms=4, linewidth=1.3, elinewidth=0.6, **_style(results, name)
                )
            axes.set_title(f"{task}, temperature {temperature:g}", fontsize=9)
            axes.set_xlabel("forward passes, at most", fontsize=8)
            axes.set_ylim(-0.03, 1.03)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    figure.suptitle("Share of solved puzzles after reinforcement", fontsize=10)
    return save(figure, path).name


def _draw_rewards(results: Results, path: Path) -> str:
    columns = min(2, len(results.tasks))
    lines = -(-len(results.tasks) // columns)
    figure = new_figure(PANEL[0] * 2, PANEL[1] * lines + 0.8)
    grid = figure.subplots(lines, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes in grid.flat[len(results.tasks) :]:
        axes.set_visible(False)
    for task, axes in zip(results.tasks, grid.flat, strict=False):
        for arm in results.arms:
            rows = results.runs.get((task, arm), [])
            if not rows:
                continue
            number = min(len(row["rewards"]) for row in rows)
            seconds = [fmean(row["seconds_after"][step] for row in rows) for step in range(number)]
            rewards = [fmean(row["rewards"][step] for row in rows) for step in range(number)]
            style = {**_style(results, arm), "marker": ""}
            (handles[arm],) = axes.plot(seconds, rewards, linewidth=1.3, **style)
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("core seconds", fontsize=8)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.suptitle("Mean reward of rollouts, mean over seeds", fontsize=10)
    return save(figure, path).name


def draw_scaling(rows: list[Row], directory: Path) -> list[str]:
    """
    Draws log-odds of a solved puzzle by parameters, with the largest amount of data, before and after the longest reinforcement
    (`scaling.png`). Lines are dotted where they are extrapolated.

    Args:
        rows (`list[dict]`): the rows of the study.
        directory (`Path`): where to write.

    Returns:
        `list[str]`: the name of the file; none if matplotlib is missing.
    """
    found = collect(rows)
    most = max(share for _, _, share, _ in found)
    longest = max(updates for *_, updates in found)
    tasks = list(dict.fromkeys(task for task, *_ in found))
    arms = list(dict.fromkeys(arm for _, arm, *_ in found))
    try:
        figure = new_figure(PANEL[0] * 2, PANEL[1] * len(tasks) + 0.8)
    except ImportError as error:
        print(f"No pictures were drawn: {error}")
        return []
    grid = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for task, line in zip(tasks, grid, strict=True):
        for updates, axes in zip((0, longest), line, strict=True):
            for index, arm in enumerate(arms):
                points = [
                    (math.log10(number), log_odds(rate, puzzles))
                    for number, rate, puzzles in found.get((task, arm, most, updates), [])
                ]
                _draw_fit(axes, points, css(CURVES[index]), MARKERS[index], arm)
            axes.set_title(f"{task}, {f'after {updates} updates' if updates else 'before reinforcement'}", fontsize=9)
            axes.set_xlabel("parameters, powers of 10", fontsize=8)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    figure.suptitle("Log-odds of a solved puzzle; dotted: extrapolated", fontsize=10)
    return [save(figure, directory / "scaling.png").name]


def _draw_fit(axes, points: list[tuple[float, float]], colour: str, marker: str, label: str) -> None:
    """Points, and the line through them if there are enough."""
    axes.plot([x for x, _ in points], [y for _, y in points], marker, color=colour, ms=4, label=label)
    try:
        line = fit(points)
    except ValueError:
        return
    low, high = line.ends
    for ends, style in (((low, high), "-"), ((high, high + BEYOND), ":")):
        axes.plot(ends, [line.intercept + line.slope * x for x in ends], style, color=colour, linewidth=1.3)
