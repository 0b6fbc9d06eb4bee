"""What a terminal shows while responses are denoised."""

from __future__ import annotations

import math
import re
from io import StringIO
from types import SimpleNamespace
from unicodedata import normalize

import pytest

from trl_diffusion import TerminalStreamer
from trl_diffusion.viz import terminal as module
from trl_diffusion.viz.colours import terminal
from trl_diffusion.viz.text import MASK, cells, spell


class Bytes:
    """A tokenizer whose tokens are bytes, so that three of them make up a Chinese character."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class Screen(StringIO):
    """A terminal, as far as it matters here: what it shows, and what has been pushed out above."""

    def __init__(self, columns: int = 80, lines: int = 24):
        super().__init__()
        self.size = (columns, lines)
        self.rows, self.gone, self.at, self.used = [""], [], 0, 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[\d;]*m|.", text, re.DOTALL):
            if part.startswith("\x1b"):
                if part.endswith("F"):
                    self.at, self.used = max(0, self.at - int(part[2:-1])), 0
                elif part.endswith("J"):
                    self.rows[self.at] = self.rows[self.at][: self.used]
                    del self.rows[self.at + 1 :]
            elif part == "\n":
                self._feed()
            else:
                if self.used + cells(part) > self.size[0]:
                    self._feed()
                self.rows[self.at] += part
                self.used += cells(part)
        return super().write(text)

    def _feed(self) -> None:
        self.at, self.used = self.at + 1, 0
        if self.at == len(self.rows):
            self.rows.append("")
        if len(self.rows) > self.size[1]:
            self.gone.append(self.rows.pop(0))
            self.at -= 1


class Loop:
    """Responses that are written byte by byte, in a given order."""

    def __init__(self, texts: list[str], order=lambda length: range(length), per_step: int = 1, block: int = 0):
        self.data = [text.encode() for text in texts]
        self.orders = [list(order(len(data))) for data in self.data]
        self.prompts, self.num_blocks = texts, [2] * len(texts)
        self.per_step, self.step, self.block = per_step, 0, block
        self.masked_again: set[int] = set()

    def active_lanes(self):
        return [SimpleNamespace(row=row, block=self.block) for row in range(len(self.data)) if self._left(row) > -1]

    def _left(self, row: int) -> int:
        return -(-len(self.data[row]) // self.per_step) - self.step

    def most_steps_left(self, lane) -> int:
        return self._left(lane.row)

    def canvas(self, row: int):
        shown = set(self.orders[row][: self.step * self.per_step]) - self.masked_again
        return [(byte, place not in shown) for place, byte in enumerate(self.data[row])]

    def canvas_logps(self, row: int):
        return [0.0 if masked else math.log(0.25) for _, masked in self.canvas(row)]

    def run(self, streamer) -> None:
        while self.step < max(-(-len(data) // self.per_step) for data in self.data):
            self.step += 1
            streamer(self)


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    size = SimpleNamespace(columns=screen.size[0], lines=screen.size[1])
    monkeypatch.setattr(module, "get_terminal_size", lambda: size)
    return screen


CHINESE = "答案是四十二，因为十七加二十五等于四十二。"
TEXTS = {
    "long lines": "The sum of 17 and 25 is 42, because 17 + 20 + 5 = 42. " * 3,
    "Chinese": CHINESE * 3,
    "many lines": "\n".join(f"line {number}: {CHINESE}" for number in range(32)),
    "emoji and tabs": "\tone\t❤️ 👩‍👩‍👧\n\n\tGro\u0308ße " * 3,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_frame_replaces_the_last_one(text, screen):
    """Nothing is left of an earlier frame, neither in the window nor above it."""
    loop = Loop([text], per_step=-(-len(text.encode()) // 7))
    streamer = TerminalStreamer(Bytes(), screen)
    while loop.step < 7:
        loop.step += 1
        streamer(loop)
        assert screen.gone == [] and screen.rows[-1] == ""
        assert [row.startswith("step") for row in screen.rows] == [True] + [False] * (len(screen.rows) - 1)
    head, *rows = screen.rows[:-1]
    whole = "".join(line.expandtabs() for line in normalize("NFC", text).split("\n"))
    if "lines" in head:
        first, last, count = (int(number) for number in re.findall(r"\d+", head.partition("lines")[2]))
        assert last - first + 1 == len(rows) == 22 and last == count >= 32
        assert whole.endswith("".join(rows))
    else:
        assert normalize("NFC", "".join(rows)) == whole
    assert max(cells(row) for row in rows) <= 79


def test_window_follows_the_first_masked_position(screen):
    text = "".join(f"line {number:2}\n" for number in range(60))
    loop = Loop([text], order=lambda length: reversed(range(length)), per_step=8)
    streamer = TerminalStreamer(Bytes(), screen)
    loop.step = 40
    streamer(loop)
    assert screen.rows[0].endswith(", lines 1 to 22 of 43") and screen.rows[1] == MASK * 79
    assert screen.rows[2:5] == [MASK * 79, MASK * 2 + "line 20", "line 21"]
    loop.step = 60
    streamer(loop)
    assert screen.rows[0].endswith(", lines 40 to 61 of 61") and screen.rows[-2:] == ["", ""] and screen.gone == []
    streamer.end()
    Loop([text], per_step=240).run(streamer)
    assert screen.gone[0].endswith("lines 40 to 61 of 61") and len(screen.gone) == 23  # the frame before `end`


def test_says_how_far_it_is_and_marks_what_is_new(screen):
    loop = Loop(["abcdef", "xy"], per_step=2)
    streamer = TerminalStreamer(Bytes(), screen)
    loop.step = 1
    streamer(loop)
    new = f"\x1b[1;{terminal(0.25)}m"
    assert screen.rows[:2] == ["response 0, step 1 of at most 3, block 1 of at most 2", "ab░░░░"]
    assert screen.rows[2:] == ["response 1, step 1 of 1, block 1 of 1", "xy", ""]
    assert f"\n{new}ab\x1b[0m\x1b[2m░░░░\x1b[0m\n" in screen.getvalue()
    loop.step, before = 2, len(screen.getvalue())
    streamer(loop)
    assert f"ab{new}cd\x1b[0m\x1b[2m░░\x1b[0m\n" in screen.getvalue()[before:]
    loop.step, loop.masked_again, before = 3, {1}, len(screen.getvalue())
    streamer(loop)
    assert f"a\x1b[7m░\x1b[0mcd{new}ef\x1b[0m\n" in screen.getvalue()[before:]
    assert screen.rows == ["response 0, step 3 of 3, block 1 of 1", "a░cdef", ""]


def test_more_responses_than_the_window_holds(screen):
    streamer = TerminalStreamer(Bytes(), screen, max_rows=30)
    Loop([f"text {number} {'long ' * 20}" for number in range(40)], per_step=60).run(streamer)
    assert screen.gone == [] and len(screen.rows) <= 24
    assert sum(row.startswith("response") for row in screen.rows) == 11 and screen.rows[-2:] == ["and 29 more", ""]


@pytest.mark.parametrize(("columns", "lines"), [(1, 1), (3, 2), (80, 3)])
def test_tiny_windows(columns, lines, screen, monkeypatch):
    monkeypatch.setattr(module, "get_terminal_size", lambda: SimpleNamespace(columns=columns, lines=lines))
    Loop([CHINESE, CHINESE], per_step=9).run(TerminalStreamer(Bytes(), screen))
    assert (
        sum(row.startswith("response"[: columns - 1]) for row in screen.rows[:-1]) == len(screen.rows[:-1])
        or lines > 2
    )


def test_no_colour_and_no_terminal(screen, monkeypatch, tmp_path):
    text = "".join(chr(ordinal) for ordinal in range(97, 123)) * 4
    monkeypatch.setenv("NO_COLOR", "1")
    Loop([text], per_step=52).run(TerminalStreamer(Bytes(), screen))
    assert re.findall(r"\x1b[^FJ]*[A-Za-z]", screen.getvalue()) == ["\x1b[3F", "\x1b[J"]
    assert "".join(screen.rows[1:]) == text
    frames = [
        f"step 1 of at most 2, block 1 of at most 2: {text[:52]}{MASK * 52}",
        f"step 2 of 2, block 1 of 1: {text}",
    ]
    with (tmp_path / "piped").open("w+", encoding="utf-8") as piped:
        Loop([text], per_step=52).run(TerminalStreamer(Bytes(), piped))
        piped.seek(0)
        assert piped.read().splitlines() == frames
    monkeypatch.setenv("TERM", "dumb")
    dumb = Screen()
    Loop([text], per_step=52).run(TerminalStreamer(Bytes(), dumb))
    assert dumb.getvalue().splitlines() == frames


def test_texts_of_tokens_join_to_the_text():
    """A character of several tokens is in the last of them; a space before a word is not lost."""
    data = list("Größe 答 👩".encode())
    texts = spell(Bytes().decode, data)
    assert "".join(texts) == "Größe 答 👩" and texts[2:5] == ["", "ö", ""]
    assert spell(Bytes().decode, [*data[:3], None, 0xFF, 65]) == ["G", "r", MASK and "\ufffd", None, "", "\ufffdA"]

    class Words:  # as SentencePiece: the space before the first word is dropped
        def decode(self, ids):
            return "".join(["▁one", "▁two", "▁three"][token] for token in ids).replace("▁", " ").removeprefix(" ")

    assert spell(Words().decode, [0, 1, 2]) == ["one", " two", " three"]
    assert spell(Words().decode, [0, None, 2]) == ["one", None, "three"]
