"""Blocks of code in what a model wrote: fences of backticks or tildes, found in as many steps as there are characters."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field


_FENCE = re.compile(r"^[ \t]*+(?:`{3,}+|~{3,}+)|`{3,}+", re.MULTILINE)
_LANGUAGE = re.compile(r"[ \t]*+\{?\.?([\w.+#-]*+)")


@dataclass
class Blocks:
    """
    A text, taken apart.

    Attributes:
        text (`str`): the text, with `\\n` at the end of each line.
        lead (`str`): what stands before the first fence.
        blocks (`list[tuple[str, str]]`): the language that is named, in small letters and perhaps empty, and the source.
        is_open (`bool`): whether the last block has no end.
    """

    text: str
    lead: str = ""
    blocks: list[tuple[str, str]] = field(default_factory=list)
    is_open: bool = False

    def last_of_python(self) -> str | None:
        """The last block that is marked as Python, or not marked."""
        sources = [source for language, source in self.blocks if not language or language.startswith("py")]
        return sources[-1] if sources else None

    def last_defining(self, names: Collection[str]) -> str | None:
        """The last block that defines one of `names`, in whatever language it is said to be."""
        sources = [source for _, source in self.blocks if defines(source, names)]
        return sources[-1] if sources else None


def defines(source: str, names: Collection[str]) -> bool:
    """Whether a function, class or variable of one of `names` is defined, by its look: nothing is parsed here."""
    if not names:
        return False
    either = "|".join(map(re.escape, names))
    head, assigned = r"(?:async[ \t]++)?+(?:def|class)[ \t]++", r"[ \t]*+(?::[^=\n]*+)?+=(?!=)"
    return re.search(rf"^(?:{head}(?:{either})\b|(?:{either}){assigned})", source, re.MULTILINE) is not None


def blocks_of(text: str, inside: bool = False) -> Blocks:
    """
    Finds the blocks of a text.

    Args:
        text (`str`): what a model wrote.
        inside (`bool`, *optional*, defaults to `False`): whether a block is open where it begins, as after a prompt that ends
            in "```python".
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    matches = list(_FENCE.finditer(text))
    found = Blocks(text, lead=text[: matches[0].start()] if matches else text)
    if inside and not found.lead.strip():
        inside = False  # it opens a block of its own
    # Of the open block: fence, indentation, language, where its source begins.
    opened: tuple[str, int, str, int] | None = ("```", 0, "python", 0) if inside else None
    line_end, skipped = -1, False
    for number, match in enumerate(matches):
        fence = match[0].lstrip()
        if line_end < match.end():
            line_end = text.find("\n", match.end())
            line_end = len(text) if line_end < 0 else line_end
        is_last_of_line = number + 1 == len(matches) or matches[number + 1].start() >= line_end
        language = _LANGUAGE.match(text, match.end())
        word = language[1].lower() if language else ""
        if opened is not None:
            if fence[0] != opened[0][0] or len(fence) < len(opened[0]):
                continue
            found.blocks.append((opened[2], _without_indentation(text[opened[3] : match.start()], opened[1])))
            opened = None
            if not word.startswith("py"):
                continue  # otherwise it is the start of the next block as well
        if skipped or not is_last_of_line:
            skipped = not skipped  # code within a line, between two fences
            continue
        indentation = len(match[0]) - len(fence)
        opened = (fence, indentation, word, min(line_end + 1, len(text)))
    if opened is not None:
        found.blocks.append((opened[2], _without_indentation(text[opened[3] :], opened[1])))
        found.is_open = True
    return found


def _without_indentation(source: str, width: int) -> str:
    """`source` without the white space that a fence in a list has before it on every line."""
    if not width:
        return source
    lines = source.split("\n")
    return "\n".join(line[min(width, len(line) - len(line.lstrip(" \t"))) :] for line in lines)
