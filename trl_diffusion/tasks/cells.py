"""Puzzles whose answer is a row of cells."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import Any

from ..rewards import cells
from .rows import read_rows, text_of
from .task import Task, task_of_rows


def cell_rows(path: str) -> list[dict[str, Any]]:
    """The puzzles of a file, each with its `prompt` and its `cells`, the solution."""
    names, rows = ("prompt", "cells"), enumerate(read_rows(path))
    return [{name: text_of(row, name, path, number) for name in names} for number, row in rows]


def _make(
    kind: str, train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int
) -> Task:
    kept = list(cells.evaluation_puzzles(kind))
    evaluation = cell_rows(eval_file) if eval_file else kept
    excluded = {row["prompt"] for row in (*kept, *evaluation)}
    if train_file:
        train = [row for row in cell_rows(train_file) if row["prompt"] not in excluded][:train_size]
    else:
        train = cells.generate(kind, train_size, seed, excluded)
    rewards, solved = [cells.cells_solved, cells.cells_right], cells.cells_solved
    return task_of_rows(kind, "puzzles", train, evaluation[:eval_size], rewards, solved, itemgetter("cells"))


CELL_TASKS = {kind: partial(_make, kind) for kind in cells.KINDS}
