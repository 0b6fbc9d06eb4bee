"""The text of single tokens, and how wide it is in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import cast

from wcwidth import wcswidth, wcwidth


MASK = "░"
BROKEN = "\ufffd"  # decoders write it for a part of a character
LONGEST = 4  # bytes of a character in UTF-8, so it is in at most as many tokens


def cells(text: str) -> int:
    """Number of terminal cells that a text without control characters takes: 2 for a Chinese character, 0 for an accent.
    For emoji that some terminals draw as one and others as several, it is the larger number."""
    return max(0, wcswidth(text), sum(wcwidth(one) for one in text))


def spell(decode: Callable[[list[int]], str], tokens: Sequence[int | None]) -> list[str | None]:
    """
    The text of each token of a response, so that the texts of neighbours join to what the tokenizer decodes.

    Args:
        decode (callable): from token ids to text.
        tokens (`Sequence[int | None]`): token ids; `None` where a position is masked.

    Returns:
        `list` with a text for each token and `None` for each mask. If several tokens make up one character, the last of
        them has the character, and the others have an empty text.
    """
    texts: list[str | None] = []
    for masked, group in groupby(tokens, lambda token: token is None):
        run = list(group)
        texts += [None] * len(run) if masked else _spell_run(decode, cast(list[int], run))
    return texts


def _spell_run(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    texts: list[str] = []
    begin = 0  # of a character that may need more tokens
    for end in range(1, len(ids) + 1):
        before = ids[max(begin - 1, 0) : begin]  # decoders drop the space before a first word
        text = decode([*before, *ids[begin:end]])[len(decode(before)) if before else 0 :]
        if text.endswith(BROKEN) and end < len(ids) and end - begin < LONGEST:
            texts.append("")
        else:
            texts.append(text)
            begin = end
    return texts
