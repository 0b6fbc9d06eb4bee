"""Which tokens of a document are masked, and how the masked tokens are weighed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..fields import AtLeast, Within, check_fields
from ..policies.spec import DiffusionSpec
from ..scoring.estimators import EstimatorConfig, elbo, final_tokens, masked_states, uniforms
from ..scoring.states import States
from ..seeds import derive_seed
from ..trajectories.by_block import at_block
from .documents import Documents


@dataclass(frozen=True)
class MaskConfig:
    r"""
    How documents are masked. With block attention each block has its own mask, with full attention the canvas has one.

    Args:
        weighting (`str`, *optional*, defaults to `"elbo"`):
            `"elbo"`: `m` of the `N` trained tokens of a block are masked at random, where `m` is uniform in 1 to `N`. Their loss is
            multiplied by `N / m`. The expected loss is the negative evidence lower bound (docs/method.md, section 9).
            `"mean"`: each token is masked with a probability that is uniform in 0 to 1 and the same for the block. All masked
            tokens have the same weight (as in Fast-dLLM v2 and SDAR).
        num_masks (`int`, *optional*, defaults to `1`):
            Number of random masks of a document in one step. With block attention they share the clean tokens of a packed row.
        complementary (`bool`, *optional*, defaults to `False`):
            With `"mean"`: whether each mask is followed by its complement, so that every trained token is scored once.
        max_corruption (`float`, *optional*, defaults to `0.0`):
            With `"mean"`: largest share of visible tokens that are replaced by other tokens of the same document. The share in a
            view is uniform in 0 to this value. All trained tokens are then scored, visible ones too. A policy that is trained
            in this way can revise (docs/howto/revision.md).

    Raises:
        ValueError: for a value out of range, or settings that contradict each other.
    """

    weighting: Literal["elbo", "mean"] = "elbo"
    num_masks: Annotated[int, AtLeast(1)] = 1
    complementary: bool = False
    max_corruption: Annotated[float, Within("[0, 1)")] = 0.0

    def __post_init__(self):
        check_fields(self)
        if self.weighting != "mean":
            for name in ("complementary", "max_corruption"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` needs `weighting='mean'`, not {self.weighting!r}.")


def document_states(documents: Documents, spec: DiffusionSpec, seed: int, config: MaskConfig) -> States:
    """
    Random states of documents. The sum of `-logp * weight` over all tokens, divided by the number of trained tokens, estimates
    the loss per token. An autoregressive token has weight 1, because its state is always the same.

    Args:
        documents ([`Documents`]): the documents.
        spec ([`DiffusionSpec`]): facts about the policy.
        seed (`int`): seed of the step. The masks of a document depend only on this seed and on the tokens of the document.
        config ([`MaskConfig`]): how documents are masked.
    """
    batch = documents.trajectories()
    seeds = [derive_seed(seed, number) for number in documents.numbers.tolist()]
    if config.weighting == "elbo":
        return elbo(batch, spec, seeds, EstimatorConfig("elbo", num_draws=config.num_masks))
    tokens = final_tokens(batch, spec)
    ratios = at_block(tokens.groups, uniforms(batch, [derive_seed(one, 1) for one in seeds], config.num_masks))
    masked = tokens.drawn[:, None] & (uniforms(batch, seeds, config.num_masks) < ratios)
    scores_of_a_token = config.num_masks / 2  # expected: the mean ratio is a half
    if config.complementary:
        masked = torch.cat([masked, tokens.drawn[:, None] & ~masked], 1)
        scores_of_a_token *= 2
    scored = masked
    if config.max_corruption:
        scored = tokens.drawn[:, None].expand_as(masked)
        scores_of_a_token = masked.shape[1]
    states = masked_states(batch, tokens, masked, scored / scores_of_a_token)
    if config.max_corruption:
        states = replace(
            states, shown=_corrupted(documents, tokens.drawn, seeds, config.max_corruption, masked.shape[1])
        )
    return states


def _corrupted(documents: Documents, drawn: Tensor, seeds: list[int], most: float, num_views: int) -> Tensor:
    """The tokens that each view shows, `(R, W, C)`: some are replaced by tokens of the same document."""
    batch = documents.trajectories()
    share, wrong, other = (
        uniforms(batch, [derive_seed(seed, stream) for seed in seeds], num_views) for stream in (2, 3, 4)
    )
    places = (other * documents.trained.sum(1)[:, None, None]).long()
    others = documents.canvas_ids.gather(1, places.flatten(1)).view_as(places)
    hit = (wrong < most * share[..., :1]) & drawn[:, None]
    return torch.where(hit, others, documents.canvas_ids[:, None])
