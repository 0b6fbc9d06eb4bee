"""
Sums in words, which a small language model can learn in minutes: a generator of questions, and reward functions.

A question is "Sam has 54 coins and loses 41. How many coins does Sam have now?", and its answer "Sam has 54 - 41 = 13 coins."
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from functools import cache
from typing import Any

from .completions import texts


NAMES = ("Ann", "Ben", "Kim", "Leo", "Mia", "Noah", "Rosa", "Sam", "Tom", "Zoe")
ITEMS = ("apples", "books", "cards", "coins", "cups", "eggs", "pens", "shells", "stamps", "toys")
VERBS = {"+": ("buys {} more", "finds {} more", "gets {} more", "wins {} more"),
         "-": ("gives away {}", "loses {}", "sells {}", "breaks {}")}  # fmt: skip
LIMIT = 99  # largest number of a question, and largest result

# A number as it is written, with its sign, its thousands and its decimals.
_NUMBER = re.compile(r"[-−–]?\d++(?:[.,]\d++)*+")
_SIGNS = re.escape("-−–+*/^=")


def generate(num_questions: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, Any]]:
    """
    Makes questions with different sums: numbers from 1 to 99, and results from 1 to 99.

    Args:
        num_questions (`int`): how many.
        seed (`int`): seed of a random state of its own.
        exclude (`Collection[str]`, *optional*): sums that must not come up, as [`key_of`] spells them.

    Returns:
        `list[dict]` with `question`, `answer` (the sentence), `first`, `sign`, `second`, `result` and `item`.

    Raises:
        ValueError: if there are not that many sums.
    """
    rng = random.Random(seed)
    sums = [one for one in _sums() if key_of(*one) not in exclude]
    if num_questions > len(sums):
        raise ValueError(f"There are only {len(sums)} sums to ask for, not {num_questions}.")
    return [_question(rng, *one) for one in rng.sample(sums, num_questions)]


@cache
def _sums() -> tuple[tuple[int, str, int], ...]:
    numbers = range(1, LIMIT + 1)
    return tuple(
        (first, sign, second)
        for first in numbers
        for second in numbers
        for sign in "+-"
        if 1 <= value(first, sign, second) <= LIMIT
    )


def num_sums(exclude: Collection[str] = ()) -> int:
    """How many sums there are, without some of them."""
    return sum(key_of(*one) not in exclude for one in _sums())


def value(first: int, sign: str, second: int) -> int:
    """The result of a sum."""
    return first + second if sign == "+" else first - second


def key_of(first: int, sign: str, second: int) -> str:
    """What makes two sums the same. The numbers of an addition may be in any order."""
    low, high = sorted((first, second))
    return f"{low}+{high}" if sign == "+" else f"{first}-{second}"


def _question(rng: random.Random, first: int, sign: str, second: int) -> dict[str, Any]:
    name, item, result = rng.choice(NAMES), rng.choice(ITEMS), value(first, sign, second)
    event = rng.choice(VERBS[sign]).format(second)
    return {
        "question": f"{name} has {first} {item} and {event}. How many {item} does {name} have now?",
        "answer": f"{name} has {first} {sign} {second} = {result} {item}.",
        "first": first,
        "sign": sign,
        "second": second,
        "result": result,
        "item": item,
    }


def stated_result(answer: str, first: int, sign: str, second: int, item: str) -> str | None:
    """
    The number that an answer gives as the result, as it is written.

    An answer may write the sum before a single equals sign. It may hold no other numbers, and after the result there may only
    be the things that are counted and the end of the sentence.

    Returns:
        `str`, *optional*: the number; `None` if the answer has another form.
    """
    left, equals, right = answer.strip().rpartition("=")
    if equals:
        terms = re.findall(r"\d++|[-+=]", left)
        if terms != [str(first), sign, str(second)] or re.search(r"\d[.,]\d", left):
            return None
    found = _NUMBER.findall(right)
    if (
        len(found) != 1
        or re.fullmatch(rf"[^\d{_SIGNS}]*+{re.escape(found[0])}(?: {re.escape(item)})?\.?", right) is None
    ):
        return None
    return found[0]


def word_sums_solved(completions, first, sign, second, item, **kwargs) -> list[float | None]:
    """Reward function: 1 for the right number, 0 otherwise, `None` for a row whose `first` is `None`."""
    rows = zip(texts(completions), first, sign, second, item, strict=True)
    return [
        None if a is None else float(stated_result(text, a, s, b, i) == str(value(a, s, b)))
        for text, a, s, b, i in rows
    ]


def word_sums_digits(completions, first, sign, second, item, **kwargs) -> list[float | None]:
    """
    Reward function: the share of the result's digits that are right, 0 for a number with more or fewer digits, and for any
    other text. `None` for a row whose `first` is `None`.
    """
    rows = zip(texts(completions), first, sign, second, item, strict=True)
    return [
        None if a is None else _digits(stated_result(text, a, s, b, i), str(value(a, s, b)))
        for text, a, s, b, i in rows
    ]


def _digits(stated: str | None, right: str) -> float:
    if stated is None or len(stated) != len(right):
        return 0.0
    return sum(one == other for one, other in zip(stated, right, strict=True)) / len(right)


@cache
def evaluation_questions() -> tuple[dict[str, Any], ...]:
    """The 500 questions kept for evaluation: no generator of training data in this project ever asks for one of their sums."""
    return tuple(generate(500, seed=20260319))


def evaluation_keys() -> frozenset[str]:
    """The sums of the questions kept for evaluation."""
    return frozenset(key_of(row["first"], row["sign"], row["second"]) for row in evaluation_questions())
