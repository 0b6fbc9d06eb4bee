"""Responses being denoised, in a terminal."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from shutil import get_terminal_size
from typing import TYPE_CHECKING, TextIO, cast

from transformers import PreTrainedTokenizerBase
from wcwidth import iter_graphemes

from ..utils import printable
from .colours import terminal
from .text import MASK, cells, spell


if TYPE_CHECKING:
    from ..decoding.loop import DenoisingLoop, Lane


# Parameters of the escape sequence `\x1b[...m`: none, faint, reversed. What is new has the colour of its probability.
PLAIN, MASKED, ERASED = "", "2", "7"
TAB = 8

Line = list[tuple[str, str]]  # pieces of text, each with the parameters of its style


@dataclass
class _View:
    """A response after a step: the canvas as pieces of text, and a line about it."""

    head: str
    pieces: Line


class TerminalStreamer:
    """
    Shows responses while they are denoised. `░` stands for a masked position. A line above each response says how many steps
    it has taken. On a terminal, each step is drawn over the last one. What the step wrote is bold, on the colour of its
    probability (dark for 0, bright for 1), and a position that it erased is reversed. A response that is higher than its part of the window shows the lines around its
    first masked position. Elsewhere, such as in a file, each step adds lines of plain text. With the environment variable
    `NO_COLOR`, nothing is marked. Control characters that a policy writes are shown as escape sequences.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.
        file (`TextIO`, *optional*): output file. Standard output if `None`.
        max_rows (`int`, *optional*, defaults to `8`): largest number of responses shown, from the first on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO | None = None, max_rows: int = 8):
        self.file, self.max_rows = file or sys.stdout, max_rows
        decode = lru_cache(maxsize=1 << 16)(lambda ids: cast(str, tokenizer.decode(list(ids))))
        self._decode = lambda ids: decode(tuple(ids))
        self._lines = 0
        self._taken: dict[int, int] = {}  # steps of each response
        self._before: dict[int, list[int | None]] = {}  # its canvas after the last step

    def __call__(self, loop: DenoisingLoop) -> None:
        lanes = loop.active_lanes()
        self._taken = {lane.row: self._taken.get(lane.row, 0) + 1 for lane in lanes}
        views = [self._view(loop, lane) for lane in lanes[: self.max_rows]]
        self._before = {lane.row: self._before[lane.row] for lane in lanes[: self.max_rows]}
        if self.file.isatty() and os.environ.get("TERM") != "dumb":
            self._draw(views, len(lanes))
        else:
            text = "".join(f"{view.head}: {''.join(piece for piece, _ in view.pieces)}\n" for view in views)
            self.file.write(text)
        self.file.flush()

    def end(self) -> None:
        """Makes the next responses appear below the current lines."""
        self._lines, self._taken, self._before = 0, {}, {}

    def _view(self, loop: DenoisingLoop, lane: Lane) -> _View:
        row, taken = lane.row, self._taken[lane.row]
        left, blocks = loop.most_steps_left(lane), int(loop.num_blocks[row])
        parts = [_of("step", taken, taken + left)]
        if len(loop.prompts) > 1:
            parts.insert(0, f"response {row}")
        if blocks > 1:
            parts.append(_of("block", lane.block + 1, blocks if left else lane.block + 1))
        canvas = [None if masked else token for token, masked in loop.canvas(row)]
        before = self._before.get(row, [None] * len(canvas) if taken == 1 else canvas)
        self._before[row] = canvas
        texts = [MASK if text is None else printable(text) for text in spell(self._decode, canvas)]
        return _View(
            ", ".join(parts), _joined(zip(texts, styles(before, canvas, loop.canvas_logps(row)), strict=True))
        )

    def _draw(self, views: list[_View], active: int) -> None:
        """Draws over the last frame. No frame is as high as the window, whose lines above could not be drawn over."""
        size = get_terminal_size()
        width, height = size.columns - 1, size.lines - 1  # the cursor is in the last line
        shown = min(len(views), max(1, (height - (active > len(views))) // 2))
        frame: list[Line] = [[(f"and {active - shown} more", MASKED)]] if active > shown and height > 2 else []
        room = height - len(frame)
        blocks: list[Line] = []
        for place, view in enumerate(views[:shown]):
            lines = self._cut(view, width, max(1, room // (shown - place)))
            room -= len(lines)
            blocks += lines
        plain = bool(os.environ.get("NO_COLOR"))
        text = "".join("".join(_styled(*piece, plain) for piece in line) + "\n" for line in [*blocks, *frame])
        self.file.write((f"\x1b[{self._lines}F\x1b[J" if self._lines else "") + text)
        self._lines = len(blocks) + len(frame)

    @staticmethod
    def _cut(view: _View, width: int, height: int) -> list[Line]:
        """The line about a response, and as many lines of its text as there is room for."""
        lines = wrap(view.pieces, width)
        head = view.head
        if len(lines) >= height:
            top = len(lines) - height + 1
            masked = next(
                (number for number, line in enumerate(lines) if any(style == MASKED for _, style in line)), top
            )
            top = min(top, masked)
            if height > 1:
                head += f", lines {top + 1} to {top + height - 1} of {len(lines)}"
            lines = lines[top : top + height - 1]
        return [wrap([(head, PLAIN)], width)[0], *lines]


def _of(what: str, number: int, most: int) -> str:
    """A part of a whole that may turn out smaller."""
    return f"{what} {number} of {'at most ' if number < most else ''}{most}"


def styles(before: Sequence[int | None], after: Sequence[int | None], logps: Sequence[float]) -> list[str]:
    """How the position of each token is shown, from the tokens before and after a step (`None` where masked) and the
    log-probabilities of the latter."""
    found = []
    for place, (token, logp) in enumerate(zip(after, logps, strict=True)):
        then = before[place] if place < len(before) else None
        if token is None:
            found.append(MASKED if then is None else ERASED)
        else:
            found.append(PLAIN if token == then else f"1;{terminal(math.exp(logp))}")
    return found


def _joined(pieces: Iterable[tuple[str, str]]) -> Line:
    """Neighbours of one style, joined."""
    return [("".join(text for text, _ in group), style) for style, group in groupby(pieces, lambda piece: piece[1])]


def wrap(pieces: Line, width: int) -> list[Line]:
    """Lines of at most `width` terminal cells. A character that takes two cells is not divided; tabs become spaces."""
    lines: list[Line] = [[]]
    used = 0
    for text, style in pieces:
        for character in iter_graphemes(text):
            if character == "\t":
                character = " " * (TAB - used % TAB)
            if character == "\n" or used + cells(character) > width:
                lines.append([])
                used = 0
            if character != "\n":
                lines[-1].append((character, style))
                used += cells(character)
    return [_joined(line) for line in lines]


def _styled(text: str, style: str, plain: bool) -> str:
    return text if plain or not style else f"\x1b[{style}m{text}\x1b[0m"
