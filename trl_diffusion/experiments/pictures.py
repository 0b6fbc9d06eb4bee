"""Pictures of a comparison. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from ..viz.colours import CURVES, css
from ..viz.plots import MARKERS, new_figure, save
from .report import AFTERWARDS, Results, curves


PANEL = (3.6, 3.0)  # inches


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
    arm = max((arm for arm in results.arms if name.startswith(arm)), key=len)
    index = results.arms.index(arm)
    line = ":" if name.endswith(AFTERWARDS) else "--" if name.endswith(", adaptive") else "-"
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
                means, halves = [one.mean for one in curve.values()], [one.half for one in curve.values()]
                handles[name] = axes.errorbar(
                    list(curve), means, halves, capsize=2, ms=4, linewidth=1.3, **_style(results, name)
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
    figure = new_figure(PANEL[0] * 2, PANEL[1] * -(-len(results.tasks) // 2) + 0.8)
    grid = figure.subplots(-(-len(results.tasks) // 2), 2, squeeze=False)
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
