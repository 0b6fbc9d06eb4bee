"""What is shown at each position of a response, step after step."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch

from ..policies.spec import DiffusionSpec
from ..trajectories.trajectory import NEVER, TrajectoryBatch, global_steps, response_blocks


class Stay(NamedTuple):
    """
    A token at a position, from the step that wrote it until the step that erased it. Steps are counted through all blocks,
    from 1; after step 0 everything is masked.

    Attributes:
        token (`int`): the token.
        probability (`float`): probability that the policy gave it when it was written; NaN if nobody recorded it.
        first (`int`): the step that wrote it.
        end (`float`): the step that erased it or wrote another token over it; infinity if it stayed.
    """

    token: int
    probability: float
    first: int
    end: float = inf

    def is_shown(self, step: int) -> bool:
        """Whether the token is there after a step."""
        return self.first <= step < self.end


def response_stays(batch: TrajectoryBatch, spec: DiffusionSpec, row: int) -> list[list[Stay]]:
    """For each canvas position of a response, the tokens that were written there, in their order. A position that was never
    unmasked has none."""
    one = batch.select(torch.tensor([row])).to("cpu")
    length = int(one.canvas_lengths[0])
    blocks = response_blocks(spec, one.prompt_lengths, length)
    steps = global_steps(blocks, one.steps[:, :length])[0].tolist()
    probabilities = one.logps[0, :length].exp().tolist()
    ids = one.canvas_ids[0, :length].tolist()
    return [
        [] if step == NEVER else [Stay(token, probability, step + 1)]
        for token, probability, step in zip(ids, probabilities, steps, strict=True)
    ]


def last_step(stays: list[list[Stay]]) -> int:
    """Number of denoising steps of a response."""
    known = [step for position in stays for stay in position for step in (stay.first, stay.end) if step < inf]
    return int(max(known, default=0))
