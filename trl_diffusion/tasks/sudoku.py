"""4x4 sudoku."""

from __future__ import annotations

from typing import Any

from ..rewards import sudoku
from .rows import column, read_rows
from .task import Task, task_of_rows


def sudoku_rows(path: str) -> list[dict[str, Any]]:
    """The puzzles of a file, each with its `prompt`."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        puzzle = str(column(row, ("puzzle", "Puzzle"), path, number)).zfill(16)
        try:
            sudoku.check_puzzle(puzzle)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        rows.append({"puzzle": puzzle, "prompt": sudoku.prompt(puzzle)})
    return rows


def make_sudoku(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    """4x4 sudoku with eight clues."""
    return _make(train_file, eval_file, train_size, eval_size, seed, "sudoku", 8)


def make_sparse_sudoku(
    train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int
) -> Task:
    """4x4 sudoku with two clues."""
    most = 1000  # of the 1,696 puzzles with two clues, 500 are kept
    return _make(train_file, eval_file, min(train_size, most), eval_size, seed, "sparse_sudoku", 14)


def make_sudoku_12(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    """4x4 sudoku with four clues."""
    return _make(train_file, eval_file, train_size, eval_size, seed, "sudoku_12", 12)


def _make(
    train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int, name: str, blanks: int
) -> Task:
    def ask(puzzle: str) -> dict[str, str]:
        return {"puzzle": puzzle, "prompt": sudoku.prompt(puzzle)}

    kept, solutions = list(sudoku.evaluation_puzzles(blanks)), {}
    evaluation = sudoku_rows(eval_file) if eval_file else [ask(puzzle) for puzzle in kept]
    excluded = {*kept, *(row["puzzle"] for row in evaluation)}
    if train_file:
        train = [row for row in sudoku_rows(train_file) if row["puzzle"] not in excluded][:train_size]
    else:
        made = sudoku.generate(train_size, seed, blanks, excluded)
        solutions = {row["puzzle"]: row["solution"] for row in made}
        train = [ask(puzzle) for puzzle in solutions]
    rewards = [sudoku.sudoku_solved, sudoku.sudoku_units]

    def solution(row: dict[str, Any]) -> str | None:
        return solutions.get(row["puzzle"]) or sudoku.solve(row["puzzle"])

    return task_of_rows(name, "puzzles", train, evaluation[:eval_size], rewards, sudoku.sudoku_solved, solution)
