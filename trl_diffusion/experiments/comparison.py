"""Which runs a comparison has: pretraining, the choice of learning rates, and reinforcement."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..fields import check_one_of
from ..policies.loading import load_tokenizer
from ..policies.tiny import tiny_policy_path
from ..tasks import load_task
from ..tasks.task import SOLVE_RATE
from .arms import ARMS
from .queue import POLICIES, Row, read_row
from .settings import Sizes


if TYPE_CHECKING:
    from .twins import Material


FEW = 16  # rows of a task that is only looked at
PRETRAIN, CHOOSE, REINFORCE = "pretrain", "choose", "reinforce"


@dataclass(frozen=True)
class Job:
    """
    A run.

    Attributes:
        kind (`str`): `"pretrain"`, `"choose"` (one learning rate) or `"reinforce"`.
        variant (`str`): the name of its sizes.
        task (`str`): name of the task.
        what (`str`): the twin that is pretrained, or the arm that is trained.
        seed (`int`): its seed.
        learning_rate (`float`, *optional*): the learning rate that is tried.
    """

    kind: str
    variant: str
    task: str
    what: str
    seed: int
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """The name of its row, as a file name."""
        parts = [self.kind, self.variant, self.task, self.what.replace(", ", "+").replace(" ", "-"), str(self.seed)]
        if self.learning_rate is not None:
            parts.append(f"{self.learning_rate:g}")
        return "_".join(part for part in parts if part).replace(os.sep, "-").replace(":", "-")


@dataclass(frozen=True)
class Comparison:
    """
    Which arms are compared, on what.

    Args:
        tasks (`tuple[str, ...]`): names of tasks that have right answers to learn from.
        arms (`tuple[str, ...]`): names of `ARMS`.
        seeds (`tuple[int, ...]`): every seed is another initial policy, another corpus and other rollouts.
        variants (`dict[str, Sizes]`): how much of everything, by name. All arms, tasks and seeds are run with each of them.

    Raises:
        ValueError: for an unknown arm, or a seed that is used to choose learning rates.
    """

    tasks: tuple[str, ...] = ("sudoku_12", "backward_chain", "chain", "game_tree")
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: dict[str, Sizes] = field(default_factory=lambda: {"": Sizes()})

    def __post_init__(self):
        for name in ("tasks", "arms", "seeds", "variants"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must be different values, at least one, got {values!r}.")
        for arm in self.arms:
            check_one_of("arms", arm, ARMS)
        for sizes in self.variants.values():
            if sizes.choice_seed in self.seeds:
                raise ValueError(f"The seed {sizes.choice_seed} chooses learning rates. Leave it out of `seeds`.")
        names = [job.name for job in self.jobs()]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"Two runs would have the same name, {repeated[0]!r}. Rename a task, or round the learning rates."
            )
        if min(self.seeds) < 0:
            raise ValueError(f"`seeds` must be at least 0, got {list(self.seeds)!r}.")

    def plan(self) -> dict[str, Any]:
        """What must be the same when a comparison goes on. It may get more tasks, arms and seeds."""
        return {
            f"{variant}.{name}".lstrip("."): value
            for variant, sizes in self.variants.items()
            for name, value in sizes.to_dict().items()
        }

    def check(self) -> None:
        """Raises a `ValueError` for a task that does not exist, or that the twins cannot learn."""
        from .twins import task_in_text

        tokenizer = load_tokenizer(tiny_policy_path())
        for name in self.tasks:
            task = task_in_text(load_task(name, train_size=FEW, eval_size=1, seed=self.seeds[0]))
            if task.measured != SOLVE_RATE:
                raise ValueError(
                    f"The task {name!r} does not say which answers are right. Give it a function `solved`."
                )
            row = task.documents(task.train.select(range(1)))[0]
            if not isinstance(row["prompt"], str):
                raise ValueError(
                    f"The prompts of the task {name!r} are conversations, and the twins have no chat template."
                )
            for text in (row["prompt"], row["completion"]):
                if tokenizer.unk_token_id in tokenizer(text)["input_ids"]:
                    raise ValueError(
                        f"The tokenizer of the twins lacks a character of {text!r:.80}, from the task {name!r}."
                    )

    def jobs(self) -> list[Job]:
        """
        All runs, each after those that it needs, seed by seed: the first seed of all tasks and arms is done before the second one
        begins.
        """
        ordered: dict[Job, None] = {}

        def add(job: Job) -> None:
            for needed in self.needs(job):
                add(needed)
            ordered.setdefault(job)

        for seed in self.seeds:
            for variant in self.variants:
                for task in self.tasks:
                    for arm in self.arms:
                        add(Job(REINFORCE, variant, task, arm, seed))
        return list(ordered)

    def needs(self, job: Job) -> list[Job]:
        """The runs that come before a run."""
        if job.kind == PRETRAIN:
            return []
        twin = Job(PRETRAIN, job.variant, job.task, ARMS[job.what].twin, job.seed)
        return [twin] if job.kind == CHOOSE else [twin, *self.choices(job)]

    def choices(self, job: Job) -> list[Job]:
        """The runs that choose the learning rate of a run. There are none if there is only one learning rate."""
        sizes = self.variants[job.variant]
        rates = sizes.learning_rates if len(sizes.learning_rates) > 1 else ()
        return [Job(CHOOSE, job.variant, job.task, job.what, sizes.choice_seed, rate) for rate in rates]

    def learning_rate(self, job: Job, directory: Path) -> float:
        """The learning rate with which an arm solved most validation rows of the choice seed, the lowest of several."""
        tried = self.choices(job)
        if not tried:
            return self.variants[job.variant].learning_rates[0]
        best = max(tried, key=lambda one: (read_row(one, directory)["validation"], -(one.learning_rate or 0)))
        assert best.learning_rate is not None
        return best.learning_rate

    def do(self, job: Job, directory: Path) -> tuple[Row, str]:
        """Does a run."""
        from .reinforce import choose, reinforce
        from .twins import Material, pretrain

        material = Material(job.task, job.seed, self.variants[job.variant])
        if job.kind == PRETRAIN:
            row = pretrain(material, job.what, directory / POLICIES / job.name)
            return row, f"mean loss {row['loss']:.3f}, {row['seconds']:.0f} s"
        arm = ARMS[job.what]
        twin = directory / POLICIES / self.needs(job)[0].name
        if not twin.is_dir():  # its row came from elsewhere
            _pretrain_again(material, arm.twin, twin)
        if job.kind == CHOOSE:
            assert job.learning_rate is not None
            row = choose(material, arm, twin, job.learning_rate)
            return row, f"{row['validation']:.1%}"
        rate = self.learning_rate(job, directory)
        row = {**reinforce(material, arm, twin, rate), "learning_rate": rate}
        solved = [
            at_training(points, row["training"], 1.0)["solved"] for points in (row["before"], row["updates"]["points"])
        ]
        return row, "{:.1%} -> {:.1%}".format(*solved)


def _pretrain_again(material: Material, twin: str, directory: Path) -> None:
    """Pretrains a twin whose row is there, but not its weights. Two processes may do so at once."""
    from .twins import pretrain

    own = directory.with_name(f"{directory.name}.{os.getpid()}")
    pretrain(material, twin, own)
    try:
        own.rename(directory)
    except OSError:  # another process was first, with the same weights
        shutil.rmtree(own)


def at_training(points: list[Row], training: dict[str, Any], temperature: float) -> Row:
    """Of what was measured, the point at a temperature and the settings of training."""
    return next(point for point in points if point["temperature"] == temperature and point["settings"] == training)
