"""Rewards, called on right answers: the best that a policy could write must get the best score."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

from datasets import Dataset

from ..rewards.call import RewardCaller
from ..tasks.documents import document
from ..tasks.task import SOLVE_RATE, Task, parameters
from .findings import Findings


MOST = 256  # rows whose right answers are scored


def check_rewards(findings: Findings, task: Task) -> None:
    """
    Calls the reward functions of a task on right answers, spread over its training rows, and on an empty answer. Mistakes are a
    function that raises, that gives something else than a number or `None` for each answer, or a checker that does not call a
    right answer solved.

    Args:
        findings ([`Findings`]): where to note what is found.
        task ([`Task`]): the task.
    """
    source = task.train if len(task.train) else task.evaluation
    rows = source.select(range(0, len(source), max(1, -(-len(source) // MOST))))
    answers = [task.solution(row) for row in rows]
    known = [number for number, answer in enumerate(answers) if answer is not None]
    functions = {RewardCaller([one]).names[0]: one for one in [*task.reward_funcs, task.solved] if callable(one)}
    for name, function in functions.items():
        if "completion_ids" in parameters(function):
            findings.say("rewards", f"{name}: not called, since it needs the tokens of a response")
            continue
        _call(findings, name, function, rows.select([0]), [""], "an empty answer")
        if not known:
            findings.say(
                "rewards", f"{name}: called on an empty answer; there are no right answers to these rows to call it on"
            )
            continue
        texts = [str(answers[number]) for number in known]
        scores = _call(findings, name, function, rows.select(known), texts, "a right answer")
        if scores is None:
            continue
        findings.say("rewards", f"{name}: {_mean(scores)} on average for {len(scores)} right answers")
        if function is task.solved and task.measured == SOLVE_RATE:
            _check_solved(findings, name, scores, texts, rows.select(known))


def _call(
    findings: Findings, name: str, function: Callable, rows: Dataset, answers: list[str], what: str
) -> list[float | None] | None:
    """The rewards of answers, or `None` after a mistake."""
    columns = {column: list(rows[column]) for column in rows.column_names if column != "prompt"}
    prompts = list(rows["prompt"])
    completions = [document(prompt, answer)["completion"] for prompt, answer in zip(prompts, answers, strict=True)]
    try:
        (found,) = RewardCaller([function])(prompts, completions, [[] for _ in answers], columns).values()
        return [None if value is None or math.isnan(float(value)) else float(value) for value in found]
    except Exception as error:  # whatever it raises would end the training
        findings.mistake("rewards", f"The reward function {name!r} fails on {what}: {type(error).__name__}: {error}")
        return None


def _check_solved(
    findings: Findings, name: str, scores: list[float | None], answers: list[str], rows: Dataset
) -> None:
    wrong = [number for number, score in enumerate(scores) if score != 1.0]
    if wrong:
        first: dict[str, Any] = rows[wrong[0]]
        findings.mistake(
            "rewards",
            f"The reward function {name!r} says that {len(wrong)} of {len(scores)} right answers are not solved: it gives "
            f"{scores[wrong[0]]} for the answer {answers[wrong[0]]!r:.80} to {first['prompt']!r:.80}. Set the function or the "
            "answers right.",
        )


def _mean(scores: list[float | None]) -> str:
    known = [score for score in scores if score is not None]
    return f"{fmean(known):.4g}" if known else "nothing (None)"
