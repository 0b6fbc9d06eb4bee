"""
Puzzles whose answer is a row of cells, one character for each: generators, a checker, and reward functions built on it.

Every puzzle has one solution. They differ in the order in which the cells follow from each other:

- `"chain"`: each digit follows from the one before it. Writing from left to right suits it.
- `"backward_chain"`: each digit follows from the one after it. Writing from left to right does not suit it.
- `"game_tree"`: the value of a position in a game follows from those after it, which are written behind it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from functools import cache

from .completions import texts


CELLS = 7
DIGITS = 4  # chains count modulo this
WEIGHTS = (
    4,
    2,
    1,
    1,
)  # how often 0, 1, 2 and 3 are added. If all were as frequent, one cell alone would say nothing about the next
MOVES = 3  # of a game
USUAL = 12_000  # puzzles
MOST_REPEATS = 10_000  # puzzles in a row that are no new ones


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


def _game_tree(rng: random.Random) -> tuple[str, str]:
    """
    The outcomes of a game of three moves, of which the first player wants the largest one and the second player the smallest. The
    cells are the values of the seven positions: that of the beginning, then those after each move.
    """
    level = rng.choices(range(10), k=2**MOVES)
    question, cells = _joined(level), list[int]()
    for move in reversed(range(MOVES)):
        best = min if move % 2 else max
        level = [best(level[i : i + 2]) for i in range(0, len(level), 2)]
        cells = level + cells
    return question, _joined(cells)


def _joined(parts) -> str:
    return "".join(map(str, parts))


# The prompt and the cells of a puzzle, given a random state.
KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "chain": _chain,
    "backward_chain": _backward_chain,
    "game_tree": _game_tree,
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

    Raises:
        ValueError: if there are not that many puzzles.
    """
    rng, seen = random.Random(seed), set(exclude)
    rows: list[dict[str, str]] = []
    repeats = 0
    while len(rows) < num_puzzles:
        prompt, cells = KINDS[kind](rng)
        repeats = repeats + 1 if prompt in seen else 0
        if repeats == MOST_REPEATS:
            raise ValueError(
                f"There seem to be only {len(rows)} more puzzles of the kind {kind!r}, not {num_puzzles}."
            )
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "cells": cells})
    rng.shuffle(rows)  # frequent puzzles come up first
    return rows


@cache
def evaluation_puzzles(kind: str) -> tuple[dict[str, str], ...]:
    """The 500 puzzles of a kind that are kept for evaluation, of as many as there usually are to train on."""
    return tuple(generate(kind, USUAL, seed=20261127)[:500])


def cells_solved(completions, cells, **kwargs) -> list[float | None]:
    """Reward function: 1 where all `cells` are right and nothing follows them, 0 elsewhere, `None` where `cells` is `None`."""
    rows = zip(cells, texts(completions), strict=True)
    return [None if right is None else float(answer.strip() == right) for right, answer in rows]


def cells_right(completions, cells, **kwargs) -> list[float | None]:
    """
    Reward function: share of the cells that are right, of as many as the answer or the solution has, whichever has more; `None` where
    `cells` is `None`.
    """
    rows = zip(cells, texts(completions), strict=True)
    return [None if right is None else _share(right, answer.strip()) for right, answer in rows]


def _share(right: str, answer: str) -> float:
    return sum(one == other for one, other in zip(right, answer, strict=False)) / max(len(right), len(answer))
