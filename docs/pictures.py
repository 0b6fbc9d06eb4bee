"""
Draws the pictures of the documentation: the embedded policy answers a puzzle, and what happened is drawn.

    python docs/pictures.py                       # denoising.png, revision.png, packed.png and the badges
    python docs/pictures.py outputs/tiny_sudoku   # before_after.gif and rewards.png (six panels), too (`make train`)
"""

from __future__ import annotations

import re
import sys
import tomllib
from html import escape
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import generate, get_spec, tiny_policy_path
from trl_diffusion.policies.policy import Policy, open_policy
from trl_diffusion.rewards import sudoku
from trl_diffusion.scoring.estimators import EstimatorConfig, dtrpo
from trl_diffusion.scoring.layout import pack
from trl_diffusion.trajectories.trajectory import NEVER, global_steps, response_blocks
from trl_diffusion.viz.colours import CURVES, MASKED, WHITE, css
from trl_diffusion.viz.plots import plot_runs, plot_trajectory
from trl_diffusion.viz.runs import read_run


ROOT = Path(__file__).resolve().parents[1]
PICTURES = Path(__file__).parent / "pictures"
SEED = 3  # of the draw

# Blue and orange can be told apart with any colour vision.
GIVEN, COVERED, RIGHT, WRONG, OPEN = "#d9d9d9", "#f4f4f4", "#9ecae1", "#fdae6b", "#ffffff"


def draw_packed(batch, spec, tokenizer, path: Path) -> None:
    """The packed row of one response: what each place holds, what is scored there, and who may look at whom."""
    layout = pack(batch, spec, dtrpo(batch, spec, [SEED], EstimatorConfig()))
    ids, allowed = layout.input_ids[0].tolist(), layout.allowed.dense()[0, 0].int().numpy()
    clean = next(
        place for place in range(1, len(ids)) if layout.position_ids[0, place] <= layout.position_ids[0, place - 1]
    )
    texts = ["□" if token == spec.mask_token_id else tokenizer.decode([token])[:1] for token in ids]

    figure = Figure(figsize=(7.2, 7.5), layout="constrained")
    axes = figure.subplots()
    seen, drawn = (css(of) for of in (CURVES[5], CURVES[0]))
    axes.imshow(allowed, cmap=ListedColormap([css(MASKED), seen]), interpolation="none")
    scored = set(layout.columns.tolist())
    places = range(len(ids))
    axes.set_xticks(places, texts, fontsize=7)
    axes.set_yticks(places, texts, fontsize=7)
    for place, label in enumerate(axes.get_yticklabels()):
        if place in scored:
            label.set(color=css(WHITE), weight="bold", bbox={"facecolor": drawn, "edgecolor": "none", "pad": 1})
    for place in range(1, len(ids)):
        new = layout.position_ids[0, place] != layout.position_ids[0, place - 1] + 1 or (
            layout.position_ids[0, place] % spec.block_size == 0
        )
        if new:
            width = 2.0 if place == clean else 0.5
            axes.axhline(place - 0.5, color="black", linewidth=width)
            axes.axvline(place - 0.5, color="black", linewidth=width)
    axes.set(xlabel="is looked at (prompt and clean response, then noisy copies of the blocks)", ylabel="looks")
    axes.set_title("one packed row: □ is masked, tokens on dark blue are scored, light blue is allowed", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_revision(policy: Policy, path: Path) -> None:
    """The first evaluation puzzle that is solved in six passes with tokens taken back, and not without."""
    puzzles = list(sudoku.evaluation_puzzles(14)[:60])
    prompts = [sudoku.prompt(puzzle) for puzzle in puzzles]
    settings = {"max_new_tokens": 17, "steps_per_block": 6}
    revised = generate(policy.model, policy.tokenizer, prompts, revision="confidence", **settings)
    plain = generate(policy.model, policy.tokenizer, prompts, **settings)
    taken_back = revised.trajectories.revisions.steps >= 0
    row = next(
        row
        for row, puzzle in enumerate(puzzles)
        if taken_back[row].any()
        and sudoku.is_solved(puzzle, revised.texts[row])
        and not sudoku.is_solved(puzzle, plain.texts[row])
    )
    plot_trajectory(revised.trajectories, policy.spec, policy.tokenizer, path, row, title=prompts[row])


def shrink(path: Path) -> None:
    """Saves a picture again with the 64 colours that it has most of."""
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
            path, optimize=True, dpi=picture.info["dpi"]
        )


