"""One response being denoised, as a page for a browser. Needs neither matplotlib nor a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from math import inf, isnan
from pathlib import Path
from typing import Any

from ..decoding.config import DecodingConfig
from ..policies.spec import DiffusionSpec
from ..trajectories.trajectory import TrajectoryBatch, response_blocks
from ..utils import write_text
from .colours import AFTER_END, BLACK, GRAY, KEPT, MASKED, WHITE, Colour, colour, css, ink
from .stays import Stay, last_step, response_stays
from .text import MASK, cells, spell


NUM_TEXTS = 6
LEVELS = 20  # probabilities are coloured in steps of 1 / LEVELS
LONG, VERY_LONG = 200, 1500  # characters of a text that is folded in a narrow window, and in every window
LONG_PROMPT = 60
MANY = 64  # positions of a table that is folded
MOST_SIBLINGS = 15
SHOWN_SETTINGS = ("strategy", "temperature", "max_new_tokens")  # whatever they are; others if they are not the default
# Control characters would not survive an HTML parser: their pictures stand for them.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
SCHEMES: dict[str, dict[str, Colour]] = {
    "light": {"page": WHITE, "ink": BLACK, "faint": GRAY, "line": (204, 204, 204), "panel": (246, 246, 246), "mask": MASKED},
    "dark": {
        "page": (22, 24, 29), "ink": (238, 238, 238), "faint": (184, 184, 184), "line": (75, 78, 86), "panel": (32, 35, 42),
        "mask": (50, 54, 62),
    },
}  # fmt: skip


def trajectory_html(
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    tokenizer,
    path: str | Path,
    row: int = 0,
    title: str = "",
    steps: Sequence[int] | None = None,
    *,
    rewards: Mapping[str, Sequence[float | None]] | None = None,
    policy: str = "",
    decoding: DecodingConfig | Mapping[str, Any] | None = None,
) -> Path:
    """
    Writes a page that shows one response being denoised. Its text and a slider through its denoising steps stay in sight;
    a button plays them. A token is coloured by the probability that the policy gave it. The page also shows the prompt,
    the rewards, the policy, the settings of decoding, the other responses to the same prompt side by side, and a table of
    when each token was written. The page is one file and loads nothing. A token of a response takes about 100 bytes.

    Args:
        batch ([`TrajectoryBatch`]): the responses. A log-probability of NaN stands for one that nobody recorded.
        spec ([`DiffusionSpec`]): facts about the policy that made them.
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.
        path (`str` or `Path`): HTML file to write. It appears when it is whole.
        row (`int`, *optional*, defaults to `0`): which response. Others of the batch with the same prompt are its group.
        title (`str`, *optional*): heading.
        steps (`Sequence[int]`, *optional*): numbers of denoising steps after which the text is spelt out, for paper; 0 is
            before the first step. Defaults to about six, from the first to the last.
        rewards (`Mapping`, *optional*): for each reward function, a value for each response of the batch; `None` where the
            function does not apply.
        policy (`str`, *optional*): name of the policy.
        decoding ([`DecodingConfig`] or `Mapping`, *optional*): how the responses were decoded.

    Returns:
        `Path` of the file.

    Raises:
        IndexError: if there is no such row.
        ValueError: if `steps` holds a number that this response did not reach, or a reward has not one value for each
            response.
    """
    rewards = rewards or {}
    for name, values in rewards.items():
        if len(values) != len(batch):
            raise ValueError(f"`rewards[{name!r}]` has {len(values)} values for {len(batch)} responses.")
    if not 0 <= row < len(batch):
        raise IndexError(f"There is no response {row}: the batch has {len(batch)}.")
    prompts = [ids[mask > 0].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    group = [place for place, prompt in enumerate(prompts) if prompt == prompts[row]]
    siblings = [place for place in group if place != row][:MOST_SIBLINGS]
    responses = {place: _Response(batch, spec, tokenizer, place) for place in (row, *siblings)}
    last = responses[row].last
    steps = sorted({round(last * i / (NUM_TEXTS - 1)) for i in range(NUM_TEXTS)}) if steps is None else list(steps)
    for step in steps:
        if not 0 <= step <= last:
            raise ValueError(f"`steps` holds {step}, but this response took {last} steps.")
    prompt = tokenizer.decode(prompts[row])
    page = _page(
        _escape(title or "a response being denoised"),
        _player(responses[row], _prompt(prompt, len(prompts[row]))),
        _legend(responses[row]),
        _facts(responses[row], {name: (values[row], [values[i] for i in group]) for name, values in rewards.items()},
               policy, decoding),
        _group(group, responses, row, rewards),
        _table(responses[row]),
        _texts(responses[row], steps),
    )  # fmt: skip
    write_text(path, page.encode("utf-8", "replace").decode())  # a token may hold half of a character
    return Path(path)


class _Response:
    """A response of a batch, and what was shown at each of its positions."""

    def __init__(self, batch: TrajectoryBatch, spec: DiffusionSpec, tokenizer, row: int):
        self.stays = response_stays(batch, spec, row)
        self.last, self.counted = last_step(self.stays), int(batch.completion_lengths[row])
        self.blocks = response_blocks(spec, batch.prompt_lengths[row : row + 1], len(self.stays))[0].tolist()
        final = [stays[-1].token if stays and stays[-1].end == inf else None for stays in self.stays]
        self._final = spell(tokenizer.decode, final)
        self._decode = tokenizer.decode

    def text(self, position: int, stay: Stay) -> str:
        """What a token stands for."""
        if stay is self.stays[position][-1] and self._final[position] is not None:
            return self._final[position] or ""
        return self._decode([stay.token])

    def spans(self, titles: bool = False) -> str:
        """The text, in which each token and each mask knows from which step on and until which one it is shown."""
        return "".join(self._position(position, titles) for position in range(len(self.stays)))

    def _position(self, position: int, titles: bool) -> str:
        parts, text = [], ""
        since: float = 0  # the step that masked it
        for stay in self.stays[position]:
            text = self.text(position, stay)
            if stay.first > since:
                parts.append(_mask(text, since, stay.first))
            parts.append(self._token(position, stay, text, titles))
            since = stay.end
        if since < inf:
            parts.append(_mask(text, since, inf))
        return "".join(parts)

    def _token(self, position: int, stay: Stay, text: str, titles: bool) -> str:
        kinds = ["t", level(stay.probability), *(["n"] if text.startswith("\n") else [])]
        kinds += ["g"] if position >= self.counted else []
        title = f' title="{self.title(position, stay)}"' if titles else ""
        return f'<span class="{" ".join(kinds)}"{title}{_times(stay.first, stay.end)}>{_escape(text)}</span>'

    def title(self, position: int, stay: Stay) -> str:
        erased = f", erased in step {stay.end}" if stay.end < inf else ""
        return (
            f"position {position}, block {self.blocks[position]}, written in step {stay.first}"
            f" with probability {_probability(stay)}{erased}"
        )

    def after(self, step: int) -> str:
        """The text after a step."""
        texts = []
        for position, stays in enumerate(self.stays):
            shown = next((stay for stay in stays if stay.is_shown(step)), None)
            texts.append(MASK if shown is None else self.text(position, shown))
        end = self.counted
        rest = f'<span class="faint">{_escape("".join(texts[end:]))}</span>' if texts[end:] else ""
        return _escape("".join(texts[:end])) + rest

    def numbers(self) -> str:
        known = [stays[-1].probability for stays in self.stays[: self.counted] if stays]
        known = [one for one in known if not isnan(one)]
        mean = f", mean probability {sum(known) / len(known):.3f}" if known else ""
        return f"{self.counted} tokens in {self.last} steps{mean}"


def _mask(text: str, first: float, end: float) -> str:
    """A masked position, which is as wide as the text of its token, so that the lines stay where they are."""
    breaks = "\n" * text.count("\n")
    return f'<span class="m"{_times(first, end)}>{MASK * max(1, cells(_visible(text)))}{breaks}</span>'


def _times(first: float, end: float) -> str:
    """Attributes: the step that shows a part, and the one that takes it away. After the last step, the latter is hidden."""
    return (f" data-a={first}" if first else "") + (f" data-b={end} hidden" if end < inf else "")


def level(probability: float) -> str:
    """The class of a probability."""
    return "p" if isnan(probability) else f"p{round(min(probability, 1.0) * LEVELS)}"


def _probability(stay: Stay) -> str:
    return "not recorded" if isnan(stay.probability) else f"{stay.probability:.4f}"


def _escape(text: str) -> str:
    return escape(text.translate(CONTROLS))


def _visible(text: str) -> str:
    """A token on one line."""
    return text.translate(CONTROLS).replace("\n", "").replace("\t", "⇥")


# ------------------------------------------------------------------------------------------------------------ parts


def _player(response: _Response, prompt: str) -> str:
    last = response.last
    return f"""{prompt}
