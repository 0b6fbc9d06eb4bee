"""What a rehearsal has found: what is right, what is not known, and every mistake."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..utils import USER_ERRORS, printable


MISTAKE = 2  # exit code, as of a command that a mistake ends


def one_line(error: BaseException | str) -> str:
    """A message in one line, without what a terminal must not get."""
    return printable(" ".join(str(error).split()))


@dataclass
class Findings:
    """
    Collects what the parts of a rehearsal find. A mistake in one part does not end the others.

    Attributes:
        lines (`list[tuple[str, str]]`): parts, each with what was found.
        mistakes (`list[tuple[str, str]]`): parts, each with what is wrong.
    """

    lines: list[tuple[str, str]] = field(default_factory=list)
    mistakes: list[tuple[str, str]] = field(default_factory=list)

    def say(self, part: str, text: str) -> None:
        """Notes what was found in a part."""
        self.lines.append((part, text))

    def mistake(self, part: str, error: BaseException | str) -> None:
        """Notes a mistake. The same message of two parts is one mistake."""
        message = one_line(error)
        if message not in [text for _, text in self.mistakes]:
            self.mistakes.append((part, message))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, an error that the user can set right is a mistake of this part, and ends nothing but the block."""
        try:
            yield
        except (*USER_ERRORS, TypeError) as error:
            self.mistake(name, error)

    def print(self) -> int:
        """Prints everything, the mistakes as lines on stderr. Returns the exit code."""
        width = max((len(part) for part, _ in self.lines), default=0)
        for part, text in self.lines:
            print(f"  {part:{width}}  {text}")
        sys.stdout.flush()
        for part, message in self.mistakes:
            print(f"error: {part}: {message}", file=sys.stderr)
        number = len(self.mistakes)
        print("Nothing was found that is wrong." if not number else f"{number} mistake{'s' * (number > 1)} found.")
        return MISTAKE if number else 0
