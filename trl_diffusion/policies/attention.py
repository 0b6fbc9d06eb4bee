"""Attention in segments: parts of a row that share what comes before them and do not see each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


SEGMENTED = "trl_diffusion_segmented"


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


def enable_segments(model: nn.Module) -> bool:
    """
    Lets a model that runs on `sdpa` take a [`SegmentedMask`]; anything else it computes as before.

    Returns:
        `bool`: whether the model can.
    """
    implementation = model.config._attn_implementation
    if implementation == "sdpa":
        model.set_attn_implementation(SEGMENTED)
        implementation = model.config._attn_implementation
    return implementation == SEGMENTED


def segmented_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segmented_mask: SegmentedMask | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """
    Scaled dot-product attention that leaves out what no segment looks at: the prefix, and each segment over the prefix
    and itself, instead of the whole row over itself. Shapes are those of transformers' attention functions.
    """
    if segmented_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    length, count = segmented_mask.prefix.shape[-1], segmented_mask.count

    def split(values: Tensor) -> tuple[Tensor, Tensor]:  # (Q, H, N, D) -> (Q, H, P, D), (Q * G, H, W, D)
        segments = values[:, :, length:].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)
        return values[:, :, :length], segments

    def with_prefix(values: Tensor) -> Tensor:
        prefix, segments = split(values)
        return torch.cat([prefix.repeat_interleave(count, 0), segments], 2)

    (prefix_query, segment_query), (prefix_key, _), (prefix_value, _) = split(query), split(key), split(value)
    before, _ = sdpa_attention_forward(
        module, prefix_query, prefix_key, prefix_value, segmented_mask.prefix, **kwargs
    )  # (Q, P, H, D)
    behind, _ = sdpa_attention_forward(
        module, segment_query, with_prefix(key), with_prefix(value), segmented_mask.segments, **kwargs
    )  # (Q * G, W, H, D)
    return torch.cat([before, behind.unflatten(0, (-1, count)).flatten(1, 2)], 1), None


AttentionInterface.register(SEGMENTED, segmented_attention)
AttentionMaskInterface.register(SEGMENTED, sdpa_mask)
