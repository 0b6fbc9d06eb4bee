"""Attention masks for sequences of different lengths that are denoised in one row."""

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
    The tokens that a forward pass runs. It runs positions `begins` to `ends - 1` of each of `L` sequences, concatenated in
    one row of `N` tokens. All attributes are integer arrays of shape `(L,)`.

    Attributes:
        rows: index of the response.
        lanes: its lane in the cache.
        heads: first position of its block 0.
        starts: first position of its active block; tokens before it are clean.
        begins, ends: range of the tokens to run.
        key_ends: number of its first tokens that are visible.
    """

    rows: np.ndarray
    lanes: np.ndarray
    heads: np.ndarray
    starts: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    key_ends: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens to run, `(L,)`."""
        return self.ends - self.begins

    @property
    def offsets(self) -> np.ndarray:
        """First column of each sequence in the row, `(L,)`."""
        return np.cumsum(self.lengths) - self.lengths

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Index of the sequence, and position in it, of every token of the row, `(N,)` each."""
        sequence = np.repeat(np.arange(len(self.rows)), self.lengths)
        return sequence, np.arange(len(sequence)) - (self.offsets - self.begins)[sequence]


def ragged_mask(spans: Spans, spec: DiffusionSpec, capacity: int | None, num_keys: int, device) -> RaggedMask:
    """
    The attention mask of a pass over `spans`. With block attention, a token sees its own block and earlier blocks, or, if it
    is clean and the clean part is causal, itself and earlier tokens. With full attention, it sees all tokens.

    Args:
        spans ([`Spans`]): the tokens that are run.
        spec ([`DiffusionSpec`]): facts about the policy.
        capacity (`int`, *optional*): slots of a lane of the cache. Without a cache, the keys are the tokens of the pass.
        num_keys (`int`): slots of the cache, or tokens of the pass.
        device: device of the policy.
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
            heads, starts, begins, ends = (
                _tensor(values[members], device)
                for values in (spans.heads, spans.starts, spans.begins, spans.key_ends)
            )
            allowed = _allowed(heads, starts, begins, ends, length, width, spec)
        groups.append(RaggedGroup(queries, keys, allowed))
    return RaggedMask(groups, int(spans.lengths.sum()), num_keys)


def _places(starts: np.ndarray, length: int, size: int, device) -> Places:
    """The first `length` places of pieces of `size` that begin at `starts`. A slice if the pieces are contiguous."""
    together = (np.diff(starts) == size).all()
    run = slice(int(starts[0]), int(starts[-1]) + size) if together else None
    return Places(_tensor(starts[:, None] + np.arange(length), device), run)


def _sees_everything(spans: Spans, members: np.ndarray, spec: DiffusionSpec, width: int) -> bool:
    """Whether each token of these sequences sees all `width` keys, so that no mask is needed."""
    if (spans.key_ends[members] != width).any():
        return False
    # With block attention: no token that is run has a lower rank than the last visible one.
    heads, starts = spans.heads[members], spans.starts[members]
    first, last = (spec.rank(place, heads, place >= starts) for place in (spans.begins[members], width - 1))
    return spec.attention == "full" or bool((first >= last).all())


def _allowed(
    heads: Tensor, starts: Tensor, begins: Tensor, key_ends: Tensor, length: int, width: int, spec: DiffusionSpec
) -> Tensor:
    """Boolean `(sequences, 1, length, width)`, from arguments of shape `(sequences,)`."""
    keys = torch.arange(width, device=heads.device)
    allowed = (keys < key_ends[:, None])[:, None, None, :].expand(-1, 1, length, -1)
    if spec.attention == "full":
        return allowed.contiguous()
    queries = begins[:, None] + torch.arange(length, device=heads.device)
    of_keys, of_queries = (spec.rank(places, heads[:, None], places >= starts[:, None]) for places in (keys, queries))
    return allowed & (of_keys[:, None, None, :] <= of_queries[:, None, :, None])


def _tensor(values: np.ndarray, device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device, non_blocking=True)
