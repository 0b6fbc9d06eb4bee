"""The pairwise objective (docs/method.md, section 5): losses of preference pairs on trajectory log-ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Pairs:
    """
    Preferences inside groups.

    Attributes:
        chosen, rejected (`Tensor` of shape `(U,)`): responses, numbered through all groups.
        weights (`Tensor` of shape `(U,)`, float32): share of the pair in the loss. The shares of a group add up to `1`
            divided by the number of groups. A batch may therefore be cut between groups.
        tied (`int`): groups without a pair, because all their scores are equal. Groups with fewer than two scored
            responses are not among them.
        identical (`int`): pairs that were dropped, because both responses are the same tokens.
    """

    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    tied: int
    identical: int

    def used(self) -> tuple[Tensor, Pairs]:
        """Returns the responses that are in a pair, `(used,)`, and the pairs, renumbered among these responses. If there is no
        pair, it returns response 0."""
        used, places = torch.cat([self.chosen, self.rejected]).unique(return_inverse=True)
        chosen, rejected = places.chunk(2)
        if len(used) == 0:  # a pass needs something to score
            used = self.chosen.new_zeros(1)
        return used, replace(self, chosen=chosen, rejected=rejected)


def make_pairs(
    scores: Tensor, which: Literal["best_worst", "all"] = "best_worst", same: Tensor | None = None
) -> Pairs:
    """
    Pairs of a better and a worse response of the same group.

    Args:
        scores (`Tensor` of shape `(R / G, G)`): score of each response. Only the order inside a group matters, and a higher
            score is better. A response with NaN has no score and is in no pair.
        which (`str`, *optional*, defaults to `"best_worst"`): one pair for each group, or `"all"` of its ordered pairs.
            Equal scores make no pair.
        same (boolean `Tensor` of shape `(R / G, G, G)`, *optional*): which responses are the same tokens (see
            [`same_responses`]). They form no pair: their log-ratios differ by the order of denoising and the draw, and not by
            what the responses say.

    Returns:
        [`Pairs`]

    Raises:
        ValueError: if `which` has an unknown value.
    """
    groups, size = scores.shape
    better = scores[:, :, None] > scores[:, None, :]  # False for NaN
    if which == "best_worst":
        best = torch.where(scores.isnan(), -torch.inf, scores).argmax(1)
        worst = torch.where(scores.isnan(), torch.inf, scores).argmin(1)
        only = torch.zeros_like(better)
        only[torch.arange(groups, device=scores.device), best, worst] = True
        better = better & only
    elif which != "all":
        raise ValueError(f"`which` must be 'best_worst' or 'all', got {which!r}.")
    tied = ~better.any(2).any(1) & ((~scores.isnan()).sum(1) > 1)
    dropped = better & same if same is not None else torch.zeros_like(better)
    better = better & ~dropped
    number = better.sum((1, 2))
    group, chosen, rejected = better.nonzero(as_tuple=True)
    return Pairs(
        chosen=group * size + chosen,
        rejected=group * size + rejected,
        weights=1.0 / (number[group].float() * groups),
        tied=int(tied.sum()),
        identical=int(dropped.sum()),
    )


def same_responses(ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """
    Which responses of a group are the same tokens.

    Args:
        ids (`Tensor` of shape `(R, C)`): token ids, groups of `size` neighbours one after another.
        mask (`Tensor` of shape `(R, C)`): not 0 for the tokens of the response, which come first.
        size (`int`): responses `G` of a group.

    Returns:
        Boolean `Tensor` of shape `(R / G, G, G)`.
    """
    tokens = torch.where(mask > 0, ids, -1).view(-1, size, ids.shape[1])
    return (tokens[:, :, None] == tokens[:, None, :]).all(3)


def differing_groups(rewards: Tensor, size: int) -> Tensor:
    """
    Which responses are in a group whose rewards are not all the same. Nothing can be learnt from other groups.

    Args:
        rewards (`Tensor` of shape `(R, F)`): reward of each response by each of `F` functions, NaN where a function does not
            apply. `size` neighbours form a group.
        size (`int`): responses `G` of a group.

    Returns:
        Boolean `Tensor` of shape `(R,)`. Responses to which no function applies do not make a difference.
    """
    groups = rewards.view(-1, size, rewards.shape[1])
    scored = ~groups.isnan().all(2)
    same = (groups[:, :, None] == groups[:, None]) | (groups[:, :, None].isnan() & groups[:, None].isnan())
    differ = ~same.all(3) & scored[:, :, None] & scored[:, None]
    return differ.any(2).any(1).repeat_interleave(size)


@dataclass(frozen=True)
class PairwiseConfig:
    """
    Which losses of a pair are added up, and how.

    Attributes:
        losses (`dict[str, float]`): names of [`LOSSES`], each with its weight in the sum.
        beta (`float`): factor of the log-ratio.
        label_smoothing (`float`): for `"robust"`, the probability that a pair has the wrong order; below 0.5.
        length_normalization (`bool`): whether log-ratios are divided by the number of tokens of their response.
    """

    losses: dict[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalization: bool = False


@dataclass(frozen=True)
class Responses:
    """
    Log-likelihoods and lengths of `R` responses.

    Attributes:
        logps (`Tensor` of shape `(R,)`): log-likelihood of each trajectory under the policy, or an estimate, in nats.
        log_ratios (`Tensor` of shape `(R,)`, *optional*): log-ratio `D`, policy over reference, in nats. `None` without a
            reference; losses of [`NEED_REFERENCE`] cannot be computed then.
        lengths (`Tensor` of shape `(R,)`): number of tokens that count.
    """

    logps: Tensor
    log_ratios: Tensor | None
    lengths: Tensor


@dataclass(frozen=True)
class Compared:
    """
    The values from which the losses of `U` pairs are computed.

    Attributes:
        margins (`Tensor` of shape `(U,)`, *optional*): `beta * (D[chosen] - D[rejected])`, with `D` per token if
            `length_normalization` is on. `None` without a reference.
        mean_differences (`Tensor` of shape `(U,)`, *optional*): difference of `D` per token, with or without
            `length_normalization`. `None` without a reference.
        chosen_logps (`Tensor` of shape `(U,)`): log-likelihood of the chosen response, per token.
        config ([`PairwiseConfig`]): the options.
    """

    margins: Tensor | None
    mean_differences: Tensor | None
    chosen_logps: Tensor
    config: PairwiseConfig


def sigmoid_loss(pairs: Compared) -> Tensor:
    """`-log sigmoid(margin)` (DPO, https://huggingface.co/papers/2305.18290, eq. 7), shape `(U,)`."""
    return -F.logsigmoid(_known(pairs.margins))


def robust_loss(pairs: Compared) -> Tensor:
    """
    With a share `e` of the pairs in the wrong order, an unbiased estimate of [`sigmoid_loss`] on the right order (rDPO,
    https://huggingface.co/papers/2403.00409), shape `(U,)`.
    """
    margins, e = _known(pairs.margins), pairs.config.label_smoothing
    return (e * F.logsigmoid(-margins) - (1 - e) * F.logsigmoid(margins)) / (1 - 2 * e)


def hinge_loss(pairs: Compared) -> Tensor:
    """`max(0, 1 - margin)` (SLiC, https://huggingface.co/papers/2305.10425, with log-ratios), shape `(U,)`."""
    return F.relu(1 - _known(pairs.margins))


def ipo_loss(pairs: Compared) -> Tensor:
    """
    Squared distance of the difference of `D` per token from `1 / (2 beta)` (IPO, https://huggingface.co/papers/2310.12036,
    eq. 17, per token as in TRL), shape `(U,)`.
    """
    return (_known(pairs.mean_differences) - 1 / (2 * pairs.config.beta)).square()


def sft_loss(pairs: Compared) -> Tensor:
    """
    Negative log-likelihood of the chosen response, per token; needs no reference
    (https://huggingface.co/papers/2404.19733, eq. 1), shape `(U,)`.
    """
    return -pairs.chosen_logps


LOSSES: dict[str, Callable[[Compared], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "sft": sft_loss,
}
NEED_REFERENCE = ("sigmoid", "robust", "hinge", "ipo")
# Losses that `length_normalization` and `label_smoothing` change.
NORMALIZED = ("sigmoid", "robust", "hinge")
SMOOTHED = ("robust",)


def _known(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError(f"The losses {', '.join(NEED_REFERENCE)} need a reference, and there is none.")
    return values


def pairwise_loss(responses: Responses, pairs: Pairs, config: PairwiseConfig) -> tuple[Tensor, dict[str, Tensor]]:
    r"""
    The weighted sum of the losses that `config` names, averaged over pairs with the weights of the pairs.

    Args:
        responses ([`Responses`]): log-likelihoods and log-ratios.
        pairs ([`Pairs`]): which responses are compared.
        config ([`PairwiseConfig`]): the losses and their options.

    Returns:
        The loss, a scalar, and sums over pairs for metrics: `losses/NAME` for each loss, before its weight, and, with a
        reference, `rewards/chosen`, `rewards/rejected` and `rewards/margins` (implicit rewards: `beta` times log-ratio) and
        `rewards/accuracies` (number of pairs in which the chosen response has the higher implicit reward).

    Raises:
        ValueError: if a loss needs a reference and there is none.
    """
    lengths = responses.lengths.clamp(min=1)
    compared = Compared(None, None, (responses.logps / lengths)[pairs.chosen], config)
    rewards = None
    if responses.log_ratios is not None:
        means = responses.log_ratios / lengths
        rewards = config.beta * (means if config.length_normalization else responses.log_ratios)
        compared = Compared(
            margins=rewards[pairs.chosen] - rewards[pairs.rejected],
            mean_differences=means[pairs.chosen] - means[pairs.rejected],
            chosen_logps=compared.chosen_logps,
            config=config,
        )
    # The sum over all responses times 0 keeps the graph whole when there is no pair.
    loss = 0.0 * responses.logps.sum()
    sums: dict[str, Tensor] = {}
    for name, weight in config.losses.items():
        values = LOSSES[name](compared)
        loss = loss + weight * (values * pairs.weights).sum()
        sums[f"losses/{name}"] = values.detach().sum()
    if rewards is not None:
        chosen, rejected = rewards.detach()[pairs.chosen], rewards.detach()[pairs.rejected]
        sums["rewards/chosen"], sums["rewards/rejected"] = chosen.sum(), rejected.sum()
        sums["rewards/margins"] = (chosen - rejected).sum()
        sums["rewards/accuracies"] = (chosen > rejected).sum().float()
    return loss, sums
