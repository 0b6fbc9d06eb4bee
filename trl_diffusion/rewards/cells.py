"""
Puzzles whose answer is a row of cells, one character for each: generators, a checker, and reward functions built on it.

Every puzzle has one solution. They differ in the order in which the cells follow from each other:

- `"chain"`: each digit follows from the one before it. Writing from left to right suits it.
- `"backward_chain"`: each digit follows from the one after it. Writing from left to right does not suit it.
- `"program"`: a straight-line program whose statements were shuffled. The order is another one in every puzzle.
- `"knights"`: knights always tell the truth and knaves never do. The cells constrain each other, and none of them comes first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from itertools import product

from .completions import texts


CELLS = 8
DIGITS = 4  # cells of chains and programs count modulo this
WEIGHTS = (4, 2, 1, 1)  # how often 0, 1, 2 and 3 are added. If all were as frequent, one cell alone would say nothing about the next
LETTERS = "abcdefgh"
PEOPLE = 6
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "&": lambda one, other: one & other,
    "|": lambda one, other: one | other,
    "^": lambda one, other: one ^ other,
}


def _sum(values: list[int]) -> int:
    return sum(values) % DIGITS


def _steps(rng: random.Random) -> list[int]:
    return rng.choices(range(DIGITS), WEIGHTS, k=CELLS)


def _chain(rng: random.Random) -> tuple[str, str]:
    """The first digit is given, and what is added to each digit, modulo 4, to get the next."""
    first, steps = rng.randrange(DIGITS), _steps(rng)
    cells = [_sum([first, *steps[: cell + 1]]) for cell in range(CELLS)]
    return f"{first}>{_joined(steps)}", _joined(cells)


def _backward_chain(rng: random.Random) -> tuple[str, str]:
    """The last digit is given, and what is added to each digit, modulo 4, to get the one before it."""
    last, steps = rng.randrange(DIGITS), _steps(rng)
    cells = [_sum([last, *steps[cell:]]) for cell in range(CELLS)]
    return f"{_joined(steps)}<{last}", _joined(cells)


def _program(rng: random.Random) -> tuple[str, str]:
    """
    Each variable is a number, or an earlier variable plus a number, modulo 4. The statements are in an order in which they
    could not run. The cells are the values of the variables in that order.
    """
    order = rng.sample(LETTERS, CELLS)
    statements, values = {}, {}
    for place, (name, step) in enumerate(zip(order, _steps(rng), strict=True)):
        number = step if place else rng.randrange(DIGITS)
        other = order[rng.randrange(max(place - 2, 0), place)] if place else None
        statements[name] = f"{name}={other or ''}{number}"
        values[name] = _sum([number, *([values[other]] if other else [])])
    shown = rng.sample(order, CELLS)
    return ";".join(statements[name] for name in shown), _joined(values[name] for name in shown)


def _knights(rng: random.Random) -> tuple[str, str]:
    """Each person says something about two others. A cell is 1 for a knight, whose statement is true, and 0 for a knave."""
    while True:
        said = []
        for person in range(PEOPLE):
            one, other = rng.sample([index for index in range(PEOPLE) if index != person], 2)
            said.append((rng.choice("+-"), one, rng.choice(list(OPERATORS)), rng.choice("+-"), other))
        found = [cells for cells in product((0, 1), repeat=PEOPLE) if _are_consistent(cells, said)]
        if len(found) == 1:
            return ";".join(f"{a}{LETTERS[i]}{op}{b}{LETTERS[j]}" for a, i, op, b, j in said), _joined(found[0])


def _are_consistent(cells: tuple[int, ...], said: list[tuple[str, int, str, str, int]]) -> bool:
    return all(
        cell == OPERATORS[operator](cells[one] ^ (sign == "-"), cells[other] ^ (sign_of_other == "-"))
        for cell, (sign, one, operator, sign_of_other, other) in zip(cells, said, strict=True)
    )


def _joined(parts) -> str:
    return "".join(map(str, parts))


@dataclass(frozen=True)
class Kind:
    """
    A kind of puzzle.

    Attributes:
        word (`str`): the first word of its prompts.
        make (`Callable`): the question and the cells of a puzzle, given a random state.
        length (`int`): cells of an answer.
    """

    word: str
    make: Callable[[random.Random], tuple[str, str]]
    length: int = CELLS


KINDS = {
    "chain": Kind("chain", _chain),
    "backward_chain": Kind("back", _backward_chain),
    "program": Kind("program", _program),
    "knights": Kind("knights", _knights, PEOPLE),
}


def generate(kind: str, num_puzzles: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """
    Makes different puzzles.

    Args:
        kind (`str`): one of `KINDS`.
        num_puzzles (`int`): how many.
        seed (`int`): seed of a random state of its own.
        exclude (`Collection[str]`, *optional*): prompts that must not come up.

    Returns:
        `list[dict]` with `prompt` and `cells`, the solution.
    """
    rng, seen = random.Random(seed), set(exclude)
    rows: list[dict[str, str]] = []
    while len(rows) < num_puzzles:
        question, cells = KINDS[kind].make(rng)
        prompt = f"{KINDS[kind].word} {question}"
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "cells": cells})
    return rows


@cache
def evaluation_puzzles(kind: str) -> tuple[dict[str, str], ...]:
    """The 500 puzzles of a kind that are kept for evaluation."""
    return tuple(generate(kind, 500, seed=20261127))


def cells_solved(completions, cells, **kwargs) -> list[float | None]:
    """Reward function: 1 where all `cells` are right and nothing follows them, 0 elsewhere, `None` where `cells` is `None`."""
    rows = zip(cells, texts(completions), strict=True)
    return [None if right is None else float(answer.strip() == right) for right, answer in rows]


def cells_right(completions, cells, **kwargs) -> list[float | None]:
    """Reward function: share of the cells that are right, 0 for an answer of another length, `None` where `cells` is `None`."""
    rows = zip(cells, texts(completions), strict=True)
    return [None if right is None else _share(right, answer.strip()) for right, answer in rows]


def _share(right: str, answer: str) -> float:
    if len(answer) != len(right):
        return 0.0
    return sum(one == other for one, other in zip(right, answer, strict=True)) / len(right)
