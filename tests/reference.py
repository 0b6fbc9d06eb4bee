"""What the method says, written out in plain loops: independent of the package, for the tests to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_diffusion import DiffusionSpec, TrajectoryBatch


def block_of(spec: DiffusionSpec, prompt_length: int, column: int) -> int:
    """Block of a canvas position, counted from the one that holds the first response token."""
    if spec.block_origin == "sequence":
        return (prompt_length + column) // spec.block_size - prompt_length // spec.block_size
    return column // spec.block_size


def writes_that_count(spec: DiffusionSpec, batch: TrajectoryBatch) -> Tensor:
    """
    The writes of a decoding up to the one that settles the completion, `(R, C)`: the decoding is replayed step by step until
    no position of the completion is masked. Of the last step, those of the completion.
    """
    found = torch.zeros(batch.steps.shape, dtype=torch.bool)
    for row in range(len(batch)):
        steps, length = batch.steps[row].tolist(), int(batch.completion_lengths[row])
        prompt_length = int(batch.prompt_lengths[row])
        moments: dict[tuple[int, int], list[int]] = {}  # positions written at each step of each block
        for column, step in enumerate(steps):
            if step >= 0:
                moments.setdefault((block_of(spec, prompt_length, column), step), []).append(column)
        masked = {column for column in range(length) if steps[column] >= 0}
        for moment in sorted(moments):
            if not masked:
                break
            masked -= set(moments[moment])
            counted = moments[moment] if masked else [column for column in moments[moment] if column < length]
            found[row, counted] = True
    return found
