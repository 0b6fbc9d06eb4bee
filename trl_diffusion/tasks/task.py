"""A task is training rows, evaluation rows, reward functions and a checker."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..fields import check_at_least
from ..policies.files import check_no_pointer
from ..rewards import cells, countdown, math, sudoku, word_sums
from ..utils import read_text


@dataclass
class Task:
    """
    Attributes:
        name (`str`): what it is called.
        unit (`str`): what its rows are called, in the plural.
        train (`Dataset`): rows to train on, with a `prompt` column.
        evaluation (`Dataset`): rows to measure on, of the same columns; training rows never repeat one of them.
        reward_funcs (`list`): reward functions with TRL's signature.
        solved (`Callable`): reward function whose 0 or 1 says whether an answer is right.
        solution (`Callable`): a right answer to a row, as text, or `None` if there is none.
    """

    name: str
    unit: str
    train: Dataset
    evaluation: Dataset
    reward_funcs: list[Callable]
    solved: Callable
    solution: Callable[[dict[str, Any]], str | None]

    def documents(self, rows: Dataset) -> Dataset:
        """
        Prompts with right answers as their completions, for supervised fine-tuning.

        Args:
            rows ([`~datasets.Dataset`]): rows of the task.

        Raises:
            ValueError: if there is no right answer to a row.
        """
        found = []
        for number, row in enumerate(rows):
            answer = self.solution(row)
            if answer is None:
                raise ValueError(f"The task `{self.name}` has no right answer to row {number}: {row['prompt']!r:.80}.")
            found.append(document(row["prompt"], answer))
        return Dataset.from_list(found)

    def scores(self, answers: list[str]) -> list[float]:
        """For each evaluation row, whether `answers`, in their order, solve it: 0 or 1."""
        columns = {name: self.evaluation[name] for name in self.evaluation.column_names if name != "prompt"}
        return [reward or 0.0 for reward in self.solved(completions=answers, **columns)]

    def solve_rate(self, answers: list[str]) -> float:
        """Share of the evaluation rows that `answers`, in their order, solve."""
        scores = self.scores(answers)
        return sum(scores) / len(scores)


def document(prompt: Any, answer: str) -> dict[str, Any]:
    """A prompt, as text or as messages, and a text that answers it, in TRL's format of prompts and completions."""
    completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    return {"prompt": prompt, "completion": completion}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """
    Rows of a `.csv`, `.jsonl` or `.json` file. As Excel writes them in many countries, the columns of a `.csv` file may be
    separated by semicolons or tabs, and a byte order mark may come first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it has another ending, a line that cannot be read, a row that is no object, a
            column name twice, or no rows.
    """
    path = Path(path)
    if path.is_file() and path.suffix not in (".csv", ".json", ".jsonl"):
        raise ValueError(f"{path}: a file of rows must end in .csv, .jsonl or .json.")
    text = read_text(path)
    check_no_pointer(path)
    try:
        rows = _parse_rows(path, text)
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a list of rows, got {type(rows).__name__}.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: must be an object with a value for each column, got {row!r:.80}.")
        if None in row:
            raise ValueError(f"{path}, row {number}: has more values than the file has columns.")
    return rows


