"""The batches that TRL passes to the loss: a rollout, shuffled and split."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..trajectories.revisions import Revisions
from ..trajectories.trajectory import TrajectoryBatch


_REVISED = "revised_"  # prefix of the columns with the writes that were taken back


def is_rows(value: Any) -> bool:
    """Whether this entry of a batch has one row for each response (or group)."""
    return isinstance(value, Tensor) and value.dim() > 0


def ungroup(inputs: dict[str, Any]) -> dict[str, Any]:
    """A copy of the batch with one row for each response, also if its rows were groups."""
    if inputs["prompt_ids"].dim() == 2:
        return dict(inputs)
    return {key: value.flatten(0, 1) if is_rows(value) else value for key, value in inputs.items()}


def columns_of(trajectories: TrajectoryBatch) -> dict[str, Tensor]:
    """What a batch says about trajectories beside TRL's own tensors."""
    columns = {
        "canvas_ids": trajectories.canvas_ids,
        "canvas_steps": trajectories.steps,
        "canvas_logps": trajectories.logps,
        "canvas_lengths": trajectories.canvas_lengths,
    }
    if trajectories.revisions is not None:
        columns |= {_REVISED + name: values for name, values in vars(trajectories.revisions).items()}
    return columns


def trajectories_of(inputs: dict[str, Any]) -> TrajectoryBatch:
    """The trajectories of a batch, which has the columns of [`columns_of`]."""
    revised = {key.removeprefix(_REVISED): value for key, value in inputs.items() if key.startswith(_REVISED)}
    return TrajectoryBatch(
        prompt_ids=inputs["prompt_ids"],
        prompt_mask=inputs["prompt_mask"],
        canvas_ids=inputs["canvas_ids"],
        steps=inputs["canvas_steps"],
        logps=inputs["canvas_logps"],
        canvas_lengths=inputs["canvas_lengths"],
        completion_lengths=inputs["completion_mask"].long().sum(1),
        revisions=Revisions(**revised) if revised else None,
    )
