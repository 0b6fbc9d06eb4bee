"""
Strategies, which select the masked positions of the active block that a step unmasks. Each strategy is one small function
from a [`StepView`] to the selected positions. `DecodingConfig(strategy=...)` takes the name of one below, or a function of
your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from .config import DecodingConfig


@dataclass
class StepView:
    """
    The input of a strategy: `R` responses, the `B` positions of the active block of each, and a proposal for each of the
    `M` candidates. Every strategy treats each row independently, so a response does not depend on the others.

    Distributions are those of the policy at temperature 1. With `config.tempered_confidence`, they are the distributions
    that tokens are sampled from.

    Attributes:
        candidates (boolean `Tensor` of shape `(R, B)`): positions that may be unmasked.
        quota (integer `Tensor` of shape `(R,)`): number of positions that the schedule unmasks, at least 1 and at most
            the number of candidates.
        token_logps (`Tensor` of shape `(R, B)`, float32): log-probability of the proposed token; 0 elsewhere.
        best_logps (`Tensor` of shape `(R, B)`, float32): log-probability of the likeliest token that may be
            proposed; 0 elsewhere.
        log_probs (`Tensor` of shape `(M, V)`, float32): log-distribution of each candidate, in the order of
            `candidates.nonzero()`.
        places (`tuple[Tensor, Tensor]`): row and column of each candidate, of shape `(M,)` each.
        config ([`DecodingConfig`]): settings.
        uniforms (`Tensor` of shape `(R, B)`, *optional*): random numbers in [0, 1), from the seed of each response. Only
            for `"random"` and functions of your own, if there are seeds.
    """

    candidates: Tensor
    quota: Tensor
    token_logps: Tensor
    best_logps: Tensor
    log_probs: Tensor
    places: tuple[Tensor, Tensor]
    config: DecodingConfig
    uniforms: Tensor | None = None

    @cached_property
    def confidences(self) -> Tensor:
        """Probability of the likeliest token, `(R, B)`. It does not depend on the sampled token."""
        return self.best_logps.exp()

    @cached_property
    def sampled_confidences(self) -> Tensor:
        """Probability of the proposed token, `(R, B)`."""
        return self.token_logps.exp()

    @cached_property
    def entropies(self) -> Tensor:
        """Entropy of each candidate's distribution, in nats, `(R, B)`; 0 elsewhere."""
        finite = self.log_probs.clamp(min=torch.finfo(self.log_probs.dtype).min)  # 0 * -inf is not 0
        return self._spread(-(finite.exp() * finite).sum(-1))

    @cached_property
    def margins(self) -> Tensor:
        """Difference between the two largest probabilities of each candidate, `(R, B)`; 0 elsewhere."""
        best = self.log_probs.topk(2, dim=-1).values.exp()
        return self._spread(best[:, 0] - best[:, 1])

    def top(self, scores: Tensor) -> Tensor:
        """
        The candidates with the highest scores, as many as the quota. Of equal scores, the left ones are taken.

        Args:
            scores (`Tensor` of shape `(R, B)`): higher scores come first.

        Returns:
            Boolean `Tensor` of shape `(R, B)`.
        """
        return (self.ranks(scores) < self.quota[:, None]) & self.candidates

    def ranks(self, scores: Tensor) -> Tensor:
        """Rank of each candidate, `(R, B)`; the highest score has rank 0. Other positions come last."""
        order = scores.masked_fill(~self.candidates, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places)

    def _spread(self, values: Tensor) -> Tensor:
        """`(M,)` to `(R, B)`."""
        return torch.zeros_like(self.token_logps).index_put(self.places, values)


Strategy = Callable[[StepView], Tensor]


def confidence(view: StepView) -> Tensor:
    """The candidates whose likeliest token has the highest probability. The choice does not depend on the token that is
    sampled, so the policy gradient has no bias (docs/method.md, section 1)."""
    return view.top(view.confidences)