<div class="controls">
<button id="back" class="screen" aria-label="previous step">‹</button>
<button id="play" aria-label="play">▶</button>
<button id="next" class="screen" aria-label="next step">›</button>
<input type="range" id="slider" min="0" max="{last}" value="{last}" aria-label="step">
<output id="at">step {last} of {last}</output>
</div>
<div class="text" id="text" dir="auto" tabindex="0" role="region" aria-label="response">{response.spans(titles=True)}</div>"""


def _prompt(prompt: str, length: int) -> str:
    if len(prompt) <= LONG_PROMPT and "\n" not in prompt:
        return f'<p id="prompt">Prompt: {_escape(prompt)}</p>'
    begin = " ".join(prompt[: 2 * LONG_PROMPT].split())[:LONG_PROMPT]
    return (
        f"<details><summary>Prompt, {length} tokens: {_escape(begin)}…</summary>"
        f'<div class="text" id="prompt" dir="auto">{_escape(prompt)}</div></details>'
    )


def _legend(response: _Response) -> str:
    gone = any(stay.end < inf for stays in response.stays for stay in stays)
    after = response.counted < len(response.stays)
    return f"""<p>The policy began with masks ({MASK}) and wrote the response in {response.last} denoising steps. The colour of
a token is the probability that the policy gave it when it wrote it: 0<span class="scale"></span>1. Bold tokens were written in
the step that is shown.{" A dashed frame marks a position that it erased." if gone else ""}
{"Gray tokens come after the end of the response and do not count." if after else ""}
A masked position is drawn as wide as its token.</p>
<p class="faint screen">Keys: the space bar plays and stops, ← and → go one step back and on, Home and End go to the first and the
last one.</p>"""


def _facts(response: _Response, rewards: Mapping[str, tuple[float | None, list]], policy: str, decoding) -> str:
    facts = [(f"reward {name}", _reward(own, group)) for name, (own, group) in rewards.items()]
    facts.append(("response", response.numbers()))
    if policy:
        facts.append(("policy", policy))
    if decoding is not None:
        facts.append(("decoding", _settings(decoding)))
    rows = "\n".join(f"<dt>{_escape(name)}</dt><dd>{_escape(text)}</dd>" for name, text in facts)
    return f'<dl id="facts">\n{rows}\n</dl>'


def _reward(own: float | None, group: list[float | None]) -> str:
    known = [value for value in group if value is not None]
    mean = f" (mean of {len(known)} responses: {sum(known) / len(known):.4g})" if len(known) > 1 else ""
    return ("does not apply" if own is None else f"{own:g}") + mean


def _settings(decoding: DecodingConfig | Mapping[str, Any]) -> str:
    """The settings that say most, and those that are not the default."""
    given = dict(decoding if isinstance(decoding, Mapping) else decoding.to_dict())
    usual = {"decoder": "loop", **DecodingConfig().to_dict()}
    shown = [name for name in SHOWN_SETTINGS if name in given]
    shown += [name for name in given if name not in shown and (name not in usual or given[name] != usual[name])]
    others = "; other settings have their defaults" if set(SHOWN_SETTINGS) <= set(given) else ""
    return ", ".join(f"{name} {given[name]}" for name in shown) + others


def _group(group: list[int], responses: dict[int, _Response], row: int, rewards: Mapping) -> str:
    if len(group) == 1:
        return ""
    cards = "\n".join(
        _card(group.index(place), response, {name: values[place] for name, values in rewards.items()})
        for place, response in responses.items()
        if place != row
    )
    more = len(group) - len(responses)
    rest = f'\n<p class="faint">{more} more responses are not shown.</p>' if more else ""
    return f"""<h2>Other responses to this prompt</h2>
