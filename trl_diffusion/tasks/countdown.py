"""Countdown: a target from three numbers."""

from __future__ import annotations

from typing import Any

from ..rewards import countdown
from .rows import column, read_rows, whole
from .task import Task, task_of_rows


def countdown_rows(path: str) -> list[dict[str, Any]]:
    """The games of a file, each with its `prompt`."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        where = f"{path}, row {number}"
        given = column(row, ("numbers", "nums", "input"), path, number)
        given = given.split(",") if isinstance(given, str) else given
        if not isinstance(given, list) or not given:
            raise ValueError(f"{where}: the numbers must be a list that is not empty, got {given!r}.")
        numbers = [whole(value, f"{where}: each of the numbers") for value in given]
        if min(numbers) < 0:  # an answer has no sign of its own
            raise ValueError(f"{where}: no answer can use the number {min(numbers)}, which is below 0.")
        target = whole(column(row, ("target", "output"), path, number), f"{where}: the target")
        rows.append({"numbers": numbers, "target": target, "prompt": countdown.prompt(numbers, target)})
    return rows


def make_countdown(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    """Games with three numbers."""

    def ask(game: dict[str, Any]) -> dict[str, Any]:
        numbers, target = game["numbers"], game["target"]
        return {"numbers": numbers, "target": target, "prompt": countdown.prompt(numbers, target)}

    def key(row: dict[str, Any]) -> tuple:
        return countdown.key_of(row["numbers"], row["target"])

    kept = [ask(game) for game in countdown.evaluation_games()]
    solutions = {key(game): game["solution"] for game in countdown.evaluation_games()}
    evaluation = countdown_rows(eval_file) if eval_file else list(kept)
    excluded = {key(row) for row in (*kept, *evaluation)}
    if train_file:
        train = countdown_rows(train_file)
        train = [row for row in train if key(row) not in excluded][:train_size]
    else:
        made = countdown.generate(train_size, seed, exclude=excluded)
        solutions |= {key(game): game["solution"] for game in made}
        train = [ask(game) for game in made]
    rewards = [countdown.countdown_solved, countdown.countdown_near]

    def solution(row: dict[str, Any]) -> str | None:
        return solutions.get(key(row)) or countdown.solve(row["numbers"], row["target"])

    return task_of_rows(
        "countdown", "games", train, evaluation[:eval_size], rewards, countdown.countdown_solved, solution
    )
