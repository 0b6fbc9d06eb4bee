"""Pictures of a trajectory and of runs. Needs matplotlib (`pip install 'trl-diffusion[viz]'`)."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..policies.spec import DiffusionSpec
from ..trajectories.trajectory import TrajectoryBatch, response_blocks
from ..utils import printable, whole_file
from .colours import AFTER_END, CURVES, GRAY, KEPT, MASKED, NEW, VIRIDIS, colour, css, ink
from .runs import Panel, Run, Series, heading, panels, short_names
from .stays import last_step, response_stays
from .text import cells, spell


MOST_CELLS = 20_000  # of a picture of a trajectory: 140 positions in as many steps
MOST_PIXELS = 8_000  # on a side
PART = 64  # positions to draw of a trajectory that has more cells
LONGEST = 12  # characters to draw of a token
MARKERS, MOST_MARKERS = "os^DvPX", 60
LEGEND_COLUMNS = 3
ROUNDING = 1e-6  # below the lowest value that there can be
# Fonts with more characters than matplotlib's own, where they are installed.
FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
)


def new_figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'trl-diffusion[viz]'") from error
    return Figure(figsize=(width, height), layout="constrained")


# -------------------------------------------------------------------------------------------------- a trajectory


class _Response:
    """What is drawn of a response: at each position the tokens that were written there, and their texts."""

    def __init__(self, batch: TrajectoryBatch, spec: DiffusionSpec, tokenizer, row: int, max_positions: int | None):
        every = response_stays(batch, spec, row)
        self.length, self.counted = len(every), int(batch.completion_lengths[row])
        self.stays = every[:max_positions]
        self.blocks = response_blocks(spec, batch.prompt_lengths[row : row + 1], self.length)[0].tolist()
        kept = [stays[-1].token if stays and stays[-1].end == math.inf else None for stays in every]
        self.texts = [
            [_token(tokenizer.decode([stay.token]) if stay.end < math.inf else final or "") for stay in stays]
            for stays, final in zip(self.stays, spell(tokenizer.decode, kept), strict=False)
        ]
        # Steps at which something shown was written or erased.
        known = {step for stays in self.stays for stay in stays for step in (stay.first, stay.end) if step < math.inf}
        self.steps = sorted(int(step) for step in known) or [1]


def num_cells(batch: TrajectoryBatch, spec: DiffusionSpec, row: int = 0) -> int:
    """Positions times steps of a response: the cells of its picture."""
    stays = response_stays(batch, spec, row)
    return len(stays) * last_step(stays)


def fitting_positions(batch: TrajectoryBatch, spec: DiffusionSpec, row: int, most: int) -> int:
    """How many positions of a response, from the first one on and at most `most`, a picture has room for."""
    stays = response_stays(batch, spec, row)
    return max(1, min(most, len(stays), MOST_CELLS // max(1, last_step(stays))))


def plot_trajectory(
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    tokenizer,
    path: str | Path,
    row: int = 0,
    title: str = "",
    max_positions: int | None = None,
) -> Path:
    """
    Draws one response being denoised: positions from left to right, denoising steps, counted from 1, from top to bottom. A
    cell shows its token from the step that wrote it on, coloured by the probability it had then. Tokens are bold at that
    step, pale at later ones, gray after the end of the response, and struck out at the step that takes them back.

    Args:
        batch ([`TrajectoryBatch`]): the responses. A log-probability of NaN stands for one that nobody recorded.
        spec ([`DiffusionSpec`]): facts about the policy that made them.
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.
        path (`str` or `Path`): PNG file to write. It appears when it is whole.
        row (`int`, *optional*, defaults to `0`): which response.
        title (`str`, *optional*): heading. A long one is cut off.
        max_positions (`int`, *optional*): number of positions to draw, from the first one on. Steps that change none of
            these are left out. Defaults to all.

    Returns:
        `Path` of the file.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there are more than [`MOST_CELLS`] cells to draw.
    """
    response = _Response(batch, spec, tokenizer, row, max_positions)
    lines, shown = response.steps, len(response.stays)
    if len(lines) * shown > MOST_CELLS:
        raise ValueError(
            f"{shown} positions in {len(lines)} steps are too many for a picture. Pass a smaller `max_positions`, or write "
            "a page with `trajectory_html`."
        )
    longest = max([1, *(cells(text) for texts in response.texts for text in texts)])
    cell = max(0.34, (4.8 * longest + 5) / 72)  # inches
    figure = new_figure(max(4.0, cell * shown + 1.7), max(2.3, 0.26 * len(lines) + 1.1))
    axes = figure.subplots()
    _draw_cells(axes, response, cell)
    for position in range(1, shown):
        if response.blocks[position] != response.blocks[position - 1]:
            axes.axvline(position, color="black", linewidth=1.5)
    part = f" (0 to {shown - 1} of {response.length})" if shown < response.length else ""
    axes.set(xlim=(0, shown), ylim=(len(lines), 0), xlabel=f"position in the response{part}", ylabel="denoising step")
    ticks = range(0, shown, 4)
    axes.set_xticks([position + 0.5 for position in ticks], [str(position) for position in ticks])
    axes.set_yticks([line + 0.5 for line in range(len(lines))], [str(step) for step in lines])
    axes.tick_params(labelsize=8, length=2)
    room = int(figure.get_figwidth() * 72 / 5.5)
    heading = textwrap.shorten(_visible(title) or "a response being denoised", room, placeholder=" ...")
    axes.set_title(heading, fontsize=10, parse_math=False, fontfamily=_fonts())
    _draw_scale(figure, axes, response)
    return save(figure, path)


def _draw_cells(axes, response: _Response, cell: float) -> None:
    """A line for each step: the colours of its cells, and the tokens on them."""
    faces = np.full((len(response.steps), len(response.stays), 3), MASKED, dtype=np.uint8)
    for position, (stays, texts) in enumerate(zip(response.stays, response.texts, strict=True)):
        ended = position >= response.counted
        for stay, text in zip(stays, texts, strict=True):
            style: dict[str, Any] = {
                "size": min(9.0, (72 * cell - 4) / (0.64 * max(cells(text), 1))), "fontfamily": _fonts(), "ha": "center",
                "va": "center", "parse_math": False, "in_layout": False,  # its cell is wide enough
            }  # fmt: skip
            for line, step in enumerate(response.steps):
                place = (position + 0.5, line + 0.5)
                if stay.is_shown(step):
                    new = step == stay.first
                    face = colour(stay.probability, AFTER_END if ended else NEW if new else KEPT)
                    faces[line, position] = face
                    weight, shade = "bold" if new else "normal", GRAY if ended else ink(face)
                    axes.text(*place, text, weight=weight, color=css(shade), **style)
                elif step == stay.end and not any(other.is_shown(step) for other in stays):
                    axes.text(*place, text, color=css(GRAY), **style)
                    axes.hlines(place[1], position + 0.1, position + 0.9, color=css(GRAY), linewidth=1)
    axes.pcolormesh(
        range(len(response.stays) + 1), range(len(response.steps) + 1), faces, edgecolor="white", linewidth=0.8
    )


def _draw_scale(figure, axes, response: _Response) -> None:
    """What the colours mean."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    probabilities = [stay.probability for stays in response.stays for stay in stays]
    if probabilities and all(math.isnan(probability) for probability in probabilities):
        axes.text(
            1.0, 1.01, "probabilities were not recorded", transform=axes.transAxes, ha="right", va="bottom", size=8
        )
        return
    scale = LinearSegmentedColormap.from_list("viridis", [css(of) for of in VIRIDIS])
    bar = figure.colorbar(ScalarMappable(norm=Normalize(0, 1), cmap=scale), ax=axes, fraction=0.05, pad=0.015)
    bar.set_label("probability when unmasked", size=8)
    bar.ax.tick_params(labelsize=8, length=2)


