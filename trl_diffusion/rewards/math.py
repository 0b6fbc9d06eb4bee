"""Grade-school and competition mathematics, checked by math-verify (`pip install 'trl-diffusion[eval]'`)."""

from __future__ import annotations

import re

from .completions import texts


_FINAL = re.compile(r"####\s*(.+)")


def final_answer(text: str) -> str | None:
    """What stands behind the last `####`, the way GSM8K marks an answer, or `None`."""
    found = _FINAL.findall(text)
    return found[-1].strip().replace(",", "") if found else None


def math_accuracy(completions, answer, **kwargs) -> list[float | None]:
    """
    Reward function: 1 if the final answer equals the gold one, 0 if not, `None` if the gold answer is `None`
    or cannot be read.

    Needs an `answer` column, either just the answer or a GSM8K solution that ends in `#### answer`. Must be called in the
    main thread, since math-verify's time limits (5 s for each step) are signals.
    """
    from math_verify import parse, verify

    rewards: list[float | None] = []
    for text, gold in zip(texts(completions), answer, strict=True):
        expected = parse(final_answer(gold) or gold) if gold is not None else []
        if not expected:
            rewards.append(None)
            continue
        # An answer behind the marker is the answer; without one, math-verify looks for it in the text.
        rewards.append(float(verify(expected, parse(final_answer(text) or text))))
    return rewards


def answer_format(completions, **kwargs) -> list[float]:
    """
    Reward function: 1 for a completion that ends in `#### answer` with text before it, as GSM8K's solutions do; 0.2 for
    one that holds a number at least, so that a policy far from the format has a slope to climb; 0 otherwise.
    """
    complete = re.compile(r"\S.*####\s*\S+\s*$", re.DOTALL)
    return [1.0 if complete.search(text) else 0.2 * bool(re.search(r"\d", text)) for text in texts(completions)]
