"""
Reductions inside blocks. The block of each position is given as `(R, C)`, numbered from 0. Any other grouping of
positions works in the same way. Values may have dimensions between R and C, such as views, `(R, W, C)`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_blocks(blocks: Tensor) -> int:
    """Largest number of blocks of a response, at least 1."""
    return int(blocks.max()) + 1 if blocks.numel() else 1


def sum_by_block(blocks: Tensor, values: Tensor) -> Tensor:
    """Sum of `values`, `(R, ..., C)`, over each block: `(R, ..., S)`."""
    sums = values.new_zeros(*values.shape[:-1], num_blocks(blocks))
    return sums.scatter_add_(-1, _expand(blocks, values), values)


def max_by_block(blocks: Tensor, values: Tensor) -> Tensor:
    """Maximum of `values`, `(R, ..., C)`, over each block, but at least 0: `(R, ..., S)`."""
    largest = values.new_zeros(*values.shape[:-1], num_blocks(blocks))
    return largest.scatter_reduce_(-1, _expand(blocks, values), values, reduce="amax")


def at_block(blocks: Tensor, values: Tensor) -> Tensor:
    """The value of each position's block: `(R, ..., S)` to `(R, ..., C)`."""
    index = _expand(blocks, values.new_empty(*values.shape[:-1], blocks.shape[-1]))
    return values.gather(-1, index)


def has_in_block(blocks: Tensor, hits: Tensor) -> Tensor:
    """Whether any position in the block of a position has a hit, boolean, `(R, ..., C)`."""
    return at_block(blocks, sum_by_block(blocks, hits.long())) > 0


def rank_in_block(blocks: Tensor, keys: Tensor, taking_part: Tensor) -> Tensor:
    """
    Rank of a position's key among the positions of its block that take part. The smallest key has rank 0. Of equal keys,
    the left one has the lower rank.

    Args:
        blocks (`Tensor` of shape `(R, C)`): block of each position.
        keys (`Tensor` of shape `(R, ..., C)`): keys to sort by.
        taking_part (boolean `Tensor` of the shape of `keys`): other positions get higher ranks.

    Returns:
        `Tensor` of the shape of `keys`.
    """
    blocks = _expand(blocks, keys)
    order = torch.where(taking_part, keys, torch.inf).argsort(dim=-1, stable=True)
    order = order.gather(-1, blocks.gather(-1, order).argsort(dim=-1, stable=True))  # by block, then by key
    places = torch.arange(blocks.shape[-1], device=blocks.device).expand_as(blocks)
    sizes = sum_by_block(blocks, torch.ones_like(blocks))
    starts = sizes.cumsum(-1) - sizes
    return torch.zeros_like(blocks).scatter(-1, order, places) - starts.gather(-1, blocks)


def _expand(blocks: Tensor, values: Tensor) -> Tensor:
    """`(R, C)` as an index for `(R, ..., C)`."""
    return blocks.view(blocks.shape[0], *[1] * (values.dim() - blocks.dim()), *blocks.shape[1:]).expand(values.shape)
