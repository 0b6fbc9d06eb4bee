"""Sums in words, for small language models."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from ..rewards import word_sums
from .rows import column, read_rows, text_of, whole
from .task import Task, task_of_rows


def word_sum_rows(path: str) -> list[dict[str, Any]]:
    """The questions of a file, with their numbers (`first`, `sign`, `second`) and their `answer`; the `prompt` is the user's message."""
    rows = []
    for number, row in enumerate(read_rows(path)):
        where, sign = f"{path}, row {number}", text_of(row, "sign", path, number).strip()
        if sign not in word_sums.VERBS:
            raise ValueError(f"{where}: the sign must be + or -, got {sign!r}.")
        numbers = {
            name: whole(column(row, (name,), path, number), f"{where}: `{name}`") for name in ("first", "second")
        }
        texts = {name: text_of(row, name, path, number) for name in ("question", "answer", "item")}
        rows.append(word_sum_row({**texts, **numbers, "sign": sign}))
    return rows


def word_sum_row(row: dict[str, Any]) -> dict[str, Any]:
    """A question with its `prompt`, the user's message."""
    kept = {name: row[name] for name in ("first", "sign", "second", "item", "answer")}
    return {"prompt": [{"role": "user", "content": row["question"]}], **kept}


def make_word_sums(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    """Sums in words."""

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
    return task_of_rows("word_sums", "questions", train, evaluation[:eval_size], rewards, solved, itemgetter("answer"))
