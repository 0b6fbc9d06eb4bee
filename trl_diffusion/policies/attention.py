"""
Attention of our own shapes, each described by a *plan* that a model of transformers carries to its layers:

- packed: clean tokens and noisy copies in one row, and parts that share a prefix and do not see each other;
- ragged: sequences of any lengths, one after another in a single row, without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


PLANNED = "trl_diffusion_planned"
PLANNED_FLEX = "trl_diffusion_planned_flex"
PLANNED_FOR = {"sdpa": PLANNED, "flex_attention": PLANNED_FLEX}


class AttentionPlan(Protocol):
    """Which token sees which in a forward pass, and how attention is computed without the other pairs."""

    def dense(self) -> Tensor:
        """The same as one boolean mask of shape `(R, 1, N, keys)`, for attention implementations that take only that."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        """
        Attention under this plan.

        Args:
            module (`nn.Module`): the attention layer.
            query (`Tensor` of shape `(R, H, N, d)`): queries.
            key, value (`Tensor` of shape `(R, H_kv, keys, d)`): keys and values.

        Returns:
            `Tensor` of shape `(R, N, H, d)`.
        """


@dataclass
class PackedMask:
    """
    Which token sees which in rows `[ prefix | parts of equal width ]`. The prefix and the parts hold clean tokens, and
    noisy copies of blocks (docs/method.md, section 2):

        clean token    sees clean tokens of its own rank and of lower ones
        noisy token    sees clean tokens of lower ranks, and its own copy
        part           sees the prefix and itself; the prefix sees itself

    No token sees padding, except that every token sees itself, so that no row of the softmax is empty.

    The rank is the block, or with a causal clean part the position ([`DiffusionSpec.rank`]).

    Attributes:
        ranks (`Tensor` of shape `(Q, N)`): rank of each token. Tokens of the prefix have lower ranks than those of the parts.
        copies (`Tensor` of shape `(N,)` or `(Q, N)`): the noisy copy that a column belongs to, 0 for clean tokens.
        valid (boolean `Tensor` of shape `(Q, N)`): False for padding.
        prefix (`int`): length of the prefix.
        count (`int`): number of parts of equal width.
        documents (`Tensor` of shape `(Q, N)`, *optional*): number of the part of each token, from 1, for rows of parts of
            any width. There is no prefix then.
    """

    ranks: Tensor
    copies: Tensor
    valid: Tensor
    prefix: int = 0
    count: int = 1
    documents: Tensor | None = None

    @cached_property
    def parts(self) -> Tensor:
        """The part of each column, `(N,)` or `(Q, N)`: 0 for the prefix."""
        if self.documents is not None:
            return self.documents
        size = self.ranks.shape[1]
        columns = torch.arange(size, device=self.ranks.device) - self.prefix
        return (columns.clamp(min=-1) // max((size - self.prefix) // self.count, 1) + 1).clamp(max=self.count)

    def allowed(self, queries: slice, keys: slice) -> Tensor:
        """Which tokens see which among some of the columns, boolean, `(Q, 1, queries, keys)`."""
        columns = torch.arange(self.ranks.shape[1], device=self.ranks.device)

        def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
            return values[..., queries, None], values[..., None, keys]

        valid = self.valid[..., None, keys]
        return _may_look(pairs(self.ranks), pairs(self.copies), pairs(self.parts), pairs(columns), valid)[:, None]

    def dense(self) -> Tensor:
        """The same as one boolean mask of shape `(Q, 1, N, N)`."""
        return self.allowed(slice(None), slice(None))

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        """Masks of the prefix, `(Q, 1, prefix, prefix)`, and of each part, `(Q * parts, 1, width, prefix + width)`, whose keys are
        those of the prefix and of the part."""
        size, length = self.ranks.shape[1], self.prefix
        width = (size - length) // self.count
        starts = range(length, length + self.count * width, width) if width else [length] * self.count
        parts = [
            torch.cat(
                [self.allowed(slice(at, at + width), keys) for keys in (slice(length), slice(at, at + width))], -1
            )
            for at in starts
        ]
        return self.allowed(slice(length), slice(length)), torch.stack(parts, 1).flatten(0, 1)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        """Attention of the prefix over itself, and of each part over the prefix and itself, in place of the whole row."""
        (of_prefix, of_parts), length, count = self._split, self.prefix, self.count
        if length == 0 and count == 1:
            return sdpa_attention_forward(module, query, key, value, of_parts, **kwargs)[0]

        def split(
            values: Tensor,
        ) -> tuple[Tensor, Tensor]:  # (Q, H, N, d) -> (Q, H, prefix, d), (Q * parts, H, width, d)
            parts = values[:, :, length:].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)
            return values[:, :, :length], parts

        def with_prefix(values: Tensor) -> Tensor:
            prefix, parts = split(values)
            return torch.cat([prefix.repeat_interleave(count, 0), parts], 2)

        (prefix_query, part_query), (prefix_key, _), (prefix_value, _) = split(query), split(key), split(value)
        prefix_out, _ = sdpa_attention_forward(
            module, prefix_query, prefix_key, prefix_value, of_prefix, **kwargs
        )  # (Q, prefix, H, d)
        part_out, _ = sdpa_attention_forward(
            module, part_query, with_prefix(key), with_prefix(value), of_parts, **kwargs
        )  # (Q * parts, width, H, d)
        return torch.cat([prefix_out, part_out.unflatten(0, (-1, count)).flatten(1, 2)], 1)

    @cached_property
    def block_mask(self) -> BlockMask:
        """
        The same for FlexAttention, without a mask of shape `(N, N)`. Rows are padded to the length of their [`bucket`], and
        their number to the next power of two. One kernel is then compiled for a bucket, and not one for each shape.
        """
        rows, columns = _missing(*self.ranks.shape)
        ranks = functional.pad(self.ranks, (0, columns, 0, rows), value=_BELOW_ALL)  # looks at nothing but itself
        valid = functional.pad(self.valid, (0, columns, 0, rows))
        copies, parts = (
            functional.pad(values, (0, columns, 0, rows) if values.dim() == 2 else (0, columns))
            for values in (self.copies, self.parts)
        )
        padded = PackedMask(ranks, copies, valid)
        vars(padded)["parts"] = parts
        tiles = []
        for start in range(0, ranks.shape[1], TILE):
            row = padded.allowed(slice(start, start + TILE), slice(None)).unflatten(
                -1, (-1, TILE)
            )  # (Q, 1, tile, tiles, tile)
            tiles.append(torch.stack([row.any(-1).any(-2), row.all(-1).all(-2)]))
        some, whole = torch.stack(tiles, 3)  # (Q, 1, tiles, tiles)

        def look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            def pair(values: Tensor) -> tuple[Tensor, Tensor]:
                of_row = values[row] if values.dim() == 2 else values
                return of_row[query], of_row[key]

            return _may_look(pair(ranks), pair(copies), pair(parts), (query, key), valid[row, key])

        return BlockMask.from_kv_blocks(*_numbered(some & ~whole), *_numbered(whole), BLOCK_SIZE=TILE, mask_mod=look)

    def attend_flex(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        dropout: float = 0.0,
        compiled: bool = True,
        **kwargs,
    ) -> Tensor:
        """
        As `attend`, by FlexAttention.

        Raises:
            ValueError: with dropout, which FlexAttention does not have.
        """
        if dropout:
            raise ValueError(
                f"FlexAttention has no dropout, but the policy's config has attention_dropout={dropout}. Set it to 0, or load "
                "the policy with attn_implementation='sdpa'."
            )
        if torch.is_autocast_enabled(query.device.type):
            precision = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(precision), key.to(precision), value.to(precision)
        count, length = query.shape[0], query.shape[2]
        rows, columns = _missing(count, length)
        # Contiguous even without padding, because the kernel is compiled for contiguous strides.
        padding = (0, 0, 0, columns, 0, 0, 0, rows)
        query, key, value = (functional.pad(values, padding).contiguous() for values in (query, key, value))
        attention: Callable = flex_attention
        if compiled:
            attention = _compiled_flex_attention()
        with torch._dynamo.config.patch(recompile_limit=64):  # for each bucket, with and without a gradient
            out = attention(query, key, value, block_mask=self.block_mask, scale=scaling, enable_gqa=True)
        return out[:count, :, :length].transpose(1, 2)


_BELOW_ALL = -(1 << 30)
TILE = 128  # side of the squares that FlexAttention computes or leaves out


def bucket(length: int) -> int:
    """The length that FlexAttention runs with: `length`, rounded up to a multiple of `TILE`. Above 8 tiles it is rounded up
    further, so that there are four lengths between two powers of two, and it grows by less than a quarter."""
    step = max(TILE, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def _missing(rows: int, columns: int) -> tuple[int, int]:
    """Numbers of rows and columns that are added for the shape that FlexAttention runs with."""
    return (1 << max(rows - 1, 0).bit_length()) - rows, bucket(columns) - columns


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _numbered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The number of tiles that are set in each row, and the numbers of all tiles, those that are set first."""
    numbers = (~tiles).long().sort(dim=-1, stable=True).indices
    return tiles.sum(-1).int(), numbers.int()


