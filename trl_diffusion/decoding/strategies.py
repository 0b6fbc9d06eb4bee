"""Which masked positions of the active block to unmask. Each strategy is one small function."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import DecodingConfig


def by_confidence(confidence: Tensor, masked: Tensor, config: DecodingConfig) -> Tensor:
    """
    The `tokens_per_step` masked positions with the highest confidence; ties go to the left.

    Args:
        confidence (`Tensor` of shape `(R, B)`): probability of the sampled token.
        masked (boolean `Tensor` of shape `(R, B)`): positions that may be unmasked.
        config ([`DecodingConfig`]): settings.

    Returns:
        Boolean `Tensor` of shape `(R, B)`: a subset of `masked`, not empty in a row where `masked` is not.
    """
    ranks = confidence.masked_fill(~masked, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(masked)
    chosen.scatter_(1, ranks[:, : config.tokens_per_step], True)
    return chosen & masked


def by_threshold(confidence: Tensor, masked: Tensor, config: DecodingConfig) -> Tensor:
    """Every masked position whose confidence is above `threshold`, and always the best one. Shapes as above."""
    best = confidence.masked_fill(~masked, -torch.inf).argmax(1, keepdim=True)
    chosen = confidence > config.threshold
    chosen.scatter_(1, best, True)
    return chosen & masked


SELECT = {"confidence": by_confidence, "threshold": by_threshold}
