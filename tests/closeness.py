"""
How close two results must be that are equal but for rounding, whichever processor computes them.

Processors sum in the order that suits their vector units, and kernels are chosen by the shapes of a batch, so two ways to
compute the same number in float32 differ by some units in the last place (6e-8) of the largest terms, and more with every
layer: by 1e-5 of them at most, in the policies of these tests. A wrong state makes a difference of a tenth and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


# Log-probabilities of the same token in the same state, or losses made of them, differ by less (nats).
ROUNDING = 1e-4


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Logits, log-probabilities, losses or weights that differ by rounding alone."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, atol=5e-5 * scale, rtol=0)


def assert_close_gradients(found: Tensor, expected: Tensor) -> None:
    """Gradients that differ by rounding alone. What cancels out in one entry is as large as the largest entry."""
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


def close_to(expected: Any) -> Any:
    """What `pytest.approx` makes of a number, or a list of them, that differs by rounding alone."""
    return pytest.approx(expected, abs=5e-5, rel=5e-5)