def _may_look(
    ranks: tuple[Tensor, Tensor],
    copies: tuple[Tensor, Tensor],
    parts: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    valid: Tensor,
) -> Tensor:
    """The rule of [`PackedMask`]. Each pair holds values of the token that sees (the query) and of the one that is seen (the
    key). `valid` is that of the key."""
    clean = copies[1] == 0
    same_copy = copies[0] == copies[1]
    backwards = (ranks[1] < ranks[0]) | ((ranks[1] == ranks[0]) & same_copy)
    reachable = (parts[1] == 0) | (parts[0] == parts[1])
    return (torch.where(clean, backwards, same_copy) & reachable & valid) | (columns[0] == columns[1])


@dataclass
class Places:
    """
    Places in a row of the tokens of some sequences, `n` of each.

    Attributes:
        numbers (`Tensor` of shape `(sequences, n)`): the places.
        run (`slice`, *optional*): set if the sequences lie in pieces of equal size, one after another: the part of the row that
            the pieces make up. The `n` places of a sequence are the first ones of its piece.
    """

    numbers: Tensor
    run: slice | None = None

    def of(self, values: Tensor) -> Tensor:
        """The entries of `values`, `(H, N, d)`, at these places: `(sequences, H, n, d)`. A view if there is a `run`."""
        if self.run is None:
            return values[:, self.numbers].transpose(0, 1)
        count, length = self.numbers.shape
        return values[:, self.run].unflatten(1, (count, -1))[:, :, :length].transpose(0, 1)