Frames = list[str]  # the canvas before each step and after the last one: a digit for each cell, or "." for a mask


def denoise_puzzles(policy: Policy, puzzles: list[str]) -> list[Frames]:
    """How a policy fills in puzzles, two cells at a step, the surest first."""
    prompts = [sudoku.prompt(puzzle) for puzzle in puzzles]
    settings = {"max_new_tokens": 17, "tokens_per_step": 2, "strategy": "entropy"}
    batch = generate(policy.model, policy.tokenizer, prompts, **settings).trajectories
    steps = global_steps(response_blocks(policy.spec, batch.prompt_lengths, batch.canvas_ids.shape[1]), batch.steps)
    found = []
    for ids, when in zip(batch.canvas_ids[:, :16].tolist(), steps[:, :16].tolist(), strict=True):
        digits = [policy.tokenizer.decode([token]) for token in ids]
        last = max(when)
        found.append(
            ["".join(digit if NEVER < at < step else "." for digit, at in zip(digits, when, strict=True))
             for step in range(last + 2)]
        )  # fmt: skip
    return found


def find_puzzle(before: Policy, after: Policy) -> tuple[str, Frames, Frames]:
    """The first puzzle kept for evaluation that is solved after training and not before, with the steps of both."""
    puzzles = list(sudoku.evaluation_puzzles()[:40])
    found = list(zip(puzzles, denoise_puzzles(before, puzzles), denoise_puzzles(after, puzzles), strict=True))
    gained = (
        (puzzle, one, other)
        for puzzle, one, other in found
        if sudoku.is_solved(puzzle, other[-1]) and not sudoku.is_solved(puzzle, one[-1])
    )
    return next(gained, found[0])


def conflicts(puzzle: str, cells: str) -> set[int]:
    """Cells that repeat a digit of their row, column or box, or are not what the puzzle says."""
    wrong = {cell for cell in range(16) if puzzle[cell] != "0" and cells[cell] != puzzle[cell]}
    for unit in sudoku.UNITS:
        digits = [cells[cell] for cell in unit]
        wrong |= {cell for cell in unit if digits.count(cells[cell]) > 1}
    return wrong


def draw_board(axes, puzzle: str, cells: str, new: set[int], done: bool, title: str) -> None:
    """A board: what the puzzle gives is grey, a cell that was just filled in has a thick frame. When all is filled in, cells are
    blue if they are right and orange if not."""
    wrong = conflicts(puzzle, cells) if done else set()
    for cell in range(16):
        row, column = divmod(cell, 4)
        face = COVERED if cells[cell] == "." else GIVEN if puzzle[cell] != "0" else OPEN
        if done:
            face = WRONG if cell in wrong else GIVEN if puzzle[cell] != "0" else RIGHT
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="#8c8c8c", linewidth=0.6))
        if cells[cell] != ".":
            weight = "bold" if cell in new else "normal"
            axes.text(column + 0.5, row + 0.52, cells[cell], ha="center", va="center", size=19, weight=weight)
        else:
            clue = puzzle[cell] if puzzle[cell] != "0" else ""
            axes.text(column + 0.5, row + 0.52, clue, ha="center", va="center", size=11, color="#9a9a9a")
    for cell in new:
        row, column = divmod(cell, 4)
        axes.add_patch(
            Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor="#08519c", linewidth=2.2)
        )
    for at in (0, 2, 4):
        axes.plot((at, at), (0, 4), color="black", linewidth=1.8)
        axes.plot((0, 4), (at, at), color="black", linewidth=1.8)
    axes.set(xlim=(-0.06, 4.06), ylim=(4.06, -0.06), aspect="equal")
    axes.axis("off")
    axes.set_title(title, fontsize=12)


def result_of(puzzle: str, cells: str) -> str:
    if sudoku.is_solved(puzzle, cells):
        return "solved"
    wrong = len(conflicts(puzzle, cells))
    return f"{wrong} cells in conflict" if wrong != 1 else "1 cell in conflict"


