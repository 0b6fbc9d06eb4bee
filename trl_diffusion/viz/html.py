"""One response being denoised, as a page for a browser. Needs neither matplotlib nor a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

import torch

from ..policies.spec import DiffusionSpec
from ..trajectories.trajectory import NEVER, TrajectoryBatch, global_steps, response_blocks
from ..utils import write_text


MASK = "░"
NUM_TEXTS = 6
LEVELS = 20  # probabilities are coloured in steps of 1 / LEVELS
# The colours of matplotlib's RdYlGn, which `plot_trajectory` uses, from probability 0 to 1.
COLOURS = (
    (165, 0, 38), (215, 48, 39), (244, 109, 67), (253, 174, 97), (254, 224, 139), (255, 255, 191), (217, 239, 139),
    (166, 217, 106), (102, 189, 99), (26, 152, 80), (0, 104, 55),
)  # fmt: skip
# Control characters would not survive an HTML parser: their pictures stand for them.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 1.5em; color: #111; background: #fff; }
h1 { font-size: 1.2em; white-space: pre-wrap; }
h2 { font-size: 1em; margin: 1.2em 0 0.3em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font: 13px/1.4 ui-monospace, monospace; }
td { white-space: pre; text-align: center; min-width: 1.2em; height: 1.4em; padding: 0 3px; border: 1px solid #fff; }
th { font-weight: normal; font-size: 10px; color: #666; padding: 0 3px; background: #fff; }
tbody th { position: sticky; left: 0; text-align: right; }
tr.at th { background: #111; color: #fff; }
.block { border-left: 2px solid #111; border-right: 2px solid #111; }
.text { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc;
  padding: 0.4em 0.6em; max-width: 100ch; }
.legend { display: inline-block; width: 12em; height: 0.8em; vertical-align: middle; margin: 0 0.5em; }
.u { font-weight: bold; }
input { width: 24em; max-width: 60%; vertical-align: middle; }
"""

SCRIPT = """
const rows = document.querySelectorAll("#grid tbody tr"), heads = document.querySelectorAll("#grid thead th");
const tokens = [...document.querySelectorAll("#state span")], texts = tokens.map(token => token.textContent);
const slider = document.getElementById("slider"), at = document.getElementById("at");
function show() {
  const now = Number(slider.value);
  at.textContent = now;
  rows.forEach((row, step) => row.classList.toggle("at", step === now));
  tokens.forEach((token, i) => {
    const step = Number(token.dataset.step), shown = step >= 0 && step <= now;
    token.textContent = shown ? texts[i] : "MASK";
    token.classList.toggle("m", !shown);
    token.classList.toggle("u", step === now);
  });
}
slider.addEventListener("input", show);
document.getElementById("grid").addEventListener("mouseover", event => {
  const cell = event.target.closest("td");
  if (cell && !cell.title) cell.title = heads[cell.cellIndex].title;
});
show();
""".replace("MASK", MASK)


def trajectory_html(
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    tokenizer,
    path: str | Path,
    row: int = 0,
    title: str = "",
    steps: Sequence[int] | None = None,
) -> Path:
    """
    Writes a page that shows one response being denoised: positions from left to right, decoding steps from top to
    bottom, each token from the step that unmasked it on, coloured by the probability it had then. Below, a slider
    moves through the text, and the text as it was after some steps is spelt out. The page is one file and loads
    nothing. It has a cell for each position and step, of about 20 bytes.

    Args:
        batch ([`TrajectoryBatch`]): the responses. A log-probability of NaN stands for one that nobody recorded.
        spec ([`DiffusionSpec`]): facts about the policy that made them.
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.
        path (`str` or `Path`): HTML file to write. It appears when it is whole.
        row (`int`, *optional*, defaults to `0`): which response.
        title (`str`, *optional*): heading.
        steps (`Sequence[int]`, *optional*): decoding steps, counted through all blocks, after which the text is spelt
            out. Defaults to about six, from the first to the last.

    Returns:
        `Path` of the file.

    Raises:
        IndexError: if there is no such row.
        ValueError: if `steps` holds a step that this response did not take.
    """
    shown = _Shown(batch.select(torch.tensor([row])).to("cpu"), spec, tokenizer)
    last = shown.last
    steps = sorted({round(last * i / (NUM_TEXTS - 1)) for i in range(NUM_TEXTS)}) if steps is None else list(steps)
    for step in steps:
        if not 0 <= step <= last:
            raise ValueError(f"`steps` holds {step}, but this response took the steps 0 to {last}.")
    page = _page(shown, _escape(title or "a response being denoised"), steps)
    write_text(path, page.encode("utf-8", "replace").decode())  # a token may hold half of a character
    return Path(path)