@dataclass
class RaggedGroup:
    """
    Sequences that have the same number `n` of tokens in this pass.

    Attributes:
        queries ([`Places`]): places of their tokens in the row, `n` for each sequence.
        keys ([`Places`]): places of their keys among all keys. Each sequence gets as many as the one that needs most.
        allowed (boolean `Tensor` of shape `(sequences, 1, n, keys)`, *optional*): which tokens see which keys. `None` if every
            token sees all keys.
    """

    queries: Places
    keys: Places
    allowed: Tensor | None


@dataclass
class RaggedMask:
    """
    Sequences of any lengths, one after another in a single row, without padding. Attention is computed together for sequences
    with the same number of tokens.

    Attributes:
        groups (`list[RaggedGroup]`): every token of the row is in exactly one group.
        num_queries (`int`): number of tokens of the row.
        num_keys (`int`): number of keys, those of a cache included.
    """

    groups: list[RaggedGroup]
    num_queries: int
    num_keys: int

    def dense(self) -> Tensor:
        device = self.groups[0].queries.numbers.device
        mask = torch.zeros(self.num_queries, self.num_keys, dtype=torch.bool, device=device)
        for group in self.groups:
            queries, keys = group.queries.numbers, group.keys.numbers
            allowed = queries.new_ones(()).bool() if group.allowed is None else group.allowed[:, 0]
            mask[queries[:, :, None], keys[:, None, :]] = allowed
        return mask[None, None]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        out: Tensor | None = None  # in the type that attention gives, which under autocast is not that of the query
        for group in self.groups:
            part = _attend_by_key_heads(
                group.queries.of(query[0]), group.keys.of(key[0]), group.keys.of(value[0]), group.allowed, **kwargs
            )  # (sequences, n, H, d)
            if out is None:
                out = part.new_empty(self.num_queries, query.shape[1], value.shape[-1])
            out[group.queries.numbers] = part
        assert out is not None  # there is at least one group
        return out[None]


