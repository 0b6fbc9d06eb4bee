"""What is shown at each position of a response, step after step."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch

from ..policies.spec import DiffusionSpec
from ..trajectories.revisions import NEVER
from ..trajectories.trajectory import TrajectoryBatch, event_regions, global_steps


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
    stays: list[list[Stay]] = [[] for _ in range(int(one.canvas_lengths[0]))]
    regions = event_regions(spec, one)
    steps = global_steps(regions, one.event_steps)[0]
    before = steps - one.event_steps[0]  # steps of the regions before that of the write
    width, ends = one.canvas_ids.shape[1], [inf] * one.canvas_ids.shape[1]
    if one.revisions is not None:
        ends += (before[width:] + one.revisions.until[0] + 1).tolist()
    writes = zip(
        one.event_positions[0].tolist(),
        one.event_ids[0].tolist(),
        one.event_logps[0].exp().tolist(),
        steps.tolist(),
        ends,
        strict=True,
    )
    for position, token, probability, step, end in writes:
        if step != NEVER:
            stays[position].append(Stay(token, probability, step + 1, end))
    return [sorted(position, key=lambda stay: stay.first) for position in stays]


def last_step(stays: list[list[Stay]]) -> int:
    """Number of denoising steps of a response."""
    known = [step for position in stays for stay in position for step in (stay.first, stay.end) if step < inf]
    return int(max(known, default=0))