class _Shown:
    """What is shown of a response, the only one of `one`: a place for each canvas position, as HTML."""

    def __init__(self, one: TrajectoryBatch, spec: DiffusionSpec, tokenizer):
        length = int(one.canvas_lengths[0])
        blocks = response_blocks(spec, one.prompt_lengths, length)
        self.tokenizer, self.counted = tokenizer, int(one.completion_lengths[0])
        self.firsts = global_steps(blocks, one.steps[:, :length])[0].tolist()
        self.last = max([0, *self.firsts])
        self.blocks = blocks[0].tolist()
        self.ids = one.canvas_ids[0, :length].tolist()
        self.tokens = [tokenizer.decode([token]) for token in self.ids]
        probabilities = one.logps[0, :length].exp().tolist()
        self.classes = [
            _colour_class(probability) + (" g" if column >= self.counted else "")
            for column, probability in enumerate(probabilities)
        ]
        self.titles = [
            _escape(f"position {column}, block {block}, {_event(first, probability)}: {token!r}")
            if first != NEVER
            else f"position {column}, block {block}, never unmasked"
            for column, (block, first, probability, token) in enumerate(
                zip(self.blocks, self.firsts, probabilities, self.tokens, strict=True)
            )
        ]

    def cell(self, column: int, step: int) -> str:
        """A position in the row of a step."""
        first = self.firsts[column]
        if first == NEVER or step < first:
            return '<td class="m"></td>'
        if step > first:
            return f'<td class="{self.classes[column]}">{self._picture(column)}</td>'
        return f'<td class="{self.classes[column]} u" title="{self.titles[column]}">{self._picture(column)}</td>'

    def _picture(self, column: int) -> str:
        return _escape(self.tokens[column].replace("\n", "↵").replace("\t", "⇥"))

    def text(self, step: int) -> str:
        """The response after a step; what is masked, as masks."""

        def kind(column: int) -> tuple[bool, bool]:
            return self.firsts[column] != NEVER and self.firsts[column] <= step, column < self.counted

        parts = []
        for (visible, counts), group in groupby(range(len(self.ids)), kind):
            columns = list(group)
            part = MASK * len(columns)
            if visible:
                part = _escape(self.tokenizer.decode([self.ids[column] for column in columns]))
            parts.append(part if counts else f'<span class="g">{part}</span>')
        return "".join(parts)

    def state(self) -> str:
        """The text that the slider moves through."""
        return "".join(
            f'<span class="{self.classes[column]}{"" if first != NEVER else " m"}" data-step="{first}">'
            f"{_escape(self.tokens[column]) if first != NEVER else MASK}</span>"
            for column, first in enumerate(self.firsts)
        )


def _page(shown: _Shown, heading: str, steps: Sequence[int]) -> str:
    """The whole page."""
    columns, last = range(len(shown.ids)), shown.last
    groups = "".join(
        f'<colgroup class="block" span="{len(list(group))}"></colgroup>' for _, group in groupby(shown.blocks)
    )
    head = "".join(f'<th title="{shown.titles[column]}">{column}</th>' for column in columns)
    body = "\n".join(
        f"<tr><th>{step}</th>{''.join(shown.cell(column, step) for column in columns)}</tr>"
        for step in range(last + 1)
    )
    texts = "\n".join(
        f'<h2>After step {step}</h2>\n<div class="text" data-after="{step}">{shown.text(step)}</div>' for step in steps
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{heading}</title>
<style>{STYLE}{_colour_rules()}</style>
</head>
<body>
<h1>{heading}</h1>
<p>Positions of the response from left to right, denoising steps from top to bottom. Thick lines are the borders of
blocks, bold tokens were unmasked at this step, gray ones lie behind the end of the response.
Probability when unmasked: 0<span class="legend"></span>1</p>
<div class="wide"><table id="grid">
<colgroup><col></colgroup>{groups}
<thead><tr><th>step</th>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<h2>After step <output id="at">{last}</output>
<input type="range" id="slider" min="0" max="{last}" value="{last}" aria-label="step"></h2>
<div class="text" id="state">{shown.state()}</div>
{texts}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _escape(text: str) -> str:
    return escape(text.translate(CONTROLS))


def _event(step: int, probability: float) -> str:
    known = "a probability that was not recorded" if probability != probability else f"probability {probability:.4f}"
    return f"unmasked at step {step} with {known}"


def _colour_class(probability: float) -> str:
    return "p" if probability != probability else f"p{round(min(probability, 1.0) * LEVELS)}"


def _colour_rules() -> str:
    """CSS: full colours where a token is unmasked, pale ones after that and behind the response."""
    gradient = ", ".join(f"rgb{colour}" for colour in COLOURS)
    rules = [f".legend {{ background: linear-gradient(to right, {gradient}); }}", ".p { background: #e4e9f2; }"]
    for level in range(LEVELS + 1):
        place = level / LEVELS * (len(COLOURS) - 1)
        left = min(int(place), len(COLOURS) - 2)
        full = tuple(
            round(a + (b - a) * (place - left)) for a, b in zip(COLOURS[left], COLOURS[left + 1], strict=True)
        )
        pale = tuple(round(255 + 0.35 * (part - 255)) for part in full)
        bright = 0.299 * full[0] + 0.587 * full[1] + 0.114 * full[2] > 110
        rules.append(f".p{level} {{ background: rgb{pale}; }}")
        rules.append(f".p{level}.u:not(.g) {{ background: rgb{full}; color: {'#111' if bright else '#fff'}; }}")
    return "\n".join([*rules, ".g { color: #777; }", ".m { background: #ededed; color: #999; }", ""])
