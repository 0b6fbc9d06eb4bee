"""What two processes run when something goes wrong on one of them. The error of each is left in `error_RANK.json`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from tests.distributed.jobs import Recorder, make_trainer


RANK = int(os.environ["LOCAL_RANK"])


def raising(completions, **kwargs):
    if RANK == 1:
        raise KeyError("no such row")
    return Recorder()(completions, **kwargs)


async def raising_later(completions, **kwargs):
    return raising(completions, **kwargs)


def too_few(completions, **kwargs):
    return Recorder()(completions, **kwargs)[RANK:]


def no_numbers(completions, **kwargs):
    return ["good"] * len(completions) if RANK == 1 else Recorder()(completions, **kwargs)


def slow(completions, **kwargs):
    time.sleep(RANK)
    return Recorder()(completions, **kwargs)


def poison(trainer, with_gradient: bool) -> None:
    """Makes the policy's logits NaN, in updates, or raise, in rollouts; on process 1 alone."""

    def hook(module, args, output):
        if RANK == 0 or torch.is_grad_enabled() != with_gradient:
            return output
        if with_gradient:
            return output * float("nan")
        raise MemoryError("rollout of this process")

    trainer.model.get_output_embeddings().register_forward_hook(hook)


CASES = {
    "raises": {"reward": raising},
    "raises_later": {"reward": raising_later},
    "too_few": {"reward": too_few},
    "no_numbers": {"reward": no_numbers},
    "nan_loss": {"poison": True},
    "decoding": {"poison": False},
    "early": {"reward": slow},
}


def run(fault: str, cell: dict, directory: Path) -> None:
    """Trains a cell of `jobs.py` with a fault of `CASES`."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = CASES[fault]
    trainer = make_trainer(cell, directory / "run", settings.get("reward"))
    if "poison" in settings:
        poison(trainer, settings["poison"])
    error = None
    try:
        trainer.train()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    found = {"error": error, "steps": trainer.state.global_step}
    (directory / f"error_{RANK}.json").write_text(json.dumps(found))
