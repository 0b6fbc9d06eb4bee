"""Which masked positions of the active block to unmask. Each strategy is one small function."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import DecodingConfig


def by_confidence(confidence: Tensor, candidates: Tensor, quota: Tensor, config: DecodingConfig) -> Tensor:
    """
    The candidates with the highest confidence, as many as the quota allows; ties go to the left.

    Args:
        confidence (`Tensor` of shape `(R, B)`): probability of the sampled token.
        candidates (boolean `Tensor` of shape `(R, B)`): positions that may be unmasked.
        quota (`Tensor` of shape `(R,)`): how many to unmask.
        config ([`DecodingConfig`]): settings.

    Returns:
        Boolean `Tensor` of shape `(R, B)`, a subset of `candidates`.
    """
    order = confidence.masked_fill(~candidates, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (ranks < quota[:, None]) & candidates


def by_threshold(confidence: Tensor, candidates: Tensor, quota: Tensor, config: DecodingConfig) -> Tensor:
    """Every candidate whose confidence is above `threshold`, and always the best one. Shapes as above."""
    best = confidence.masked_fill(~candidates, -torch.inf).argmax(1, keepdim=True)
    chosen = confidence > config.threshold
    chosen.scatter_(1, best, True)
    return chosen & candidates


SELECT = {"confidence": by_confidence, "threshold": by_threshold}


def quota_at(step: int, total: Tensor, left: Tensor, config: DecodingConfig) -> Tensor:
    """
    How many positions step `step` of a block unmasks.

    Args:
        step (`int`): step of the schedule, counted from 0.
        total (`Tensor` of shape `(R,)`): positions of the block that were masked before its first step.
        left (`Tensor` of shape `(R,)`): positions that still are.
        config ([`DecodingConfig`]): settings.

    Returns:
        Integer `Tensor` of shape `(R,)`.
    """
    steps = config.steps_per_block
    if steps is None or config.strategy == "threshold":
        return torch.full_like(left, config.tokens_per_step)
    if config.schedule == "even":
        return total // steps + (step < total % steps)
    if step >= steps - 1:
        return left
    times = torch.linspace(1, 1e-3, steps + 1, device=left.device)
    return (left * (1 - times[step + 1] / times[step])).long()


def leftmost_part(masked: Tensor, size: int | None) -> Tensor:
    """The masked positions of the leftmost part, of `size` positions, that still has any. Shape `(R, B)`."""
    if size is None:
        return masked
    parts = torch.arange(masked.shape[1], device=masked.device) // size
    first = torch.where(masked, parts, masked.shape[1]).min(1, keepdim=True).values
    return masked & (parts == first)
