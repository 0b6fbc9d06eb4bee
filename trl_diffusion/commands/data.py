"""What a command trains, collects or measures on: a task, or the user's own rows and reward functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..fields import check_at_least
from ..tasks import Task, load_task
from ..tasks.data import load_rewards, load_splits, rows_of_file, split_of, task_of_data
from ..tasks.rows import NoColumn
from .options import NO_TASK


DEFAULT = "sudoku"
# Options that say what the rows and the rewards are; the two commands of a round share them.
DATA = (
    "task",
    "train_file",
    "eval_file",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "reward_funcs",
    "system_prompt",
    "eval_size",
)


@dataclass
class OwnData:
    """Rows and reward functions in place of a task. The options are called as those of TRL's scripts."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows in place of a task: a dataset on the hub, a directory that `save_to_disk` has written, or a data file. They "
            "have a column `prompt` (text or messages) or `messages`."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to measure on. If there is no such split, the last rows of the other are measured."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions for the rows of `dataset_name` or `train_file`: names such as math_accuracy, "
            "FILE.py:FUNCTION, or module.FUNCTION. The mean of the first one is measured."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "Message of the system before each prompt of `dataset_name` or `train_file`."}
    )

    measures_only: ClassVar[bool] = False  # whether rows to measure on are enough

    @property
    def is_own(self) -> bool:
        """Whether there are rows and reward functions in place of a task."""
        return self.dataset_name is not None or self.reward_funcs is not None

    def take_task(self) -> None:
        """
        Settles which task it is.

        Raises:
            ValueError: if there are both a task and the user's own rows, or one of the options has no use.
        """
        command: Any = self  # which has `task`, `train_file` and `eval_file`, too
        if isinstance(self.reward_funcs, str):  # a YAML file may name a single one
            self.reward_funcs = [self.reward_funcs]
        if command.task == NO_TASK:
            command.task = None
        if self.is_own:
            self._check_own()
        else:
            for name, default in (
                ("dataset_config", None), ("dataset_train_split", "train"), ("dataset_test_split", "test"), ("system_prompt", None),
            ):  # fmt: skip
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`--{name}` is for rows of your own: give `--dataset_name` and `--reward_funcs`, too."
                    )
            command.task = command.task or DEFAULT

    def _check_own(self: Any) -> None:
        if self.task is not None:
            what = "--dataset_name" if self.dataset_name is not None else "--reward_funcs"
            raise ValueError(f"`--task {self.task}` has rows and rewards of its own: leave it or `{what}` out.")
        if not self.reward_funcs:
            raise ValueError(
                f"The rows of {self.dataset_name} have no reward: give `--reward_funcs`, such as ./rewards.py:FUNCTION."
            )
        if self.dataset_name is not None and self.train_file is not None:
            raise ValueError("`--dataset_name` and `--train_file` are both rows to train on. Give one of them.")
        if self.dataset_name is None:
            if self.train_file is None and not (self.measures_only and self.eval_file is not None):
                raise ValueError("`--reward_funcs` need rows: give `--dataset_name` or `--train_file`.")
            for name, default in (
                ("dataset_config", None),
                ("dataset_train_split", "train"),
                ("dataset_test_split", "test"),
            ):
                if getattr(self, name) != default:
                    raise ValueError(f"`--{name}` is for `--dataset_name`. Leave it out, or give the dataset.")

    def load_task(self: Any, train_size: int, eval_size: int, seed: int) -> Task:
        """
        The task, or what stands for one.

        Raises:
            ValueError, FileNotFoundError, ImportError: if something is not as it should be.
        """
        if not self.is_own:
            try:
                return load_task(self.task, self.train_file, self.eval_file, train_size, eval_size, seed)
            except NoColumn as error:
                raise ValueError(
                    f"{error} These are read as rows of the task {self.task}. For rows of your own, give `--reward_funcs`, too."
                ) from None
        for option, size in (("train_size", train_size), ("eval_size", eval_size)):
            check_at_least(option, size)
        rewards = load_rewards(self.reward_funcs)  # before rows are read, which may take long
        evaluation = rows_of_file(self.eval_file) if self.eval_file else None
        train = None
        if self.dataset_name is None:
            name = self.train_file or self.eval_file
            train = rows_of_file(self.train_file) if self.train_file else None
        else:
            name, splits = self.dataset_name, load_splits(self.dataset_name, self.dataset_config)
            if evaluation is None and (self.dataset_test_split in splits or self.dataset_test_split != "test"):
                evaluation = split_of(splits, self.dataset_test_split, "dataset_test_split", name)
            if evaluation is None or not self.measures_only:
                train = split_of(splits, self.dataset_train_split, "dataset_train_split", name)
        return task_of_data(name, train, evaluation, rewards, train_size, eval_size, self.system_prompt)
