"""The writes that a revising decoder took back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


NEVER = -1  # step of a position that was never unmasked


@dataclass
class Revisions:
    """
    The writes of `R` responses whose tokens did not stay: they were erased, or another token was written over them. The
    other writes are in the [`TrajectoryBatch`] itself (docs/method.md, section 8).

    A token is visible to the steps after the one that wrote it, up to and including the one that took it back.

    Attributes:
        positions (`Tensor` of shape `(R, X)`): canvas position of each write.
        tokens (`Tensor` of shape `(R, X)`): the token.
        steps (`Tensor` of shape `(R, X)`): denoising step that wrote it; -1 in a column that is padding.
        until (`Tensor` of shape `(R, X)`): denoising step that erased it or wrote another token over it.
        logps (`Tensor` of shape `(R, X)`, float32): log-probability, in nats, that the decoding policy gave the token.
    """

    positions: Tensor
    tokens: Tensor
    steps: Tensor
    until: Tensor
    logps: Tensor

    @classmethod
    def none(cls, rows: int, device: torch.device | str = "cpu") -> Revisions:
        """The revisions of `rows` responses in which every token stayed."""
        empty = torch.zeros(rows, 0, dtype=torch.long, device=device)
        return cls(empty, empty, empty, empty, torch.zeros(rows, 0, device=device))

    @classmethod
    def collect(cls, rows: Tensor, count: int, **columns: Tensor) -> Revisions:
        """
        Sorts a list of writes into one row for each response.

        Args:
            rows (`Tensor` of shape `(writes,)`): response of each write.
            count (`int`): number of responses.
            columns (`Tensor` of shape `(writes,)`): the attributes of this class, for each write.
        """
        order = rows.argsort(stable=True)
        rows = rows[order]
        sizes = torch.bincount(rows, minlength=count)
        places = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[rows]
        width = int(sizes.max()) if len(rows) else 0
        found = cls.none(count, rows.device).widen(width)
        for name, values in columns.items():
            getattr(found, name)[rows, places] = values[order].to(getattr(found, name).dtype)
        return found

    def widen(self, width: int) -> Revisions:
        """A copy with at least `width` columns."""
        more = max(width - self.steps.shape[1], 0)
        return Revisions(
            **{
                field.name: F.pad(getattr(self, field.name), (0, more), value=NEVER if field.name == "steps" else 0)
                for field in fields(self)
            }
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Revisions:
        """A copy with every tensor replaced."""
        return Revisions(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    @classmethod
    def concatenate(cls, parts: list[Revisions]) -> Revisions:
        """Joins the revisions of several batches."""
        width = max(part.steps.shape[1] for part in parts)
        wide = [part.widen(width) for part in parts]
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in wide]) for field in fields(cls)})
