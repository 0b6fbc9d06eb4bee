"""Who looks at whom while sequences of different lengths are denoised side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..policies.attention import Places, RaggedGroup, RaggedMask
from ..policies.spec import DiffusionSpec


@dataclass
class Spans:
    """
    What a forward pass runs: of each of `L` sequences, the tokens at positions `begins` to `ends - 1`, one sequence behind
    the other in one row of `N` tokens. Integer arrays of shape `(L,)`.

    Attributes:
        rows: which response.
        lanes: where it is in the cache.
        heads: position at which its block 0 begins.
        begins, ends: the tokens to run.
        key_ends: how many of its tokens are looked at, from its first on.
    """

    rows: np.ndarray
    lanes: np.ndarray
    heads: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    key_ends: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens to run, `(L,)`."""
        return self.ends - self.begins

    @property
    def offsets(self) -> np.ndarray:
        """Where each sequence begins in the row, `(L,)`."""
        return np.cumsum(self.lengths) - self.lengths

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Sequence, as an index into the `L`, and position of every token of the row, `(N,)` each."""
        sequence = np.repeat(np.arange(len(self.rows)), self.lengths)
        return sequence, np.arange(len(sequence)) - (self.offsets - self.begins)[sequence]


def ragged_mask(spans: Spans, spec: DiffusionSpec, capacity: int | None, num_keys: int, device) -> RaggedMask:
    """
    The attention of a pass over `spans`: with block attention, a token looks at its own block and those before it; with
    full attention at everything.

    Args:
        spans ([`Spans`]): what is run.
        spec ([`DiffusionSpec`]): facts about the policy.
        capacity (`int`, *optional*): slots of a lane, if there is a cache. Without one, the keys are the tokens of the pass.
        num_keys (`int`): slots of the cache, or tokens of the pass.
        device: of the policy.
    """
    groups = []
    for length in np.unique(spans.lengths).tolist():
        members = np.flatnonzero(spans.lengths == length)
        key_ends = spans.key_ends[members]
        width = int(key_ends.max())
        queries = _places(spans.offsets[members], length, length, device)
        keys = queries if capacity is None else _places(spans.lanes[members] * capacity, width, capacity, device)
        allowed = None
        if not _sees_everything(spans, members, spec, width):
            heads, begins, ends = (
                _tensor(values[members], device) for values in (spans.heads, spans.begins, spans.key_ends)
            )
            allowed = _allowed(heads, begins, ends, length, width, spec)
        groups.append(RaggedGroup(queries, keys, allowed))
    return RaggedMask(groups, int(spans.lengths.sum()), num_keys)


def _places(starts: np.ndarray, length: int, size: int, device) -> Places:
    """The first `length` places of pieces of `size` that begin at `starts`; a run if one stands behind the other."""
    together = (np.diff(starts) == size).all()
    run = slice(int(starts[0]), int(starts[-1]) + size) if together else None
    return Places(_tensor(starts[:, None] + np.arange(length), device), run)


def _sees_everything(spans: Spans, members: np.ndarray, spec: DiffusionSpec, width: int) -> bool:
    """Whether each token of these sequences looks at all `width` keys: no mask is needed then."""
    if (spans.key_ends[members] != width).any():
        return False
    # With block attention: nothing that is run is in a block before the last one looked at.
    heads = spans.heads[members]
    last_block = spec.block_start(spec.block_of(width - 1, heads), heads)
    return spec.attention == "full" or bool((spans.begins[members] >= last_block).all())


def _allowed(heads: Tensor, begins: Tensor, key_ends: Tensor, length: int, width: int, spec: DiffusionSpec) -> Tensor:
    """Boolean `(sequences, 1, length, width)`, from arguments of shape `(sequences,)`."""
    keys = torch.arange(width, device=heads.device)
    allowed = (keys < key_ends[:, None])[:, None, None, :].expand(-1, 1, length, -1)
    if spec.attention == "full":
        return allowed.contiguous()
    queries = begins[:, None] + torch.arange(length, device=heads.device)
    of_keys, of_queries = (spec.block_of(positions, heads[:, None]) for positions in (keys, queries))
    return allowed & (of_keys[:, None, None, :] <= of_queries[:, None, :, None])


def _tensor(values: np.ndarray, device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device, non_blocking=True)
