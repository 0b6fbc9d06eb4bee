"""Grade-school mathematics (GSM8K)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from ..rewards import math
from .rows import read_rows, text_of
from .task import Task, task_of_rows


def gsm8k_rows(path: str) -> list[dict[str, Any]]:
    """The questions of a file, with their `answer`; the `prompt` is the text of the user's message."""
    names, rows = ("question", "answer"), enumerate(read_rows(path))
    return [gsm8k_row({name: text_of(row, name, path, number) for name in names}) for number, row in rows]


def gsm8k_row(row: dict[str, Any]) -> dict[str, Any]:
    """A question of GSM8K with its `prompt`."""
    prompt = f"{row['question']}\nThink step by step and end with '#### ' and the answer."
    return {"prompt": prompt, "answer": row["answer"]}


def make_gsm8k(train_file: str | None, eval_file: str | None, train_size: int, eval_size: int, seed: int) -> Task:
    """GSM8K, from a file."""
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
    evaluation = read(eval_file)[:eval_size] if eval_file else train[: min(eval_size, max(len(train) // 2, 1))]
    excluded = {row["prompt"][0]["content"] for row in evaluation}
    train = [row for row in train if row["prompt"][0]["content"] not in excluded][:train_size]
    rewards = [math.math_accuracy, math.answer_format]
    return task_of_rows("gsm8k", "questions", train, evaluation, rewards, math.math_accuracy, _without_calculator)


def _without_calculator(row: dict[str, Any]) -> str:
    """The answer of GSM8K, without the annotations for a calculator that it holds, such as `<<48/2=24>>`."""
    return re.sub(r"<<[^<>]*+>>", "", row["answer"])