def draw_before_and_after(before: Policy, after: Policy, path: Path) -> None:
    """A moving picture of the same puzzle being filled in before and after training."""
    puzzle, *both = find_puzzle(before, after)
    length = max(map(len, both))
    images = []
    for step in range(length):
        figure = Figure(figsize=(6.2, 3.7), dpi=100, layout="constrained", facecolor="white")
        for axes, frames, when in zip(figure.subplots(1, 2), both, ("before training", "after training"), strict=True):
            now, last = frames[min(step, len(frames) - 1)], frames[max(min(step, len(frames)) - 1, 0)]
            done = step >= len(frames) - 1
            new = {cell for cell in range(16) if now[cell] != last[cell]} if step < len(frames) else set()
            title = f"{when}: {result_of(puzzle, now)}" if done else f"{when}, step {step} of {len(frames) - 1}"
            draw_board(axes, puzzle, now, new, done, title)
        figure.supxlabel("grey: given by the puzzle    blue: right    orange: in conflict", fontsize=9)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        images.append(Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB"))
    # One palette for all frames, so that nothing flickers.
    palette = images[-1].quantize(64)
    small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [900] + [600] * (length - 2) + [4000]
    small[0].save(path, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)


BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}: {value}">
<title>{label}: {value}</title>
<clipPath id="r"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{left}" height="20" fill="#444"/>
<rect x="{left}" width="{right}" height="20" fill="{colour}"/></g>
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{at_left}" y="14" textLength="{label_width}">{label}</text>
<text x="{at_right}" y="14" textLength="{value_width}">{value}</text></g></svg>
"""


def badge(label: str, value: str, colour: str = "#00695c") -> str:
    """A small picture of two words. It is a file of the repository, so that nothing is fetched to show it."""
    label_width, value_width = round(6.4 * len(label)), round(6.4 * len(value))
    left, right = label_width + 12, value_width + 12
    return BADGE.format(
        width=left + right, left=left, right=right, at_left=left / 2, at_right=left + right / 2, colour=colour,
        label_width=label_width, value_width=value_width, label=escape(label), value=escape(value),
    )  # fmt: skip


def badges() -> dict[str, str]:
    """The badges of the README, by the names of their files. What they say is what `pyproject.toml` says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = {re.match(r"[\w-]+", one)[0]: one for one in project["dependencies"]}

    def versions(name: str) -> str:
        lowest = re.search(r">=([\d.]+)", needs[name])[1]
        major, minor = re.search(r"<(\d+)\.(\d+)", needs[name]).groups()
        return f"{lowest} to {major}.{int(minor) - 1}"

    said = {
        "license": ("license", project["license"]),
        "python": ("Python", project["requires-python"].removeprefix(">=") + " or newer"),
        "trl": ("TRL", versions("trl")),
        "transformers": ("transformers", versions("transformers")),
        "paper": ("paper", "arXiv 2603.18806"),
    }
    return {f"{name}.svg": badge(*words) for name, words in said.items()}


def main(arguments: list[str]) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path(), trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), trust_remote_code=False)
    spec = get_spec(policy.config)
    prompt = sudoku.prompt(sudoku.evaluation_puzzles()[0])
    answer = generate(policy, tokenizer, [prompt], max_new_tokens=17, tokens_per_step=2).trajectories
    plot_trajectory(answer, spec, tokenizer, PICTURES / "denoising.png", title=prompt)
    draw_revision(open_policy(tiny_policy_path("revising")), PICTURES / "revision.png")
    draw_packed(answer, spec, tokenizer, PICTURES / "packed.png")
    for name, text in badges().items():
        (PICTURES / name).write_text(text, encoding="utf-8")
    if arguments:
        run = read_run(arguments[0])
        draw_before_and_after(
            open_policy(tiny_policy_path()), open_policy(arguments[0]), PICTURES / "before_after.gif"
        )
        title = f"4x4 sudoku, the embedded policy: {run.updates} updates"
        shrink(plot_runs([run], PICTURES / "rewards.png", title))


if __name__ == "__main__":
    main(sys.argv[1:])
