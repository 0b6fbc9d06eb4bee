"""
Attention of our own shapes, each described by a *plan* that a model of transformers carries to its layers:

- in segments: parts of a row that share what comes before them and do not see each other;
- ragged: sequences of any lengths, one behind the other in a single row, without padding.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


PLANNED = "trl_diffusion_planned"


class AttentionPlan(Protocol):
    """Who looks at whom in a forward pass, and how to compute it without the pairs that do not look at each other."""

    def dense(self) -> Tensor:
        """The same as one boolean mask of shape `(R, 1, N, K)`, for attention implementations that take only that."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        """
        Attention under this plan.

        Args:
            module (`nn.Module`): the attention layer.
            query (`Tensor` of shape `(R, H, N, D)`): queries.
            key, value (`Tensor` of shape `(R, H_kv, K, D)`): keys and values.

        Returns:
            `Tensor` of shape `(R, N, H, D)`.
        """


@dataclass
class SegmentedMask:
    """
    Who may look at whom in rows `[ prefix of P tokens | G segments of W tokens each ]`. A segment sees the prefix and
    itself, the prefix sees itself.

    Attributes:
        prefix (boolean `Tensor` of shape `(Q, 1, P, P)`): inside the prefix.
        segments (boolean `Tensor` of shape `(Q * G, 1, W, P + W)`): from a segment to the prefix and to itself.
        count (`int`): number of segments `G`.
    """

    prefix: Tensor
    segments: Tensor
    count: int

    def dense(self) -> Tensor:
        """The same as one boolean mask of shape `(Q, 1, N, N)`, `N = P + G * W`."""
        rows, _, width, _ = self.segments.shape
        rows, length = rows // self.count, self.prefix.shape[-1]
        size = length + self.count * width
        mask = torch.zeros(rows, 1, size, size, dtype=torch.bool, device=self.prefix.device)
        mask[:, :, :length, :length] = self.prefix
        segments = self.segments.unflatten(0, (rows, self.count))
        for index in range(self.count):
            here = slice(length + index * width, length + (index + 1) * width)
            mask[:, :, here, :length] = segments[:, index, :, :, :length]
            mask[:, :, here, here] = segments[:, index, :, :, length:]
        return mask

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        """The prefix, and each segment over the prefix and itself, instead of the whole row over itself."""
        length, count = self.prefix.shape[-1], self.count

        def split(values: Tensor) -> tuple[Tensor, Tensor]:  # (Q, H, N, D) -> (Q, H, P, D), (Q * G, H, W, D)
            segments = values[:, :, length:].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)
            return values[:, :, :length], segments

        def with_prefix(values: Tensor) -> Tensor:
            prefix, segments = split(values)
            return torch.cat([prefix.repeat_interleave(count, 0), segments], 2)

        (prefix_query, segment_query), (prefix_key, _), (prefix_value, _) = split(query), split(key), split(value)
        before, _ = sdpa_attention_forward(
            module, prefix_query, prefix_key, prefix_value, self.prefix, **kwargs
        )  # (Q, P, H, D)
        behind, _ = sdpa_attention_forward(
            module, segment_query, with_prefix(key), with_prefix(value), self.segments, **kwargs
        )  # (Q * G, W, H, D)
        return torch.cat([before, behind.unflatten(0, (-1, count)).flatten(1, 2)], 1)


@dataclass
class RaggedGroup:
    """
    `G` sequences that have the same number `n` of tokens in this pass, and look at `K` keys at most.

    Attributes:
        queries (`Tensor` of shape `(G, n)`): where their tokens are in the row.
        keys (`Tensor` of shape `(G, K)`): where their keys are among all keys.
        allowed (boolean `Tensor` of shape `(G, 1, n, K)`): who may look at whom. `None`: everything at everything.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor | None


@dataclass
class RaggedMask:
    """
    Sequences of any lengths, one behind the other in a single row: no token is padding. Sequences with the same number
    of tokens are attended to together.

    Attributes:
        groups (`list[RaggedGroup]`): every token of the row is in exactly one group.
        num_queries (`int`): tokens of the row.
        num_keys (`int`): keys, those of a cache included.
    """

    groups: list[RaggedGroup]
    num_queries: int
    num_keys: int

    def dense(self) -> Tensor:
        mask = torch.zeros(self.num_queries, self.num_keys, dtype=torch.bool, device=self.groups[0].queries.device)
        for group in self.groups:
            allowed = group.queries.new_ones(()).bool() if group.allowed is None else group.allowed[:, 0]
            mask[group.queries[:, :, None], group.keys[:, None, :]] = allowed
        return mask[None, None]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        out = None  # in the type that attention gives, which under autocast is not that of the query
        for group in self.groups:
            part, _ = sdpa_attention_forward(
                module,
                query[0][:, group.queries].transpose(0, 1),
                key[0][:, group.keys].transpose(0, 1),
                value[0][:, group.keys].transpose(0, 1),
                group.allowed,
                **{**kwargs, "is_causal": False},
            )  # (G, n, H, D)
            if out is None:
                out = part.new_empty(self.num_queries, query.shape[1], value.shape[-1])
            out[group.queries] = part
        return out[None]


def enable_plans(model: nn.Module) -> bool:
    """
    Lets a model that runs on `sdpa` take an [`AttentionPlan`]; anything else it computes as before.

    Returns:
        `bool`: whether the model can.
    """
    implementation = model.config._attn_implementation
    if implementation == "sdpa":
        model.set_attn_implementation(PLANNED)
        implementation = model.config._attn_implementation
    return implementation == PLANNED


@contextmanager
def plans_enabled(model: nn.Module):
    """As [`enable_plans`], inside this context only."""
    before = model.config._attn_implementation
    enable_plans(model)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def planned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attention_plan: AttentionPlan | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, under a plan if there is one. Shapes are those of transformers' functions."""
    if attention_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attention_plan.attend(module, query, key, value, **kwargs), None


AttentionInterface.register(PLANNED, planned_attention)
AttentionMaskInterface.register(PLANNED, sdpa_mask)
