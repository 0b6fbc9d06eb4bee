"""What a policy can do: shares of solved puzzles at different numbers of forward passes, and pass@k."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..decoding.generate import generate
from ..metrics.pass_at_k import pass_at_k
from ..seeds import derive_seed
from ..tasks import Task
from ..utils import seeded
from .arms import BLOCK, REVISION, TWINS, Arm
from .twins import Material


THRESHOLDS = (0.5, 0.7, 0.9, 0.97, 0.995)  # of adaptive unmasking
ROWS = 100  # puzzles that the autoregressive policy answers at once
MEASURES, SAMPLES = range(2)  # random streams


@dataclass
class Answers:
    """
    Answers to rows.

    Attributes:
        texts (`list[str]`): the answers.
        passes (`float`): forward passes of an answer, on average.
        tokens (`float`): tokens of an answer with its stop token, on average.
        seconds (`float`): core seconds of all answers.
    """

    texts: list[str]
    passes: float
    tokens: float
    seconds: float


@torch.no_grad()
def answer(model: nn.Module, material: Material, arm: Arm, rows: Dataset, temperature: float, seed: int,
           **settings: Any) -> Answers:  # fmt: skip
    """
    Answers rows with a policy.

    Args:
        model (`nn.Module`): the policy.
        material ([`Material`]): the tokenizer, and the longest answer.
        arm ([`Arm`]): how it answers.
        rows (`Dataset`): rows with a `prompt`.
        temperature (`float`): of the samples.
        seed (`int`): of the random numbers. The global random state stays as it was.
        settings: settings of [`DecodingConfig`], over those of the arm.
    """
    started, tokenizer, prompts = time.process_time(), material.tokenizer, list(rows["prompt"])
    if arm.is_causal:
        tokens = _continue(model, tokenizer, tokenizer(prompts)["input_ids"], material.length, temperature, seed)
        texts, passes = tokenizer.batch_decode(tokens, skip_special_tokens=True), fmean(map(len, tokens))
    else:
        count = [0]

        def on_step(loop) -> None:
            count[0] += len(loop.active_lanes())

        config = arm.config(material.length, temperature, **settings)
        found = generate(model, tokenizer, prompts, config, seed=seed, streamer=on_step)
        tokens, texts, passes = found.trajectories.completions(), found.texts, count[0] / len(prompts)
    return Answers(texts, passes, fmean(map(len, tokens)), time.process_time() - started)


def _continue(model, tokenizer, ids: list[list[int]], length: int, temperature: float, seed: int) -> list[list[int]]:
    """Completions of an autoregressive model with their stop tokens, in batches and with a key-value cache."""
    found, was_training = [], model.training
    model.eval()
    with seeded(derive_seed(seed)):
        for first in range(0, len(ids), ROWS):
            batch = tokenizer.pad({"input_ids": ids[first : first + ROWS]}, padding_side="left", return_tensors="pt")
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            )
            output = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=length,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **sampling,
            )  # fmt: skip
            for row in output[:, batch["input_ids"].shape[1] :].tolist():
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                found.append(row[:end])
    model.train(was_training)
    return found


def solved(task: Task, rows: Dataset, texts: Sequence[str]) -> float:
    """Share of rows that are solved."""
    return fmean(scores_of(task, rows, texts))


def scores_of(task: Task, rows: Dataset, texts: Sequence[str]) -> list[float]:
    """For each row, whether it is solved: 0 or 1. A row that cannot be checked is not solved."""
    columns = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
    return [score or 0.0 for score in task.rate(list(rows["prompt"]), list(texts), columns)]


def points(arm: Arm, length: int) -> list[dict[str, Any]]:
    """Settings at which an arm is measured: fixed numbers of passes, those of training among them, and thresholds of adaptive unmasking."""
    if arm.is_causal:
        return [{}]
    size = BLOCK if TWINS[arm.twin].attention == "block" else length
    own, fewest = arm.schedule(length)["steps_per_block"], 2 if arm.revises else 1
    steps = {size, own, *(one for one in (1, 2, 3, 4, 6, 8, 12) if fewest <= one <= size)}
    fixed = [{"steps_per_block": one} for one in sorted(steps)]
    if arm.decoding:
        return fixed
    return fixed + [{"strategy": "threshold", "threshold": threshold} for threshold in THRESHOLDS]


def measure(
    model: nn.Module, material: Material, arm: Arm, seed: int, which: Sequence[dict[str, Any]] | None = None,
    temperatures: Sequence[float] = (0.0, 1.0),
) -> list[dict[str, Any]]:  # fmt: skip
    """
    Solve rates of a policy.

    Args:
        model (`nn.Module`): the policy.
        material ([`Material`]): rows.
        arm ([`Arm`]): how it answers.
        seed (`int`): of the random numbers.
        which (`Sequence[dict]`, *optional*): settings to measure at. Defaults to `points`.
        temperatures (`Sequence[float]`): of the samples.

    Returns:
        `list[dict]`: for each temperature and setting the share of solved evaluation rows, forward passes and tokens of an
        answer, core seconds of 1,000 answers, and for adaptive unmasking the share of solved validation rows.
    """
    task, found = material.whole, []
    for temperature in temperatures:
        for settings in points(arm, material.length) if which is None else which:
            got = answer(model, material, arm, task.evaluation, temperature, derive_seed(seed, MEASURES), **settings)
            point = {
                "temperature": temperature,
                "settings": settings,
                "solved": solved(task, task.evaluation, got.texts),
                "passes": round(got.passes, 3),
                "tokens": round(got.tokens, 2),
                "seconds_per_1000": round(1000 * got.seconds / len(got.texts), 3),
            }
            if "threshold" in settings:
                rows = material.validation
                texts = answer(model, material, arm, rows, temperature, derive_seed(seed, MEASURES), **settings).texts
                point["validation"] = solved(task, rows, texts)
            found.append(point)
    return found


def sampled(model: nn.Module, material: Material, arm: Arm, seed: int) -> dict[str, float]:
    """pass@k of a policy at temperature 1 and the settings of its training, for k up to `Sizes.num_samples`, on evaluation rows."""
    task, number = material.whole, material.sizes.num_samples
    settings, right = arm.schedule(material.length), [0] * len(task.evaluation)
    for sample in range(number):
        texts = answer(
            model, material, arm, task.evaluation, 1.0, derive_seed(seed, SAMPLES, sample), **settings
        ).texts
        for row, score in enumerate(scores_of(task, task.evaluation, texts)):
            right[row] += score == 1
    sizes = [k for k in (1, 2, 4, 8, 16, 32) if k <= number]
    return {str(k): fmean(pass_at_k(number, count, k) for count in right) for k in sizes}


def with_revision(arm: Arm) -> Arm:
    """An arm that takes tokens back when it is measured, and did not while it learned."""
    return Arm(arm.twin, {**arm.decoding, **REVISION})