def _token(text: str) -> str:
    """A token, with signs for blanks that stand alone, and cut off if it is long."""
    shown = _visible(text) if text.strip(" ") else "␣" * len(text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def _visible(text: str) -> str:
    """A text with signs for line feeds and tabs."""
    return printable(text.replace("\n", "↵").replace("\t", "⇥"))


# ---------------------------------------------------------------------------------------------------------- runs


def plot_runs(runs: Sequence[Run], path: str | Path, title: str = "") -> Path:
    """
    Draws what happened in some runs, as six panels over their optimizer steps.

    If a run samples its responses, these are the reward, the held-out solve rate, the KL divergence, the effective sample size,
    the gradient norm and the length. The rewards and lengths of stored responses say nothing about the policy. If all runs
    train on stored responses, the panels are the loss, the held-out solve rate, the KL divergence, the effective sample size (or
    the share of pairs in the right order), the gradient norm, and the entropy (or the implicit rewards of the pairs).

    Example:

    ```python
    run = Run("short", trainer.state.log_history)
    plot_runs([run], "run.png")
    ```

    Args:
        runs (`Sequence[Run]`): the runs: of directories ([`~viz.runs.read_run`]), or of a trainer.
        path (`str` or `Path`): PNG file to write. It appears when it is whole.
        title (`str`, *optional*): heading. Defaults to the name of a single run.

    Returns:
        `Path` of the file.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there is no run.
    """
    if not runs:
        raise ValueError("There is no run to draw.")
    figure = new_figure(7.2, 7.4)
    grid = figure.subplots(3, 2, sharex=True)
    colours = _colours(len(runs))
    for axes, panel in zip(grid.flat, panels(runs), strict=True):
        _draw_panel(axes, panel, colours)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step", fontsize=9)
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        names = [
            f"{name} (stored responses)" if run.stored else name
            for name, run in zip(short_names([run.name for run in runs]), runs, strict=True)
        ]
        keys = [Line2D([], [], color=of, marker=MARKERS[i % len(MARKERS)], ms=4) for i, of in enumerate(colours)]
        figure.legend(keys, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(
        title or (heading(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"), fontsize=10, parse_math=False
    )
    return save(figure, path)


def _colours(number: int) -> list[str]:
    """A colour for each run, or shades from dark to bright if there are many."""
    if number <= len(CURVES):
        return [css(of) for of in CURVES[:number]]
    return [css(colour(0.9 * index / (number - 1))) for index in range(number)]


def _draw_panel(axes, panel: Panel, colours: list[str]) -> None:
    """One of the six. The curves of a single run differ in colour and dashes. Several runs differ in colour and marker, and the
    curves of each in dashes."""
    alone = len(panel.curves) == 1
    labels = list(dict.fromkeys(series.label for curves in panel.curves for series in curves))
    keys: dict[str, Any] = {}
    for index, (curves, own) in enumerate(zip(panel.curves, colours, strict=True)):
        for series in curves:
            number = labels.index(series.label)
            shade = css(CURVES[number % len(CURVES)]) if alone else own
            drawn = _draw_series(
                axes, series, panel.measured, color=shade, marker=MARKERS[(number if alone else index) % len(MARKERS)],
                linestyle="-" if number == 0 else (0, (3, number)),
            )  # fmt: skip
            keys.setdefault(series.label, drawn)
    _scale(axes, panel)
    band = f" ({'' if panel.measured else 'band: '}{panel.band})" if panel.band else ""
    named = bool(set(keys) - {""})
    rows = math.ceil(len(keys) / LEGEND_COLUMNS) if named else 0
    axes.set_title(f"{panel.title}{band}", fontsize=9, pad=6 + 13 * rows)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if not keys:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=css(GRAY))
        axes.set_yticks([])
    if named:
        legend = axes.legend(
            keys.values(), [textwrap.shorten(name, 18, placeholder="…") for name in keys], loc="lower center",
            bbox_to_anchor=(0.5, 1.0), ncols=LEGEND_COLUMNS, fontsize=8, frameon=False, handlelength=1.6, columnspacing=1.0,
            borderaxespad=0,
        )  # fmt: skip
        for line in [] if alone else legend.get_lines():
            line.set(color=css(GRAY), marker="")


def _draw_series(axes, series: Series, measured: bool, **style):
    """One curve with its band, or with an interval at each measurement."""
    if len(series.steps) > MOST_MARKERS:
        style["marker"] = ""
    if measured:  # nothing is known of the steps in between
        style["linestyle"] = ":"
    if measured and series.low:
        ends = [[value - low for value, low in zip(series.values, series.low, strict=True)],
                [high - value for value, high in zip(series.values, series.high, strict=True)]]  # fmt: skip
        axes.errorbar(
            series.steps, series.values, ends, color=style["color"], capsize=3, linewidth=1, linestyle="none"
        )
    elif series.low:
        axes.fill_between(series.steps, series.low, series.high, color=style["color"], alpha=0.15, linewidth=0)
    (line,) = axes.plot(series.steps, series.values, ms=3.5, linewidth=1.3, clip_on=False, **style)
    return line


def _scale(axes, panel: Panel) -> None:
    """The ends of the vertical axis, unless a value lies outside, and its unit."""
    shown = [
        end for curves in panel.curves for series in curves for end in (*series.values, *series.low, *series.high)
    ]
    if panel.lowest is not None and min(shown, default=0.0) >= panel.lowest - ROUNDING:
        axes.set_ylim(bottom=panel.lowest)
    if panel.highest is not None and max(shown, default=0.0) <= panel.highest:
        axes.set_ylim(top=panel.highest)
    if panel.percent:
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


# ---------------------------------------------------------------------------------------------------------- files


@cache
def _fonts() -> list[str]:
    """Families whose characters are tried one after the other."""
    from matplotlib import font_manager, rcParams

    return [*rcParams["font.family"], *(name for name in FONTS if name in font_manager.get_font_names())]


def save(figure, path: str | Path) -> Path:
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # no font has the character: a box is drawn
        figure.savefig(temporary, dpi=min(150.0, MOST_PIXELS / max(figure.get_size_inches())))
    return Path(path)
