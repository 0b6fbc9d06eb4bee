"""What a terminal is sent: control characters that a policy writes are spelled out, wherever its text is shown."""

from __future__ import annotations

import re
import sys
from io import StringIO
from types import SimpleNamespace

import pytest

from trl_diffusion import TerminalStreamer
from trl_diffusion.commands import generate, view
from trl_diffusion.trainer._trl import print_completions
from trl_diffusion.utils import exit_code, printable


HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b31m\rb\x7f\ud800\x00\n\tc"
SPELLED = r"a\x1b]0;title\x07\x1b[2J\x9b31m\rb\x7f\ud800\x00" + "\n\tc"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_spelled_out():
    assert printable(HOSTILE) == SPELLED
    assert printable("größer\n\t→ 大 ░") == "größer\n\t→ 大 ░"


def streamed(monkeypatch, out):
    lanes = [SimpleNamespace(row=0, block=0)]
    loop = SimpleNamespace(
        active_lanes=lambda: lanes, canvas=lambda row: [(5, False), (0, True)], canvas_logps=lambda row: [0.0, 0.0],
        most_steps_left=lambda lane: 1, num_blocks=[1], prompts=[[5]],
    )  # fmt: skip
    TerminalStreamer(SimpleNamespace(decode=lambda ids: HOSTILE), out)(loop)


def generated(monkeypatch, out):
    monkeypatch.setattr(generate, "_answer", lambda options: HOSTILE)
    assert generate.main(["x"]) == 0


def viewed(monkeypatch, out):
    monkeypatch.setattr(view, "_show", lambda options: f"text: {HOSTILE}")
    assert view.main(["data", "0"]) == 0


def tabled(monkeypatch, out):
    pytest.importorskip("rich")
    messages = [[{"role": "assistant", "content": HOSTILE}]]
    print_completions([HOSTILE], messages, {"solved": [1.0]}, [0.0], 1)


def complained(monkeypatch, out):
    def fail():
        raise ValueError(HOSTILE)

    monkeypatch.setattr(sys, "stderr", out)
    assert exit_code(fail) == 2


@pytest.mark.parametrize("show", [streamed, generated, viewed, tabled, complained])
def test_no_terminal_gets_control_characters(show, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    show(monkeypatch, out)
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # colours
    assert "x1b" in text and not set(text) & set("\x1b\x07\x9b\r\x7f\ud800\x00")


def test_a_file_gets_the_answer_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(generate, "_answer", lambda options: "a\x1b[2J")
    assert generate.main(["x"]) == 0 and capsys.readouterr().out == "a\x1b[2J\n"
