"""What the denoising loop remembers of tokens that were taken back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..trajectories.revisions import Revisions


class History:
    """
    The writes that were taken back so far, by rows and positions of the loop.

    Attributes:
        counts (`np.ndarray`): how often the token of each position was taken back.
        stops (boolean `np.ndarray`): where a stop token is visible.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.counts, self.stops = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        self._places: list[np.ndarray] = []  # rows, positions, steps, until: `(4, n)` for each step
        self._tokens: list[Tensor] = []
        self._logps: list[Tensor] = []

    def add(self, rows, positions, steps, until, tokens: Tensor, logps: Tensor) -> None:
        """Adds what one step took back; all arguments have the same length."""
        self.counts[rows, positions] += 1
        self._places.append(np.stack([rows, positions, steps, until]))
        self._tokens.append(tokens)
        self._logps.append(logps)

    def forget(self, row: int) -> None:
        """Removes what one row has had, so that it can hold another response."""
        self.counts[row], self.stops[row] = 0, False
        if self._places:
            places, tokens, logps = np.concatenate(self._places, 1), torch.cat(self._tokens), torch.cat(self._logps)
            kept = np.flatnonzero(places[0] != row)
            index = torch.from_numpy(kept).to(tokens.device)
            self._places, self._tokens, self._logps = [places[:, kept]], [tokens[index]], [logps[index]]

    def revisions(self, prompt_lengths: np.ndarray, device: torch.device) -> Revisions:
        """All of them, with positions counted in the canvas."""
        if not self._places:
            return Revisions.none(len(prompt_lengths), device)
        rows, positions, steps, until = np.concatenate(self._places, 1)
        places = (torch.from_numpy(one).to(device) for one in (rows, positions - prompt_lengths[rows], steps, until))
        rows, positions, steps, until = places
        tokens, logps = torch.cat(self._tokens), torch.cat(self._logps)
        return Revisions.collect(
            rows, len(prompt_lengths), positions=positions, tokens=tokens, steps=steps, until=until, logps=logps
        )
