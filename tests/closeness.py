"""
How close two results must be that are equal but for rounding, whichever processor computes them.

Processors sum in the order that suits their vector units, and kernels are chosen by the shapes of a batch, so two ways to
compute the same number in float32 differ by a few units in the last place of the largest term. The logits of the policies
here are of the order of 10, and log-probabilities differ by up to 1e-5. A wrong state moves them by 1e-3 and more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


# Log-probabilities of the same token in the same state, or losses made of them, differ by less (nats).
ROUNDING = 1e-4


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Log-probabilities, logits or losses that differ by rounding alone."""
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def assert_close_gradients(found: Tensor, expected: Tensor) -> None:
    """Gradients that differ by rounding alone. What cancels out in one entry is as large as the largest entry."""
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


def close_to(expected: Any) -> Any:
    """What `pytest.approx` makes of a number, or a list of them, that differs by rounding alone."""
    return pytest.approx(expected, abs=5e-5, rel=1e-5)