<p class="faint">This one is response {group.index(row)} of the group. The slider moves them all.</p>
<div class="group">
{cards}
</div>{rest}"""


def _card(number: int, response: _Response, rewards: Mapping[str, float | None]) -> str:
    given = [f"{name} {'does not apply' if value is None else f'{value:g}'}" for name, value in rewards.items()]
    text = f'<div class="text" dir="auto">{response.spans()}</div>'
    length = len(response.after(response.last))
    if length > LONG:
        text = f"<details{'' if length > VERY_LONG else ' open'}><summary>text</summary>{text}</details>"
    return f"""<article>
<h3>response {number}</h3>
<p>{_escape(", ".join([*given, response.numbers()]))}</p>
{text}
</article>"""


def _table(response: _Response) -> str:
    edges = [one != other for one, other in pairwise([-1, *response.blocks])]
    rows = "\n".join(_row(response, position, edge) for position, edge in enumerate(edges))
    return f"""<details id="steps"{"" if len(edges) > MANY else " open"}>
<summary><b>When each token was written</b> <small>(positions are counted from 0, lines are borders of blocks)</small></summary>
<table>
<thead><tr><th class="number">pos.</th><th class="token">token</th><th class="bar">steps 1 to {response.last}</th>
<th class="number">step</th><th class="number">prob.</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</details>"""


def _row(response: _Response, position: int, edge: bool) -> str:
    stays = response.stays[position]
    bars, tokens = "", []
    for stay in stays:
        left = 100 * (stay.first - 1) / response.last
        width = 100 * (min(stay.end, response.last + 1) - stay.first) / response.last
        bars += (
            f'<i class="{level(stay.probability)}" title="{response.title(position, stay)}" '
            f'style="left:{left:.2f}%;width:{width:.2f}%"></i>'
        )
        tokens.append(_escape(_label(response.text(position, stay))))
    step = ", ".join(str(stay.first) for stay in stays) or "never"
    faint = " faint" if position >= response.counted else ""
    return (
        f'<tr{" class=edge" if edge else ""}><th class="number">{position}</th>'
        f'<td class="token{faint}">{" → ".join(tokens)}</td><td class="bar">{bars}</td><td class="number">{step}</td>'
        f'<td class="number">{"" if not stays else _short(stays[-1])}</td></tr>'
    )


def _label(text: str) -> str:
    """A token on one line, which is seen even if it is blank or a part of a character."""
    shown = text.replace("\n", "↵").replace("\t", "⇥")
    return shown if shown.strip() else "␣" * len(shown) or "…"


def _short(stay: Stay) -> str:
    return "?" if isnan(stay.probability) else f"{stay.probability:.2f}"


def _texts(response: _Response, steps: Sequence[int]) -> str:
    texts = "\n".join(
        f'<h3>After step {step}</h3>\n<div class="text" dir="auto" data-after="{step}">{response.after(step)}</div>'
        for step in steps
    )
    return f"<details><summary><b>The text after some steps</b></summary>\n{texts}\n</details>"


# ------------------------------------------------------------------------------------------------------------- page


def _page(heading: str, player: str, *parts: str) -> str:
    """The whole page."""
    content = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{heading}</title>
<style>
{_beside("page.css")}{_rules()}
</style>
</head>
<body>
<div id="player">
<h1>{heading}</h1>
{player}
</div>
{content}
<script>
{_beside("page.js")}</script>
</body>
</html>
"""


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _rules() -> str:
    """The colours, as CSS: those of the page, and those of each probability."""
    gradient = ", ".join(css(colour(number / LEVELS)) for number in range(LEVELS + 1))
    light, dark = (_scheme(colours) for colours in SCHEMES.values())
    return f"""{light}
.scale {{ background: linear-gradient(to right, {gradient}); }}
@media screen and (prefers-color-scheme: dark) {{
{dark}
}}"""


def _scheme(colours: Mapping[str, Colour]) -> str:
    rules = [f":root {{ {' '.join(f'--{name}: {css(value)};' for name, value in colours.items())} }}"]
    for probability in [float("nan"), *(number / LEVELS for number in range(LEVELS + 1))]:
        new, kept = colour(probability), colour(probability, KEPT, colours["page"])
        values = {"new": new, "new-ink": ink(new), "kept": kept, "kept-ink": ink(kept),
                  "after": colour(probability, AFTER_END, colours["page"])}  # fmt: skip
        rules.append(
            f".{level(probability)} {{ {' '.join(f'--{name}:{css(value)};' for name, value in values.items())} }}"
        )
    return "\n".join(rules)
