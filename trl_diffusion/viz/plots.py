"""Pictures of a trajectory and of a run. Needs matplotlib (`pip install 'trl-diffusion[viz]'`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..policies.spec import DiffusionSpec
from ..trajectories.trajectory import NEVER, TrajectoryBatch, global_steps, response_blocks


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'trl-diffusion[viz]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_trajectory(
    batch: TrajectoryBatch, spec: DiffusionSpec, tokenizer, path: str | Path, row: int = 0, title: str = ""
) -> Path:
    """
    Draws one response being denoised: positions from left to right, decoding steps from top to bottom. A cell shows
    its token from the step that unmasked it on, coloured by the probability it had then.

    Args:
        batch ([`TrajectoryBatch`]): the responses.
        spec ([`DiffusionSpec`]): facts about the policy that made them.
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.
        path (`str` or `Path`): PNG file to write.
        row (`int`, *optional*, defaults to `0`): which response.
        title (`str`, *optional*): heading.

    Returns:
        `Path` of the file.
    """
    one = batch.select(torch.tensor([row])).to("cpu")
    length = int(one.canvas_lengths[0])
    blocks = response_blocks(spec, one.prompt_lengths, length)
    steps = global_steps(blocks, one.steps[:, :length])[0].tolist()
    block_of = blocks[0].tolist()
    tokens = [tokenizer.decode([token]) for token in batch.canvas_ids[row, : len(steps)].tolist()]
    confidence = batch.logps[row, : len(steps)].exp().tolist()
    counted = int(batch.completion_lengths[row])
    num_steps = max(steps) + 1

    figure = _figure(max(5.0, 0.42 * len(steps) + 2.2), max(2.5, 0.34 * num_steps + 1.4))
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    colours, norm = figure_colormap(), Normalize(0, 1)
    for column, first in enumerate(steps):
        for step in range(num_steps):
            shown = first != NEVER and step >= first
            face = colours(norm(confidence[column])) if shown else (0.93, 0.93, 0.93)
            fade = 1.0 if step == first else 0.35
            axes.add_patch(Rectangle((column, step), 1, 1, facecolor=face, alpha=fade if shown else 1, edgecolor="w"))
            if shown:
                text = tokens[column].strip("<>") if len(tokens[column]) > 1 else tokens[column]
                weight = "bold" if step == first else "normal"
                size = 9 if len(text) == 1 else 5
                axes.text(
                    column + 0.5, step + 0.5, text.replace("$", r"\$"), ha="center", va="center", size=size,
                    weight=weight, color="black" if column < counted else "gray",
                )  # fmt: skip
    for column in range(1, len(steps)):
        if block_of[column] != block_of[column - 1]:
            axes.axvline(column, color="black", linewidth=1.2)
    axes.set(xlim=(0, len(steps)), ylim=(num_steps, 0), xlabel="position in the response", ylabel="denoising step")
    axes.set_xticks([c + 0.5 for c in range(0, len(steps), 4)], [str(c) for c in range(0, len(steps), 4)])
    axes.set_yticks([s + 0.5 for s in range(num_steps)], [str(s) for s in range(num_steps)])
    axes.set_title(title or "a response being denoised", fontsize=10)
    from matplotlib.cm import ScalarMappable

    figure.colorbar(ScalarMappable(norm=norm, cmap=colours), ax=axes, label="probability when unmasked")
    return _save(figure, path)


def figure_colormap():
    """Green for a safe token, red for an unsure one."""
    from matplotlib import colormaps

    return colormaps["RdYlGn"]


def plot_rewards(log_history: list[dict[str, Any]], path: str | Path, title: str = "") -> Path:
    """
    Draws the rewards of a run against its optimizer steps.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): PNG file to write.
        title (`str`, *optional*): heading.

    Returns:
        `Path` of the file.
    """
    rows = [entry for entry in log_history if "reward" in entry]
    figure = _figure(7, 4)
    axes = figure.subplots()
    names = sorted({key for entry in rows for key in entry if key.startswith("rewards/") and key.endswith("/mean")})
    for name in names:
        points = [(entry["step"], entry[name]) for entry in rows if entry.get(name) is not None]
        axes.plot(*zip(*points, strict=True), label=name.removeprefix("rewards/").removesuffix("/mean"), marker=".")
    axes.set(xlabel="optimizer step", ylabel="mean reward of the rollouts")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if names:
        axes.legend()
    axes.set_title(title or "rewards", fontsize=10)
    return _save(figure, path)


def _save(figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