def _attend_by_key_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> Tensor:
    """
    Scaled dot-product attention in which query heads that share keys and values are concatenated into more queries of one head.
    With a mask, SDPA would need a copy of keys and values for each query head. In a decoding step, with few queries and many
    keys, that copy takes longer than the attention.

    Args:
        query (`Tensor` of shape `(sequences, H, n, d)`): queries.
        key, value (`Tensor` of shape `(sequences, H_kv, keys, d)`): keys and values.
        allowed (boolean `Tensor` of shape `(sequences, 1, n, keys)`, *optional*): which tokens see which keys.

    Returns:
        `Tensor` of shape `(sequences, n, H, d)`.
    """
    sharing = query.shape[1] // key.shape[1]
    out = functional.scaled_dot_product_attention(
        query.unflatten(1, (-1, sharing)).flatten(2, 3),
        key,
        value,
        attn_mask=None if allowed is None else allowed.repeat(1, 1, sharing, 1),
        dropout_p=dropout,
        scale=scaling,
    )  # (sequences, H_kv, H / H_kv * n, d)
    return out.unflatten(2, (sharing, -1)).flatten(1, 2).transpose(1, 2)


_WITHOUT_PLANS: WeakSet[PreTrainedModel] = WeakSet()


def backbone(model: nn.Module) -> PreTrainedModel:
    """
    The model of transformers inside all wrappers (DDP, DeepSpeed, PEFT).

    Raises:
        TypeError: if there is none.
    """
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"A policy must be a model of transformers, or hold one; got {type(model).__name__}.")
    return found


def enable_plans(model: nn.Module) -> bool:
    """
    Lets a model that runs on `sdpa` or `flex_attention` take an [`AttentionPlan`]. A pass without a plan is computed with SDPA.

    Returns:
        `bool`: whether the model takes plans. If not, it needs the masks of [`AttentionPlan.dense`].
    """
    base = backbone(model)
    implementation = base.config._attn_implementation
    if base in _WITHOUT_PLANS:
        if implementation in ("flex_attention", *PLANNED_FOR.values()):
            base.set_attn_implementation("sdpa")
        return False
    if implementation in PLANNED_FOR:
        base.set_attn_implementation(PLANNED_FOR[implementation])
        implementation = base.config._attn_implementation
    return implementation in PLANNED_FOR.values()


def refuse_plans(model: nn.Module) -> None:
    """Makes [`enable_plans`] refuse this model from now on, because its layers do not pass a plan on to their attention."""
    _WITHOUT_PLANS.add(backbone(model))


@contextmanager
def plans_enabled(model: nn.Module):
    """As [`enable_plans`], inside this context only."""
    base = backbone(model)
    before = base.config._attn_implementation
    enable_plans(model)
    try:
        yield
    finally:
        refused = base in _WITHOUT_PLANS and before in PLANNED_FOR.values()
        if base.config._attn_implementation != before and not refused:
            base.set_attn_implementation(before)


def planned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attention_plan: AttentionPlan | None = None,
    flex: bool = False,
    **kwargs,
) -> tuple[Tensor, None]:
    """
    Scaled dot-product attention, under a plan if there is one. Shapes are those of transformers' functions. With `flex`, packed
    rows on a GPU are computed with FlexAttention, if heads have at least 16 dimensions.

    Raises:
        ValueError: for a model whose attention has other terms (`softcap`, `s_aux`, `position_bias`), or that does not pass the
            plan on to its layers.
    """
    more = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if more:
        raise ValueError(
            f"{type(module).__name__} computes its attention with `{more[0]}`, which scaled dot-product attention leaves "
            "out. Load the model with attn_implementation='eager'."
        )
    if attention_plan is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) != (1, 1, query.shape[2], key.shape[2]):
            raise ValueError(f"{type(module).__name__} was not given the attention plan of this pass.")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if (
        flex
        and isinstance(attention_plan, PackedMask)
        and query.is_cuda
        and min(query.shape[-1], value.shape[-1]) >= 16
    ):
        return attention_plan.attend_flex(module, query, key, value, **kwargs), None
    return attention_plan.attend(module, query, key, value, **kwargs), None


AttentionInterface.register(PLANNED, planned_attention)
AttentionInterface.register(PLANNED_FLEX, partial(planned_attention, flex=True))
for _name in (PLANNED, PLANNED_FLEX):
    AttentionMaskInterface.register(_name, sdpa_mask)
