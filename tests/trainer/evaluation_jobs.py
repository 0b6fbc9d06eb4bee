"""What the processes of a test of evaluations do: the same on one process and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.trainer.conftest import codes
from trl_diffusion import DTRPOConfig, DTRPOTrainer


# Options, and rows of each of two processes.
SETTINGS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "dapo": ({"loss_type": "dapo", "log_completions": True, "num_completions_to_print": 1}, [4, 1]),
    "grpo, expected weights": ({"loss_type": "grpo", "weighting": "none", "step_distribution": "uniform"}, [3]),
    "bnpo, masked": ({"loss_type": "bnpo", "mask_truncated_completions": True}, [3]),
    "dpo": ({"loss_type": "dpo"}, [4]),
}
CLOCKED = ("runtime", "per_second", "model_preparation_time")


def worth(completions, worth, **kwargs):
    return worth


def rows(number: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"sudoku {row}", "worth": float(row)} for row in range(number)])


def figures(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not any(part in name for part in CLOCKED)}


def evaluate(start: str, directory: Path, case: str, sizes: list[int]) -> dict[str, dict[str, float]]:
    """
    Figures of five prompts, answered twice each by a policy that is not its reference, for several numbers of rows of a
    process; of the first three prompts as a stream, too.
    """
    args = DTRPOConfig(
        str(directory), per_device_train_batch_size=4, num_generations=4, num_generations_eval=2, max_completion_length=14,
        tokens_per_step=2, beta=0.1, temperature=0.7, per_device_eval_batch_size=4, bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", disable_tqdm=True, log_level="error", **SETTINGS[case][0],
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    trainer = DTRPOTrainer(start, [codes, worth], args, rows(4), rows(5), tokenizer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
    found = {}
    for size in sizes:
        args.per_device_eval_batch_size = size
        found[f"dataset, {size}"] = figures(trainer.evaluate())
    found["stream"] = figures(trainer.evaluate(rows(3).to_iterable_dataset(), metric_key_prefix="stream"))
    if args.log_completions and trainer.is_world_process_zero():
        table = pd.read_parquet(directory / "completions" / "eval_00000.parquet")
        found["table"] = table["prompt"].value_counts().to_dict()
    return found


def pair_job(rank: int, start: str, directory: str) -> dict[str, dict]:
    """One of two processes."""
    cases = SETTINGS.items()
    return {case: evaluate(start, Path(directory) / case, case, sizes) for case, (_, sizes) in cases}