def threshold(view: StepView) -> Tensor:
    """All candidates whose likeliest token has a probability above `config.threshold`. If these are fewer than the quota, the
    most likely ones fill the quota. The choice does not depend on the token that is sampled."""
    return _above_threshold(view, view.confidences)


def sampled_confidence(view: StepView) -> Tensor:
    """The candidates whose sampled token has the highest probability: low-confidence remasking as published (LLaDA,
    `low_confidence_static` of SDAR, `maskgit_plus` of Dream). At temperature 0 it equals [`confidence`]."""
    return view.top(view.sampled_confidences)


def sampled_threshold(view: StepView) -> Tensor:
    """All candidates whose sampled token has a probability above `config.threshold`, as published (Fast-dLLM,
    `low_confidence_dynamic` of SDAR). At temperature 0 it equals [`threshold`]."""
    return _above_threshold(view, view.sampled_confidences)


def _above_threshold(view: StepView, confidences: Tensor) -> Tensor:
    high = (confidences > view.config.threshold) & view.candidates
    return torch.where(high.sum(1, keepdim=True) >= view.quota[:, None], high, view.top(confidences))


def entropy(view: StepView) -> Tensor:
    """The candidates with the lowest entropy (`entropy` of Dream)."""
    return view.top(-view.entropies)


def entropy_bound(view: StepView) -> Tensor:
    """The candidates with the lowest entropies, as long as their sum is below `config.entropy_bound` nats, and at least one
    (`entropy_bounded` of SDAR's engines)."""
    entropies = view.entropies.masked_fill(~view.candidates, torch.inf)
    ordered, order = entropies.sort(dim=1, stable=True)
    within = ordered.cumsum(1) < view.config.entropy_bound
    within[:, 0] = True
    return torch.zeros_like(within).scatter_(1, order, within) & view.candidates


def margin(view: StepView) -> Tensor:
    """The candidates with the largest difference between the two highest probabilities (`topk_margin` of Dream)."""
    return view.top(view.margins)


def random(view: StepView) -> Tensor:
    """Random candidates, all equally likely (`random` of LLaDA, `origin` of Dream with a fixed number a step)."""
    assert view.uniforms is not None  # `decode` requires seeds
    return view.top(view.uniforms)


def left_to_right(view: StepView) -> Tensor:
    """The leftmost candidates (`sequential` of SDAR)."""
    columns = torch.arange(view.candidates.shape[1], device=view.candidates.device, dtype=torch.float)
    return view.top(-columns.expand(view.candidates.shape))


STRATEGIES: dict[str, Strategy] = {
    function.__name__: function
    for function in (
        confidence,
        threshold,
        sampled_confidence,
        sampled_threshold,
        entropy,
        entropy_bound,
        margin,
        random,
        left_to_right,
    )  # fmt: skip
}
# Strategies that depend on the sampled tokens.
SELECT_BY_SAMPLE = ("sampled_confidence", "sampled_threshold")
# Strategies that unmask exactly as many positions as the schedule says.
SCHEDULED = ("confidence", "sampled_confidence", "entropy", "margin", "random", "left_to_right")


def step_quota(step: int, total: int, left: int, config: DecodingConfig) -> int:
    """
    Number of positions that a step of a block unmasks.

    Args:
        step (`int`): step of the block's schedule, counted from 0.
        total (`int`): positions of the block that were masked before its first step.
        left (`int`): positions that are still masked.
        config ([`DecodingConfig`]): settings.

    Returns:
        `int`, which may be 0.
    """
    steps = config.steps_per_block
    if steps is None:
        return config.tokens_per_step
    if config.revising is not None:
        steps = math.ceil(config.fill_share * steps)
        if step >= steps - 1:
            return left
    if config.schedule == "even":
        return total // steps + (step < total % steps)
    if step >= steps - 1:
        return left
    times = torch.linspace(1, 1e-3, steps + 1)  # float32 as in Dream, because the rounding matters
    return int(left * (1 - times[step + 1] / times[step]))
