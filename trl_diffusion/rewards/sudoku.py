"""4x4 sudoku: a generator of puzzles, a checker, and reward functions built on the checker."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from functools import cache
from itertools import permutations

from .completions import texts


DIGITS = "1234"
UNITS: tuple[tuple[int, ...], ...] = tuple(
    [tuple(4 * row + column for column in range(4)) for row in range(4)]
    + [tuple(4 * row + column for row in range(4)) for column in range(4)]
    + [tuple(4 * (2 * y + i) + 2 * x + j for i in range(2) for j in range(2)) for y in range(2) for x in range(2)]
)
"""The 12 groups of cells (rows, columns, boxes) that must hold four different digits."""


@cache
def all_grids() -> tuple[str, ...]:
    """All 288 completed 4x4 grids, as strings of 16 digits, row by row."""
    rows = ["".join(row) for row in permutations(DIGITS)]
    found = []

    def extend(grid: str) -> None:
        if len(grid) == 16:
            found.append(grid)
            return
        for row in rows:
            candidate = grid + row
            if all(_distinct(candidate, unit) for unit in UNITS):
                extend(candidate)

    extend("")
    return tuple(found)


def _distinct(grid: str, unit: tuple[int, ...]) -> bool:
    digits = [grid[cell] for cell in unit if cell < len(grid) and grid[cell] in DIGITS]
    return len(digits) == len(set(digits))


def check_puzzle(puzzle: str) -> None:
    """Raises a `ValueError` unless `puzzle` is 16 digits from 0 (blank) to 4."""
    if len(puzzle) != 16 or set(puzzle) - set("0" + DIGITS):
        raise ValueError(f"A 4x4 sudoku puzzle is 16 digits from 0 (blank) to 4, got {puzzle!r}.")


def units_solved(puzzle: str, answer: str) -> float:
    """
    How much of a puzzle an answer solves.

    Args:
        puzzle (`str`): 16 digits, row by row, 0 for a blank.
        answer (`str`): what was answered; surrounding white space is ignored.

    Returns:
        `float`: share of the 12 units that hold four different digits; 0 if the answer is not 16 digits from 1 to 4 or
        changes a clue.
    """
    check_puzzle(puzzle)
    answer = answer.strip()
    if len(answer) != 16 or set(answer) - set(DIGITS):
        return 0.0
    if any(clue not in ("0", cell) for clue, cell in zip(puzzle, answer, strict=True)):
        return 0.0
    return sum(_distinct(answer, unit) for unit in UNITS) / len(UNITS)


def is_solved(puzzle: str, answer: str) -> bool:
    """Whether `answer` keeps the clues of `puzzle` and has four different digits in each unit."""
    return units_solved(puzzle, answer) == 1.0


def solve(puzzle: str) -> str | None:
    """The first solution of a puzzle in the order of [`all_grids`], or `None` if there is none."""
    check_puzzle(puzzle)
    return next((grid for grid in all_grids() if is_solved(puzzle, grid)), None)


def generate(num_puzzles: int, seed: int, blanks: int = 8, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """
    Makes different puzzles, each with at least one solution.

    Args:
        num_puzzles (`int`): how many.
        seed (`int`): seed of a random state of its own.
        blanks (`int`, *optional*, defaults to `8`): blank cells of a puzzle, from 1 to 16.
        exclude (`Collection[str]`, *optional*): puzzles that must not come up.

    Returns:
        `list[dict]` with `puzzle` and `solution`.

    Raises:
        ValueError: if there are not that many puzzles.
    """
    if not 1 <= blanks <= 16:
        raise ValueError(f"`blanks` must be from 1 to 16, got {blanks}.")
    stream = _puzzles(random.Random(seed), blanks)
    seen = set(exclude)
    rows: list[dict[str, str]] = []
    repeats = 0
    while len(rows) < num_puzzles:
        puzzle, solution = next(stream)
        repeats = repeats + 1 if puzzle in seen else 0
        if repeats == 100_000:
            raise ValueError(f"There seem to be only {len(rows)} puzzles with {blanks} blanks, not {num_puzzles}.")
        if puzzle not in seen:
            seen.add(puzzle)
            rows.append({"puzzle": puzzle, "solution": solution})
    return rows


def _puzzles(rng: random.Random, blanks: int) -> Iterator[tuple[str, str]]:
    grids = all_grids()
    while True:
        grid = rng.choice(grids)
        hidden = set(rng.sample(range(16), blanks))
        yield "".join("0" if cell in hidden else digit for cell, digit in enumerate(grid)), grid


def prompt(puzzle: str) -> str:
    """The text that asks the embedded policy for a solution."""
    return f"sudoku {puzzle}"


def sudoku_solved(completions, puzzle, **kwargs) -> list[float | None]:
    """Reward function: 1 for a solved puzzle, 0 otherwise, `None` for a row whose `puzzle` is `None`."""
    rows = zip(puzzle, texts(completions), strict=True)
    return [None if p is None else float(is_solved(p, answer)) for p, answer in rows]


def sudoku_units(completions, puzzle, **kwargs) -> list[float | None]:
    """Reward function: share of the 12 rows, columns and boxes that are right, `None` where `puzzle` is `None`."""
    rows = zip(puzzle, texts(completions), strict=True)
    return [None if p is None else units_solved(p, answer) for p, answer in rows]


@cache
def evaluation_puzzles(blanks: int = 8) -> tuple[str, ...]:
    """The 500 puzzles with this many blanks that are kept for evaluation: no generator of training data in this project ever
    yields one of them."""
    return tuple(row["puzzle"] for row in generate(500, seed=20260319, blanks=blanks))
