"""Puzzles whose answer is a row of cells."""

import re

import pytest

from trl_diffusion.rewards import cells
from trl_diffusion.tasks import load_task


def follow_chain(prompt: str) -> str:
    """The cells of a chain, one after the other, from its prompt alone."""
    first, steps = re.fullmatch(r"(\d)>(\d+)", prompt).groups()
    found, value = [], int(first)
    for step in steps:
        value = (value + int(step)) % 4
        found.append(str(value))
    return "".join(found)


def follow_backwards(prompt: str) -> str:
    steps, last = re.fullmatch(r"(\d+)<(\d)", prompt).groups()
    found, value = [], int(last)
    for step in reversed(steps):
        value = (value + int(step)) % 4
        found.insert(0, str(value))
    return "".join(found)


def play(prompt: str) -> str:
    """The value of every position of the game, found by playing on from it."""
    outcomes = [int(digit) for digit in prompt]

    def value(first: int, number: int, move: int) -> int:
        if number == 1:
            return outcomes[first]
        half = number // 2
        after = value(first, half, move + 1), value(first + half, half, move + 1)
        return max(after) if move in (0, 2) else min(after)

    return "".join(str(value(first, 8 >> move, move)) for move in range(3) for first in range(0, 8, 8 >> move))


SOLVERS = {"chain": follow_chain, "backward_chain": follow_backwards, "game_tree": play}


@pytest.mark.parametrize("kind", cells.KINDS)
def test_cells_solve_their_puzzle(kind):
    for row in cells.generate(kind, 200, seed=3):
        assert row["cells"] == SOLVERS[kind](row["prompt"])
        assert len(row["cells"]) == 7


@pytest.mark.parametrize("kind", cells.KINDS)
def test_a_puzzle_comes_up_once_and_never_when_it_is_excluded(kind):
    first = cells.generate(kind, 300, seed=0)
    prompts = {row["prompt"] for row in first}
    assert len(prompts) == 300
    assert cells.generate(kind, 300, seed=0) == first
    others = {row["prompt"] for row in cells.generate(kind, 300, seed=0, exclude=prompts)}
    assert not others & prompts


def test_more_puzzles_than_there_are(monkeypatch):
    monkeypatch.setattr(cells, "CELLS", 2)  # 4 first digits, and 16 pairs of steps
    assert len(cells.generate("chain", 64, seed=0)) == 64
    with pytest.raises(ValueError, match="only 64 more puzzles of the kind 'chain', not 65"):
        cells.generate("chain", 65, seed=0)


@pytest.mark.parametrize(
    "answer, share",
    [
        ("0123", 1.0),
        (" 0123\n", 1.0),
        ("0120", 0.75),
        ("3210", 0.0),
        ("01230", 0.8),
        ("012", 0.75),
        ("", 0.0),
        ("٠123", 0.75),
    ],
)
def test_only_right_cells_count(answer, share):
    assert cells.cells_right([answer, answer], ["0123", None]) == [share, None]
    assert cells.cells_solved([answer, answer], ["0123", None]) == [float(share == 1), None]


@pytest.mark.parametrize("name", [*cells.KINDS, "sudoku_12"])
def test_tasks_have_right_answers_and_disjoint_rows(name):
    task = load_task(name, train_size=50, eval_size=20, seed=1)
    assert not set(task.train["prompt"]) & set(task.evaluation["prompt"])
    assert task.solve_rate([task.solution(row) for row in task.evaluation]) == 1.0
    documents = task.documents(task.train)
    assert [row["prompt"] for row in documents] == list(task.train["prompt"])


def test_a_row_without_cells_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1>2", "cells": "3"}\n{"prompt": "1>0"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1.*cells"):
        load_task("chain", train_file=str(path))
