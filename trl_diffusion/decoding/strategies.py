"""
Which masked positions of the active block to unmask at a step. Each strategy is one small function from a [`StepView`] to
the chosen positions; `DecodingConfig(strategy=...)` takes the name of one below, or a function of your own.
"""

from __future__ import annotations

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
    What a strategy sees: `R` responses, the `B` positions of the active block of each, and a proposal for each of the
    `M` candidates. Every strategy works row by row, so a response does not depend on its neighbours.

    Distributions are those of the policy at temperature 1, whatever tokens are sampled from; with
    `config.tempered_confidence` those that tokens are sampled from.

    Attributes:
        candidates (boolean `Tensor` of shape `(R, B)`): positions that may be unmasked.
        quota (integer `Tensor` of shape `(R,)`): how many the schedule wants unmasked, at least 1, never more than
            there are candidates.
        token_logps (`Tensor` of shape `(R, B)`, float32): log-probability of the proposed token; 0 elsewhere.
        best_logps (`Tensor` of shape `(R, B)`, float32): that of the likeliest token that may be proposed; 0 elsewhere.
        log_probs (`Tensor` of shape `(M, V)`, float32): log-distribution of each candidate, in the order of
            `candidates.nonzero()`.
        places (`tuple[Tensor, Tensor]`): row and column of each candidate, of shape `(M,)` each.
        config ([`DecodingConfig`]): settings.
        uniforms (`Tensor` of shape `(R, B)`, *optional*): random numbers in [0, 1), from the response's own seed. Only for
            `"random"` and functions of your own, if there are seeds.
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
        """Probability of the likeliest token, `(R, B)`. The same whatever token is sampled."""
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
        The candidates with the highest scores, as many as the quota; ties go to the left.

        Args:
            scores (`Tensor` of shape `(R, B)`): the higher, the sooner.

        Returns:
            Boolean `Tensor` of shape `(R, B)`.
        """
        return (self.ranks(scores) < self.quota[:, None]) & self.candidates

    def ranks(self, scores: Tensor) -> Tensor:
        """Rank of each candidate by falling score, counted from 0, `(R, B)`; what is no candidate comes last."""
        order = scores.masked_fill(~self.candidates, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places)

    def _spread(self, values: Tensor) -> Tensor:
        """`(M,)` to `(R, B)`."""
        return torch.zeros_like(self.token_logps).index_put(self.places, values)


Strategy = Callable[[StepView], Tensor]


def confidence(view: StepView) -> Tensor:
    """Those whose likeliest token has the highest probability. The choice does not depend on the token that is sampled, so
    the policy gradient has no bias (docs/method.md, section 1)."""
    return view.top(view.confidences)


def threshold(view: StepView) -> Tensor:
    """Every one whose likeliest token has a probability above `config.threshold`; if these are fewer than the quota, as many
    as the quota of those with the highest. The choice does not depend on the token that is sampled."""
    return _above_threshold(view, view.confidences)


def sampled_confidence(view: StepView) -> Tensor:
    """Those whose sampled token has the highest probability: low-confidence remasking as published (LLaDA,
    `low_confidence_static` of SDAR, `maskgit_plus` of Dream). At temperature 0 the same as [`confidence`]."""
    return view.top(view.sampled_confidences)


def sampled_threshold(view: StepView) -> Tensor:
    """Every one whose sampled token has a probability above `config.threshold`, as published (Fast-dLLM,
    `low_confidence_dynamic` of SDAR). At temperature 0 the same as [`threshold`]."""
    return _above_threshold(view, view.sampled_confidences)


def _above_threshold(view: StepView, confidences: Tensor) -> Tensor:
    high = (confidences > view.config.threshold) & view.candidates
    return torch.where(high.sum(1, keepdim=True) >= view.quota[:, None], high, view.top(confidences))


def entropy(view: StepView) -> Tensor:
    """Those with the lowest entropy (`entropy` of Dream)."""
    return view.top(-view.entropies)


def entropy_bound(view: StepView) -> Tensor:
    """Those with the lowest entropy, as long as their entropies add up to less than `config.entropy_bound` nats, and
    always one (`entropy_bounded` of SDAR's engines)."""
    entropies = view.entropies.masked_fill(~view.candidates, torch.inf)
    ordered, order = entropies.sort(dim=1, stable=True)
    within = ordered.cumsum(1) < view.config.entropy_bound
    within[:, 0] = True
    return torch.zeros_like(within).scatter_(1, order, within) & view.candidates


def margin(view: StepView) -> Tensor:
    """Those whose best token is furthest ahead of the second best (`topk_margin` of Dream)."""
    return view.top(view.margins)


def random(view: StepView) -> Tensor:
    """Any, all equally likely (`random` of LLaDA, `origin` of Dream with a fixed number a step)."""
    assert view.uniforms is not None  # `decode` asks for seeds
    return view.top(view.uniforms)


def left_to_right(view: StepView) -> Tensor:
    """The leftmost ones (`sequential` of SDAR)."""
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
# These look at the tokens that were sampled.
SELECT_BY_SAMPLE = ("sampled_confidence", "sampled_threshold")
# These unmask as many positions as the schedule says, no more and no fewer.
SCHEDULED = ("confidence", "sampled_confidence", "entropy", "margin", "random", "left_to_right")


def step_quota(step: int, total: int, left: int, config: DecodingConfig) -> int:
    """
    How many positions of a block a step is to unmask.

    Args:
        step (`int`): step of the block's schedule, counted from 0.
        total (`int`): positions of the block that were masked before its first step.
        left (`int`): positions that still are.
        config ([`DecodingConfig`]): settings.

    Returns:
        `int`, which may be 0.
    """
    steps = config.steps_per_block
    if steps is None:
        return config.tokens_per_step
    if config.schedule == "even":
        return total // steps + (step < total % steps)
    if step >= steps - 1:
        return left
    times = torch.linspace(1, 1e-3, steps + 1)  # float32, as Dream has them: the rounding matters
    return int(left * (1 - times[step + 1] / times[step]))
