"""
Draws the pictures of the documentation: the embedded policy answers a puzzle, and what happened is drawn.

    python docs/pictures.py                       # denoising.png, packed.png
    python docs/pictures.py outputs/tiny_sudoku   # rewards.png, too: that run in six panels (`make train`)
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import generate, get_spec, tiny_policy_path
from trl_diffusion.rewards import sudoku
from trl_diffusion.scoring.estimators import EstimatorConfig, dtrpo
from trl_diffusion.scoring.layout import pack
from trl_diffusion.viz.colours import CURVES, MASKED, WHITE, css
from trl_diffusion.viz.plots import plot_runs, plot_trajectory
from trl_diffusion.viz.runs import read_run


PICTURES = Path(__file__).parent / "pictures"
SEED = 3  # of the draw


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


def shrink(path: Path) -> None:
    """Saves a picture again with the 64 colours that it has most of."""
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
            path, optimize=True, dpi=picture.info["dpi"]
        )


def main(arguments: list[str]) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path(), trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), trust_remote_code=False)
    spec = get_spec(policy.config)
    prompt = sudoku.prompt(sudoku.evaluation_puzzles()[0])
    answer = generate(policy, tokenizer, [prompt], max_new_tokens=17, tokens_per_step=2).trajectories
    plot_trajectory(answer, spec, tokenizer, PICTURES / "denoising.png", title=prompt)
    draw_packed(answer, spec, tokenizer, PICTURES / "packed.png")
    if arguments:
        run = read_run(arguments[0])
        title = f"4x4 sudoku, the embedded policy: {run.updates} updates"
        shrink(plot_runs([run], PICTURES / "rewards.png", title))


if __name__ == "__main__":
    main(sys.argv[1:])
