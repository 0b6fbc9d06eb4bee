"""A task is training rows, evaluation rows, reward functions and a checker."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from datasets import Dataset

from ..utils import wilson
from .documents import document


SOLVE_RATE, MEAN_REWARD = "solve rate", "mean reward"


def no_solution(row: dict[str, Any]) -> None:
    """For a task that knows no right answers."""


@dataclass
class Task:
    """
    Attributes:
        name (`str`): what it is called.
        unit (`str`): what its rows are called, in the plural.
        train (`Dataset`): rows to train on, with a `prompt` column.
        evaluation (`Dataset`): rows to measure on, of the same columns; training rows never repeat one of them.
        reward_funcs (`list`): reward functions with TRL's signature.
        solved (`Callable`, *optional*): reward function whose 0 or 1 says whether an answer is right. Without it, the first reward
            function is what is measured.
        solution (`Callable`, *optional*): a right answer to a row, as text, or `None` if there is none.
        measured (`str`, *optional*): what the mean of `solved` is called: `"solve rate"`, or `"mean reward"` if the first reward
            function is measured.
    """

    name: str
    unit: str
    train: Dataset
    evaluation: Dataset
    reward_funcs: list[Callable]
    solved: Callable = None  # type: ignore[assignment]  # afterwards there is one
    solution: Callable[[dict[str, Any]], str | None] = no_solution
    measured: str = SOLVE_RATE

    def __post_init__(self):
        if self.solved is None and isinstance(self.reward_funcs, list | tuple) and self.reward_funcs:
            self.solved, self.measured = self.reward_funcs[0], MEAN_REWARD

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

    def scores(self, answers: list[str]) -> list[float | None]:
        """
        For each evaluation row, what `solved` says of `answers`, in their order: 0 or 1, or the first reward if that is measured.
        `None` for a row to which the function does not apply.

        Raises:
            ValueError: if the function needs the tokens of the answers, or gives one of them neither a number nor `None`.
        """
        columns = {name: list(self.evaluation[name]) for name in self.evaluation.column_names if name != "prompt"}
        return self.rate(list(self.evaluation["prompt"]), answers, columns)

    def rate(self, prompts: list, answers: list[str], columns: dict[str, list]) -> list[float | None]:
        """As [`~Task.scores`], for rows of their own: their prompts, and their other columns."""
        from ..rewards.call import RewardCaller  # here, since it brings TRL along

        caller = RewardCaller([self.solved])
        if "completion_ids" in parameters(self.solved):
            raise ValueError(
                f"The reward function {caller.names[0]!r} needs `completion_ids`, which a measurement does not have. Put another one "
                f"first, or give the task `{self.name}` a function `solved`."
            )
        completions = [document(prompt, answer)["completion"] for prompt, answer in zip(prompts, answers, strict=True)]
        (rewards,) = caller(prompts, completions, [[] for _ in answers], columns).values()
        return [None if reward is None else float(reward) for reward in rewards]

    def solve_rate(self, answers: list[str]) -> float:
        """
        Mean of the scores: the share of the evaluation rows that `answers`, in their order, solve, or else the mean reward. Rows without
        a score do not count.
        """
        return statistics.fmean(self.known(self.scores(answers)))

    def known(self, scores: Sequence[float | None]) -> list[float]:
        """The scores that are known. Raises a `ValueError` if none is."""
        known = [score for score in scores if score is not None]
        if not known:
            raise ValueError(
                f"The {self.measured} of the task `{self.name}` cannot be measured: its function gives `None` for each of the "
                f"{len(scores)} rows. Look at the columns that it reads."
            )
        return known


def interval_of(scores: Sequence[float], measured: str) -> tuple[float, float]:
    """The 95 % interval of the mean of scores: Wilson's of a share, and that of the normal distribution of a reward (of a single one,
    the reward itself)."""
    middle = statistics.fmean(scores)
    if measured == SOLVE_RATE and 0 <= middle <= 1:
        return wilson(middle, len(scores))
    spread = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    half = statistics.NormalDist().inv_cdf(0.975) * spread
    return middle - half, middle + half


def parameters(function: Callable) -> dict[str, Any]:
    """The parameters of a function by their names; none, if it does not tell."""
    try:
        return dict(signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def task_of_rows(
    name: str, unit: str, train: list, evaluation: list, reward_funcs: list, solved: Callable, solution: Callable
) -> Task:
    """
    A task of lists of rows.

    Raises:
        ValueError: if one of them is empty.
    """
    for what, rows in (("training", train), ("evaluation", evaluation)):
        if not rows:
            raise ValueError(
                f"The task `{name}` is left with no {what} rows. Give more rows, or other ones to measure on (`--eval_file`)."
            )
    return Task(name, unit, Dataset.from_list(train), Dataset.from_list(evaluation), reward_funcs, solved, solution)


def prompt_key(prompt: Any) -> str:
    """What makes two prompts the same."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


def check_task(task: Any, where: str) -> None:
    """
    Checks a task that somebody has written.

    Args:
        task ([`Task`]): the task.
        where (`str`): what has made it, for the message.

    Raises:
        ValueError: if it is none, its rows have no prompts, training rows are evaluation rows, too, or its functions cannot be called.
    """
    if not isinstance(task, Task):
        raise ValueError(f"{where} must return a `trl_diffusion.tasks.Task`, got {type(task).__name__}.")
    for name in ("name", "unit"):
        if not isinstance(getattr(task, name), str) or not getattr(task, name).strip():
            raise ValueError(f"{where}: `{name}` of the task must be text, got {getattr(task, name)!r:.80}.")
    for name in ("train", "evaluation"):
        _check_rows(getattr(task, name), f"{where}: `{name}`")
    kept = {prompt_key(prompt) for prompt in task.evaluation["prompt"]}
    both = [prompt for prompt in task.train["prompt"] if prompt_key(prompt) in kept]
    if both:
        raise ValueError(
            f"{where}: {len(both)} of the {len(task.train)} training rows have the prompt of an evaluation row, such as "
            f"{both[0]!r:.80}. Leave them out of one of the two."
        )
    if not isinstance(task.reward_funcs, list | tuple) or not task.reward_funcs:
        raise ValueError(f"{where}: `reward_funcs` must be a list of reward functions, got {task.reward_funcs!r:.80}.")
    for name, function in (
        *((f"reward_funcs[{place}]", one) for place, one in enumerate(task.reward_funcs)),
        ("solved", task.solved),
        ("solution", task.solution),
    ):
        if not callable(function):
            raise ValueError(f"{where}: `{name}` must be a function, got {function!r:.80}.")


def _check_rows(rows: Any, what: str) -> None:
    if not isinstance(rows, Dataset):
        raise ValueError(f"{what} must be a `datasets.Dataset`, got {type(rows).__name__}.")
    if not len(rows):
        raise ValueError(f"{what} has no rows.")
    if "prompt" not in rows.column_names:
        raise ValueError(f"{what} must have a column `prompt`; it has {sorted(rows.column_names)}.")
    for number, prompt in enumerate(rows["prompt"]):
        if not is_prompt(prompt):
            raise ValueError(f"{what}, row {number}: a prompt must be text or a list of messages, got {prompt!r:.80}.")


def is_prompt(prompt: Any) -> bool:
    """Whether it is text, or messages, each with a role and a text."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
            for one in prompt
        )
    )
