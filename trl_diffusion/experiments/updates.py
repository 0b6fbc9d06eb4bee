"""
Aggressive updates: when does training break, and what shows it before?

The embedded policy learns 4x4 sudoku. `group` runs are online, with the loss of groups of answers; `pairs` runs are offline, from one
collection of answers for each seed, with the pairwise loss.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from ..decoding.config import DecodingConfig
from ..fields import AtLeast, check_fields
from ..offline.collect import collect
from ..policies.policy import open_policy
from ..policies.tiny import tiny_policy_path
from ..tasks import Task, load_task
from ..trainer.config import DTRPOConfig
from ..trainer.trainer import DTRPOTrainer
from ..trajectories.dataset import load_trajectories
from .queue import Row


COLLECT, GROUP, PAIRS = "collect", "group", "pairs"
LENGTH, TOKENS_PER_STEP, GENERATIONS = 17, 2, 16
COLLECTIONS = "collections"
GROUP_GRID = {"learning_rate": (6e-4, 2e-3, 6e-3), "beta": (0.0, 0.1), "num_iterations": (1, 4), "num_draws": (1,)}
MORE_DRAWS = {"learning_rate": (6e-4, 2e-3, 6e-3), "beta": (0.0,), "num_iterations": (4,), "num_draws": (4,)}
PAIRS_GRID = {"learning_rate": (6e-4, 2e-3), "beta": (0.1, 0.5), "num_draws": (1, 8), "sft_weight": (0.0, 1.0)}
# What a log says about the health of a run.
SIGNS = (
    "reward", "loss", "grad_norm", "entropy", "kl", "diffusion/effective_sample_size", "diffusion/log_ratio_std", "diffusion/kl_to_old",
    "rewards/chosen", "rewards/rejected", "rewards/accuracies",
)  # fmt: skip


def _combinations(grid: dict[str, tuple]) -> list[tuple[tuple[str, float], ...]]:
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


@dataclass(frozen=True)
class Job:
    """
    A run.

    Attributes:
        kind (`str`): `"collect"`, `"group"` or `"pairs"`.
        seed (`int`): its seed.
        settings (`tuple[tuple[str, float], ...]`): names and values of its settings.
    """

    kind: str
    seed: int
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """The name of its row, as a file name."""
        return "_".join([self.kind, str(self.seed), *(f"{name}={value:g}" for name, value in self.settings)])


@dataclass(frozen=True)
class Updates:
    """
    Training of the embedded policy at many settings.

    Args:
        seeds (`tuple[int, ...]`): every seed has other puzzles, answers and draws.
        updates (`int`): optimizer steps of a `group` run.
        batch_size (`int`): answers of an update.
        prompts (`int`): puzzles of a collection, with 16 answers each.
        epochs (`int`): times that a `pairs` run sees its collection.
        eval_size (`int`): puzzles that a policy is measured on, greedily.
        measurements (`int`): times that a run is measured, evenly, the end among them.

    Raises:
        ValueError: for a value out of range.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    updates: Annotated[int, AtLeast(1)] = 24
    batch_size: Annotated[int, AtLeast(2)] = 256
    prompts: Annotated[int, AtLeast(1)] = 160
    epochs: Annotated[int, AtLeast(1)] = 3
    eval_size: Annotated[int, AtLeast(1)] = 200
    measurements: Annotated[int, AtLeast(1)] = 4

    def __post_init__(self):
        check_fields(self, set(self.__dataclass_fields__) - {"seeds"})
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"`seeds` must be different whole numbers of at least 0, got {list(self.seeds)!r}.")

    def plan(self) -> dict[str, Any]:
        """What must be the same when the study goes on. It may get more seeds."""
        return {name: value for name, value in vars(self).items() if name != "seeds"}

    def check(self) -> None:
        """Nothing that is not shipped with the package is needed."""

    def jobs(self) -> list[Job]:
        """All runs, seed by seed."""
        settings = [(GROUP, one) for grid in (GROUP_GRID, MORE_DRAWS) for one in _combinations(grid)]
        settings += [(PAIRS, one) for one in _combinations(PAIRS_GRID)]
        found = []
        for seed in self.seeds:
            found += [Job(COLLECT, seed), *(Job(kind, seed, one) for kind, one in settings)]
        return found

    def needs(self, job: Job) -> list[Job]:
        """The runs that come before a run."""
        return [Job(COLLECT, job.seed)] if job.kind == PAIRS else []

    def do(self, job: Job, directory: Path) -> tuple[Row, str]:
        """Does a run."""
        task, stored = (
            load_task("sudoku", eval_size=self.eval_size, seed=job.seed),
            directory / COLLECTIONS / str(job.seed),
        )
        if job.kind == COLLECT:
            return self._collect(task, stored, job.seed)
        row = self._train(task, job, stored)
        return row, f"{row['curve'][0][1]:.1%} -> {row['curve'][-1][1]:.1%}"

    def _collect(self, task: Task, path: Path, seed: int) -> tuple[Row, str]:
        policy = open_policy(tiny_policy_path())
        decoding = DecodingConfig(LENGTH, 1.0, tokens_per_step=TOKENS_PER_STEP, strategy="entropy")
        collect(
            cast(PreTrainedModel, policy.model), policy.tokenizer, task.train.select(range(self.prompts)), task.reward_funcs, path, decoding,
            num_responses=GENERATIONS, batch_size=512, seed=seed, disable_tqdm=True,
        )  # fmt: skip
        count = sum(map(len, load_trajectories(path)["completion_lengths"]))
        return {"responses": count}, f"{count} responses"

    def _train(self, task: Task, job: Job, stored: Path) -> Row:
        given = dict(job.settings)
        weight = given.pop("sft_weight", None)
        options: dict[str, Any] = {**given, "num_draws": int(given["num_draws"])}
        if job.kind == GROUP:
            dataset = task.train
            options |= {"num_iterations": int(given["num_iterations"]), "max_steps": self.updates}
        else:
            dataset = load_trajectories(stored)
            losses = ["sigmoid", "sft"] if weight else ["sigmoid"]
            options |= {"loss_type": "dpo", "dpo_loss_type": losses, "num_train_epochs": self.epochs}
            if weight:
                options["dpo_loss_weights"] = [1.0, weight]
        with tempfile.TemporaryDirectory() as scratch:
            args = DTRPOConfig(
                output_dir=scratch, per_device_train_batch_size=self.batch_size, num_generations=GENERATIONS,
                max_completion_length=LENGTH, tokens_per_step=TOKENS_PER_STEP, strategy="entropy", temperature=1.0,
                lr_scheduler_type="constant_with_warmup", warmup_steps=3, seed=job.seed, bf16=False, gradient_checkpointing=False,
                dataloader_pin_memory=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **options,
            )  # fmt: skip
            trainer = DTRPOTrainer(
                model=tiny_policy_path(), reward_funcs=task.reward_funcs, args=args, train_dataset=dataset
            )
            trainer.remove_callback(PrinterCallback)
            curve = Curve(self.measurements, lambda: _solve_rate(trainer, task))
            trainer.add_callback(curve)
            diverged = None
            try:
                trainer.train()
            except FloatingPointError as error:  # of the policy: that is what is looked for
                diverged = str(error)
                curve.points.append((trainer.state.global_step, 0.0))
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        signs = {name: [_rounded(log.get(name)) for log in logs] for name in SIGNS if any(name in log for log in logs)}
        return {"curve": curve.points, "signs": signs, "puzzles": self.eval_size, "diverged": diverged}


class Curve(TrainerCallback):
    """Measures the policy before training, and a number of times on the way, the last time at the end."""

    def __init__(self, measurements: int, measure):
        self.measurements, self.measure = measurements, measure
        self.points: list[tuple[int, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.points.append((0, self.measure()))

    def on_step_end(self, args, state, control, **kwargs):
        due = {round(state.max_steps * (i + 1) / self.measurements) for i in range(self.measurements)}
        if state.global_step in due:
            self.points.append((state.global_step, self.measure()))


def _solve_rate(trainer: DTRPOTrainer, task: Task) -> float:
    """Share of evaluation puzzles that the policy in training solves. A policy whose logits are not finite solves none."""
    try:
        return task.solve_rate(trainer.answer(list(task.evaluation["prompt"]))[0])
    except FloatingPointError:
        return 0.0


def _rounded(value: float | None) -> float | None:
    """A value with four digits. One that is not finite is as large as a number can be: it alarms."""
    if value is None:
        return None
    return float(f"{value:.4g}") if math.isfinite(value) else sys.float_info.max