def _parse_rows(path: Path, text: str) -> Any:
    if path.suffix == ".csv":
        header = text.partition("\n")[0]
        separator = max(",;\t", key=header.count)  # the comma, if there is none
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        names = list(reader.fieldnames or ())
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{path}: the columns {repeated} are there more than once.")
        return list(reader)
    if path.suffix == ".json":
        return _parse_json(text, str(path))
    lines = text.removesuffix("\n").split("\n") if text else []
    return [_parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error


def _column(row: dict[str, Any], names: tuple[str, ...], path: str, number: int) -> Any:
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise ValueError(f"{path}, row {number}: none of the columns {list(names)} is there; it has {sorted(row)}.")


def _whole(value: Any, where: str) -> int:
    """A whole number, which files also hold as text."""
    try:
        number = int(value)
        is_whole = not isinstance(value, bool) and (isinstance(value, str) or number == value)
    except (OverflowError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{where} must be a whole number, got {value!r}.")
    return number


def _text(row: dict[str, Any], name: str, path: str, number: int) -> str:
    value = _column(row, (name,), path, number)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path}, row {number}: the {name} must be text, got {value!r}.")
    return value


def sudoku_rows(path: str) -> list[dict[str, Any]]:
    """The puzzles of a file, each with its `prompt`."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        puzzle = str(_column(row, ("puzzle", "Puzzle"), path, number)).zfill(16)
        try:
            sudoku.check_puzzle(puzzle)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        rows.append({"puzzle": puzzle, "prompt": sudoku.prompt(puzzle)})
    return rows


def countdown_rows(path: str) -> list[dict[str, Any]]:
    """The games of a file, each with its `prompt`."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        where = f"{path}, row {number}"
        given = _column(row, ("numbers", "nums", "input"), path, number)
        given = given.split(",") if isinstance(given, str) else given
        if not isinstance(given, list) or not given:
            raise ValueError(f"{where}: the numbers must be a list that is not empty, got {given!r}.")
        numbers = [_whole(value, f"{where}: each of the numbers") for value in given]
        if min(numbers) < 0:  # an answer has no sign of its own
            raise ValueError(f"{where}: no answer can use the number {min(numbers)}, which is below 0.")
        target = _whole(_column(row, ("target", "output"), path, number), f"{where}: the target")
        rows.append({"numbers": numbers, "target": target, "prompt": countdown.prompt(numbers, target)})
    return rows


def gsm8k_rows(path: str) -> list[dict[str, Any]]:
    """The questions of a file, with their `answer`; the `prompt` is the text of the user's message."""
    names, rows = ("question", "answer"), enumerate(read_rows(path))
    return [gsm8k_row({name: _text(row, name, path, number) for name in names}) for number, row in rows]


def gsm8k_row(row: dict[str, Any]) -> dict[str, Any]:
    """A question of GSM8K with its `prompt`."""
    prompt = f"{row['question']}\nThink step by step and end with '#### ' and the answer."
    return {"prompt": prompt, "answer": row["answer"]}


def sft_rows(path: str) -> list[dict[str, Any]]:
    """The documents of a file in one of TRL's formats: `messages`, `prompt` and `completion`, or `text`. No other column is kept."""
    rows = read_rows(path)
    names = next((names for names in FORMATS if all(name in rows[0] for name in names)), None)
    if names is None:
        raise ValueError(
            f"{path}: row 0 has the columns {sorted(rows[0])}; documents have `messages`, or `prompt` and `completion`, or `text`."
        )
    kinds = set()
    for number, row in enumerate(rows):
        for name in names:
            value = row.get(name)
            if not (_are_messages(value) or (name != "messages" and isinstance(value, str) and value)):
                what = "a list of messages" if name == "messages" else "text or a list of messages"
                raise ValueError(f"{path}, row {number}: `{name}` must be {what}, got {value!r:.80}.")
            kinds.add(isinstance(value, str))
    if len(kinds) > 1:
        raise ValueError(
            f"{path}: some of {list(names)} are text and some are messages. Write all of them in one way."
        )
    return [{name: row[name] for name in names} for row in rows]


FORMATS = (("messages",), ("prompt", "completion"), ("text",))  # of documents, by the columns that they have


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def cell_rows(path: str) -> list[dict[str, Any]]:
    """The puzzles of a file, each with its `prompt` and its `cells`, the solution."""
    names, rows = ("prompt", "cells"), enumerate(read_rows(path))
    return [{name: _text(row, name, path, number) for name in names} for number, row in rows]


def word_sum_rows(path: str) -> list[dict[str, Any]]:
    """The questions of a file, with their numbers (`first`, `sign`, `second`) and their `answer`; the `prompt` is the user's message."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        where, sign = f"{path}, row {number}", _text(row, "sign", path, number).strip()
        if sign not in word_sums.VERBS:
            raise ValueError(f"{where}: the sign must be + or -, got {sign!r}.")
        numbers = {
            name: _whole(_column(row, (name,), path, number), f"{where}: `{name}`") for name in ("first", "second")
        }
        texts = {name: _text(row, name, path, number) for name in ("question", "answer", "item")}
        rows.append(word_sum_row({**texts, **numbers, "sign": sign}))
    return rows


def word_sum_row(row: dict[str, Any]) -> dict[str, Any]:
    """A question with its `prompt`, the user's message."""
    kept = {name: row[name] for name in ("first", "sign", "second", "item", "answer")}
    return {"prompt": [{"role": "user", "content": row["question"]}], **kept}


def preference_rows(path: str) -> list[dict[str, Any]]:
    """The pairs of a file, each `chosen` and `rejected`, and perhaps a `prompt`: text, or messages."""
    rows = read_rows(path)
    for number, row in enumerate(rows):
        for name in ("chosen", "rejected", *(["prompt"] if "prompt" in row else [])):
            value = row.get(name)
            if not _are_messages(value) and not (isinstance(value, str) and value):
                raise ValueError(
                    f"{path}, row {number}: `{name}` must be text or a list of messages, got {value!r:.80}."
                )
    return rows


def _sudoku(
    train_file: str | None,
    eval_file: str | None,
    train_size: int,
    eval_size: int,
    seed: int,
    name: str = "sudoku",
    blanks: int = 8,
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

    return _task(name, "puzzles", train, evaluation[:eval_size], rewards, sudoku.sudoku_solved, solution)


def _countdown(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
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
    rewards = [countdown.countdown_solved, countdown.countdown_numbers]

    def solution(row: dict[str, Any]) -> str | None:
        return solutions.get(key(row)) or countdown.solve(row["numbers"], row["target"])

    return _task("countdown", "games", train, evaluation[:eval_size], rewards, countdown.countdown_solved, solution)


def _gsm8k(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    if not train_file:
        raise ValueError("The task `gsm8k` needs `--train_file`, a JSON Lines file with `question` and `answer`.")

    if find_spec("math_verify") is None:
        raise ImportError(
            "The task `gsm8k` is rewarded by math-verify, which is missing: pip install 'trl-diffusion[eval]'."
        )

    def read(path: str) -> list[dict[str, Any]]:
        return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in gsm8k_rows(path)]

    # Without a file of its own, evaluation takes rows that training does not see.
    train = read(train_file)
    evaluation = read(eval_file)[:eval_size] if eval_file else train[:eval_size]
    excluded = {row["prompt"][0]["content"] for row in evaluation}
    train = [row for row in train if row["prompt"][0]["content"] not in excluded][:train_size]
    rewards = [math.math_accuracy, math.answer_format]
    return _task("gsm8k", "questions", train, evaluation, rewards, math.math_accuracy, _without_calculator)


def _without_calculator(row: dict[str, Any]) -> str:
    """The answer of GSM8K, without the annotations for a calculator that it holds, such as `<<48/2=24>>`."""
    return re.sub(r"<<[^<>]*+>>", "", row["answer"])


def _word_sums(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    def key(row: dict[str, Any]) -> str:
        return word_sums.key_of(row["first"], row["sign"], row["second"])

    kept = [word_sum_row(row) for row in word_sums.evaluation_questions()]
    evaluation = word_sum_rows(eval_file) if eval_file else kept
    excluded = {key(row) for row in (*kept, *evaluation)}
    if train_file:
        train = [row for row in word_sum_rows(train_file) if key(row) not in excluded][:train_size]
    else:
        most = min(train_size, word_sums.num_sums(excluded))
        train = [word_sum_row(row) for row in word_sums.generate(most, seed, excluded)]
    rewards, solved = [word_sums.word_sums_solved, word_sums.word_sums_digits], word_sums.word_sums_solved
    return _task("word_sums", "questions", train, evaluation[:eval_size], rewards, solved, itemgetter("answer"))


def _sparse_sudoku(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    most = 1000  # of the 1,696 puzzles with two clues, 500 are kept
    return _sudoku(train_file, eval_file, min(train_size, most), eval_size, seed, "sparse_sudoku", 14)


def _sudoku_12(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    return _sudoku(train_file, eval_file, train_size, eval_size, seed, "sudoku_12", 12)


def _cells(
    kind: str, train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int
) -> Task:
    kept = list(cells.evaluation_puzzles(kind))
    evaluation = cell_rows(eval_file) if eval_file else kept
    excluded = {row["prompt"] for row in (*kept, *evaluation)}
    if train_file:
        train = [row for row in cell_rows(train_file) if row["prompt"] not in excluded][:train_size]
    else:
        train = cells.generate(kind, train_size, seed, excluded)
    rewards, solution = [cells.cells_solved, cells.cells_right], itemgetter("cells")
    return _task(kind, "puzzles", train, evaluation[:eval_size], rewards, cells.cells_solved, solution)


def _task(
    name: str, unit: str, train: list, evaluation: list, reward_funcs: list, solved: Callable, solution: Callable
) -> Task:
    for what, rows in (("training", train), ("evaluation", evaluation)):
        if not rows:
            raise ValueError(f"The task `{name}` is left with no {what} rows.")
    return Task(name, unit, Dataset.from_list(train), Dataset.from_list(evaluation), reward_funcs, solved, solution)


TASKS: dict[str, Callable[..., Task]] = {
    "sudoku": _sudoku,
    "sparse_sudoku": _sparse_sudoku,
    "countdown": _countdown,
    "gsm8k": _gsm8k,
    "word_sums": _word_sums,
    "sudoku_12": _sudoku_12,
    **{kind: partial(_cells, kind) for kind in cells.KINDS},
}


def load_task(
    name: str,
    train_file: str | None = None,
    eval_file: str | None = None,
    train_size: int = 10_000,
    eval_size: int = 500,
    seed: int = 0,
) -> Task:
    """
    Makes or reads a task.

    Args:
        name (`str`): `"sudoku"` (4x4), `"sparse_sudoku"` (4x4, two clues), `"countdown"` (three numbers), `"gsm8k"`, or
            `"word_sums"` (sums in words, for small language models).
        train_file (`str`, *optional*): rows to train on. The puzzles are generated without it; GSM8K needs it.
        eval_file (`str`, *optional*): rows to measure on. Training rows that are among them are dropped.
        train_size (`int`, *optional*, defaults to `10_000`): most training rows.
        eval_size (`int`, *optional*, defaults to `500`): most evaluation rows.
        seed (`int`, *optional*, defaults to `0`): seed of the generator of training rows.

    Raises:
        ValueError: for an unknown name, a size below 1, or a file with a missing column or an unreadable row, which it names.
        FileNotFoundError: for a file that is not there.
    """
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}; there are {sorted(TASKS)}.")
    for option, size in (("train_size", train_size), ("eval_size", eval_size)):
        check_at_least(option, size)
    return TASKS[name](train_file, eval_file, train_size, eval_size, seed)
