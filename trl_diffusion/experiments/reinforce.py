"""Reinforcement of an arm, up to a number of updates and up to a number of seconds, in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from ..policies.small import load_small
from ..trainer.config import DTRPOConfig
from ..trainer.trainer import DTRPOTrainer
from .answers import answer, measure, sampled, solved, with_revision
from .arms import TWINS, Arm
from .twins import Material


WARMUP = 3  # updates
MOST_UPDATES = 100_000


class Budgets(TrainerCallback):
    """
    Calls a function once after a number of updates and once after a number of core seconds. The run ends after both. The clock
    stands still while a function is called.

    Args:
        updates (`int`): optimizer steps.
        seconds (`float`, *optional*): core seconds. Only the updates count if `None`.
        reached (`Callable`): called with the name of the budget, `"updates"` or `"seconds"`, and the optimizer step.
        marks (`Sequence[int]`): optimizer steps before `updates` after which it is called, with the name `"marks"`.
    """

    def __init__(
        self, updates: int, seconds: float | None, reached: Callable[[str, int], None], marks: Sequence[int] = ()
    ):
        self.updates, self.reached, self.marks = updates, reached, set(marks)
        self.seconds, self.elapsed = seconds, 0.0
        self.clock: list[float] = []  # core seconds after each update
        self.left = {"updates", "seconds"} if seconds is not None else {"updates"}

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.elapsed += time.process_time() - self.started
        self.clock.append(round(self.elapsed, 3))
        if state.global_step in self.marks:
            self.reached("marks", state.global_step)
        over = {"updates": state.global_step >= self.updates, "seconds": self.elapsed >= (self.seconds or 0)}
        for name in sorted(name for name in self.left if over[name]):
            self.left.remove(name)
            self.reached(name, state.global_step)
        control.should_training_stop = not self.left
        self.started = time.process_time()
        return control


def build_trainer(
    model: PreTrainedModel, material: Material, arm: Arm, learning_rate: float, seed: int, directory: str | Path
) -> GRPOTrainer:
    """
    The trainer of an arm: TRL's for the autoregressive one. Prompts, their order, groups, rewards and updates are the same for all.

    Args:
        model ([`~transformers.PreTrainedModel`]): the pretrained twin.
        material ([`Material`]): rows.
        arm ([`Arm`]): how it answers.
        learning_rate (`float`): constant after `WARMUP` updates.
        seed (`int`): of the order of prompts, and of the rollouts.
        directory (`str` or `Path`): where the trainer may write.
    """
    sizes, task = material.sizes, material.whole
    options: dict[str, Any] = dict(
        output_dir=str(directory), per_device_train_batch_size=sizes.batch_size, num_generations=sizes.num_generations,
        max_completion_length=material.length, max_steps=MOST_UPDATES, learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup", warmup_steps=WARMUP, beta=0.0, temperature=1.0, seed=seed, bf16=False,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    arguments: dict[str, Any] = dict(
        model=model,
        reward_funcs=task.reward_funcs,
        train_dataset=material.prompts,
        processing_class=material.tokenizer,
    )
    if arm.is_causal:
        return GRPOTrainer(args=GRPOConfig(**options), **arguments)
    decoding = arm.config(material.length, 1.0, **arm.schedule(material.length)).rollout_settings()
    draws = sizes.num_draws if TWINS[arm.twin].attention == "full" else 1
    return DTRPOTrainer(args=DTRPOConfig(**options, **decoding, num_draws=draws), **arguments)


def choose(material: Material, arm: Arm, directory: Path, learning_rate: float) -> dict[str, Any]:
    """
    Tries a learning rate.

    Args:
        material ([`Material`]): rows of the choice seed.
        arm ([`Arm`]): what is trained.
        directory (`Path`): the pretrained twin.
        learning_rate (`float`): the learning rate.

    Returns:
        `dict`: the share of validation rows solved after `Sizes.updates`, at the settings of training and temperature 1.
    """
    trainer = _train(material, arm, directory, learning_rate, None, lambda name, step, trainer: None)
    rows, settings = material.validation, arm.schedule(material.length)
    texts = answer(cast(PreTrainedModel, trainer.model), material, arm, rows, 1.0, material.seed, **settings).texts
    return {"validation": solved(material.whole, rows, texts)}


def reinforce(material: Material, arm: Arm, directory: Path, learning_rate: float) -> dict[str, Any]:
    """
    Trains an arm and measures it before, after `Sizes.updates`, and after `Sizes.seconds`.

    Args:
        material ([`Material`]): rows.
        arm ([`Arm`]): what is trained.
        directory (`Path`): the pretrained twin.
        learning_rate (`float`): the learning rate.

    Returns:
        `dict`: what was measured, the reward of each update, and the core seconds after it.
    """
    seed, at = material.seed, [arm.schedule(material.length)]
    twin = load_small(directory)
    row: dict[str, Any] = {
        "training": at[0],
        "length": material.length,
        "puzzles": len(material.whole.evaluation),
        "before": measure(twin, material, arm, seed, at),
        "marks": [],
    }
    row["before_pass_at_k"] = sampled(twin, material, arm, seed)

    def reached(name: str, step: int, trainer: GRPOTrainer) -> None:
        model, whole = cast(PreTrainedModel, trainer.model), name == "updates"
        found = {"updates": step, "points": measure(model, material, arm, seed, None if whole else at)}
        if name == "marks":
            row["marks"].append(found)
        else:
            row[name] = found
        if not whole:
            return
        row["pass_at_k"] = sampled(model, material, arm, seed)
        if not arm.is_causal and not arm.revises:
            row["revision_at_test"] = measure(model, material, with_revision(arm), seed)

    trainer = _train(material, arm, directory, learning_rate, material.sizes.seconds, reached)
    clock = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Budgets)).clock
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {**row, "rewards": [round(reward, 4) for reward in rewards], "seconds_after": clock}


def _train(material: Material, arm: Arm, directory: Path, learning_rate: float, seconds: float | None,
           reached: Callable[[str, int, GRPOTrainer], None]) -> GRPOTrainer:  # fmt: skip
    marks = () if seconds is None else material.sizes.marks
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(load_small(directory), material, arm, learning_rate, material.seed, scratch)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(
            Budgets(material.sizes.updates, seconds, lambda name, step: reached(name, step, trainer), marks)
        )
        trainer.train()
    return trainer
