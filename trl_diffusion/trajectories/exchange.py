"""A response and how it was denoised as a JSON object, as a server sends it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from .revisions import Revisions
from .trajectory import TrajectoryBatch


def trajectory_fields(batch: TrajectoryBatch) -> dict[str, Any]:
    """
    The fields of a response (a batch of one) for JSON.

    Returns:
        `dict`: `token_ids`, `steps` and `log_probs` of each position of the canvas (see [`TrajectoryBatch`]),
        `completion_length`, and `revisions`, which is `None` if the decoder takes no token back.
    """
    length = int(batch.canvas_lengths[0])
    found = {
        "token_ids": batch.canvas_ids[0, :length].tolist(),
        "steps": batch.steps[0, :length].tolist(),
        "log_probs": batch.logps[0, :length].tolist(),
        "completion_length": int(batch.completion_lengths[0]),
        "revisions": None,
    }
    if batch.revisions is not None:
        there = batch.revisions.steps[0] >= 0
        found["revisions"] = {name: values[0][there].tolist() for name, values in vars(batch.revisions).items()}
    return found


def trajectory_of_fields(prompt: list[int], values: dict[str, Any]) -> TrajectoryBatch:
    """
    A batch of one from the fields of [`trajectory_fields`].

    Args:
        prompt (`list[int]`): token ids of the prompt.
        values (`dict`): the fields.

    Raises:
        ValueError: if fields are missing, have another form, or contradict each other.
    """
    try:
        tokens, steps, logps = (values[name] for name in ("token_ids", "steps", "log_probs"))
        counted, taken_back = values["completion_length"], values["revisions"]
        if not (len(tokens) == len(steps) == len(logps) and 0 < counted <= len(tokens)):
            raise ValueError(
                f"{len(tokens)} tokens, {len(steps)} steps, {len(logps)} log-probabilities, {counted} that count"
            )
        revisions = None
        if taken_back is not None:
            columns = {one.name: torch.tensor(taken_back[one.name], dtype=torch.float64) for one in fields(Revisions)}
            rows = torch.zeros(len(columns["steps"]), dtype=torch.long)
            revisions = Revisions.collect(rows, 1, **columns)
        return TrajectoryBatch(
            prompt_ids=torch.tensor([prompt]),
            prompt_mask=torch.ones(1, len(prompt), dtype=torch.long),
            canvas_ids=torch.tensor([tokens], dtype=torch.long),
            steps=torch.tensor([steps], dtype=torch.long),
            logps=torch.tensor([logps], dtype=torch.float32),
            canvas_lengths=torch.tensor([len(tokens)]),
            completion_lengths=torch.tensor([counted]),
            revisions=revisions,
        )
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"These are not the fields of a response and its denoising steps ({type(error).__name__}: {error!s:.200})."
        ) from error
