"""
Revising strategies, which select the visible positions of the region that a step takes back. Each is one small function from
a [`ReviseView`] to the selected positions. `DecodingConfig(revision=...)` takes the name of one below, or a [`Revising`] of
your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from .config import DecodingConfig


@dataclass
class ReviseView:
    """
    The input of a revising strategy: `R` responses, and the `B` positions of the region of each. The region is the active
    block. With full attention, it is the response up to the end of the active block. Every strategy treats each row
    independently.

    Distributions are those of the policy in the state before the step, at temperature 1. With `config.tempered_confidence`,
    they are the distributions that tokens are sampled from. All log-probabilities are float32, in nats, and 0 where the
    position is neither masked nor visible.

    Attributes:
        masked (boolean `Tensor` of shape `(R, B)`): masked positions that the step may unmask.
        visible (boolean `Tensor` of shape `(R, B)`): positions whose token may be taken back.
        quota (integer `Tensor` of shape `(R,)`): by how many the schedule raises the number of visible tokens.
        limit (integer `Tensor` of shape `(R,)`): `config.revision_max`, or a fifth of the region, rounded up.
        shown_logps (`Tensor` of shape `(R, B)`): log-probability of the visible token.
        best_logps (`Tensor` of shape `(R, B)`): log-probability of the likeliest token.
        best_differs (boolean `Tensor` of shape `(R, B)`): whether the likeliest token is not the visible one.
        sampled_logps (`Tensor` of shape `(R, B)`): log-probability of a token that was sampled for the position.
        sampled_differs (boolean `Tensor` of shape `(R, B)`): whether the sampled token is not the visible one.
        config ([`DecodingConfig`]): settings.
        uniforms (`Tensor` of shape `(R, B)`, *optional*): random numbers in [0, 1), from the seed of each response.
    """

    masked: Tensor
    visible: Tensor
    quota: Tensor
    limit: Tensor
    shown_logps: Tensor
    best_logps: Tensor
    best_differs: Tensor
    sampled_logps: Tensor
    sampled_differs: Tensor
    config: DecodingConfig
    uniforms: Tensor | None = None

    def first(self, scores: Tensor, among: Tensor, number: Tensor) -> Tensor:
        """The positions `among` those given that have the lowest scores, `number` in each row. Of equal scores, the left
        ones are taken. Boolean, `(R, B)`."""
        order = scores.masked_fill(~among, torch.inf).sort(dim=1, stable=True).indices
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, places)
        return (ranks < number[:, None]) & among


@dataclass(frozen=True)
class Revising:
    """
    A way to revise.

    Attributes:
        select (callable): from a [`ReviseView`] to the positions that are taken back, boolean, `(R, B)`.
        edits (`bool`, *optional*, defaults to `False`):
            Whether the step writes a token over the visible one. Otherwise it erases the visible token, and a later step
            writes the position again.
    """

    select: Callable[[ReviseView], Tensor]
    edits: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return getattr(self.select, "__qualname__", repr(self.select))


def confidence(view: ReviseView) -> Tensor:
    """Visible tokens whose probability is below `config.revision_threshold`, the least likely first (as in WINO,
    https://huggingface.co/papers/2507.18578). The choice depends on the state alone."""
    unlikely = view.visible & (view.shown_logps.exp() < view.config.revision_threshold)
    return view.first(view.shown_logps, unlikely, view.limit)


def self_planning(view: ReviseView) -> Tensor:
    """
    Path planning in which the policy itself is the planner (P2, https://huggingface.co/papers/2502.03540). Masked positions are
    ranked together with visible ones: the former by the probability of their likeliest token, the latter by that of their
    visible one. As many as the schedule says are visible after the step, those with the highest rank.
    """
    scores = torch.where(view.masked, view.best_logps, view.shown_logps)
    open_to_all = view.masked | view.visible
    remain = (open_to_all.sum(1) - view.visible.sum(1) - view.quota).clamp(min=0)  # masked after the step
    return view.first(scores, open_to_all, remain) & view.visible


def random(view: ReviseView) -> Tensor:
    r"""
    Every visible token with the probability $\min(\eta, (1 - \alpha_s) / \alpha_t)$, where $\alpha_t$ and $\alpha_s$ are the shares
    of visible tokens before and after the step, and $\eta$ is `config.revision_rate` (ReMDM-cap,
    https://huggingface.co/papers/2503.00307).
    """
    assert view.uniforms is not None  # `decode` requires seeds
    number = (view.visible | view.masked).sum(1)
    before = view.visible.sum(1) / number
    after = (before + view.quota / number).clamp(max=1.0)
    rate = ((1 - after) / before.clamp(min=1e-9)).clamp(max=view.config.revision_rate)
    return view.visible & (view.uniforms < rate[:, None])


def edit(view: ReviseView) -> Tensor:
    """Visible tokens that are not the likeliest at their position, if the likeliest has a probability above
    `config.edit_threshold`; the highest probability first. The choice depends on the state alone. The token is sampled
    afterwards, and may be the same again."""
    wrong = view.visible & view.best_differs & (view.best_logps.exp() > view.config.edit_threshold)
    return view.first(-view.best_logps, wrong, view.limit)


def sampled_edit(view: ReviseView) -> Tensor:
    """Visible tokens over which another token was sampled that has a probability above `config.edit_threshold`, as published
    for LLaDA 2.1 (https://huggingface.co/papers/2602.08676). The choice depends on the sampled token, so the policy
    gradient has a bias above temperature 0 (docs/method.md, section 8)."""
    return view.visible & view.sampled_differs & (view.sampled_logps.exp() > view.config.edit_threshold)


REVISIONS: dict[str, Revising] = {
    way.name: way
    for way in (
        Revising(confidence),
        Revising(self_planning),
        Revising(random),
        Revising(edit, edits=True),
        Revising(sampled_edit, edits=True),
    )
}
