"""The pairwise objective (docs/method.md, section 5): DPO on trajectory log-ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Pairs:
    """
    Preferences inside groups.

    Attributes:
        chosen, rejected (`Tensor` of shape `(M,)`): responses, numbered through all groups.
        weights (`Tensor` of shape `(M,)`, float32): share of the pair in the loss; the pairs of a group share `1 / Q` for
            `Q` groups, so that a batch may be cut between groups.
        tied (`int`): groups without a pair, because all their scores are equal. Groups with fewer than two scored
            responses are not among them.
        identical (`int`): pairs that were dropped, because both responses are the same tokens.
    """

    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    tied: int
    identical: int


def make_pairs(
    scores: Tensor, which: Literal["best_worst", "all"] = "best_worst", same: Tensor | None = None
) -> Pairs:
    """
    Pairs of a better and a worse response of the same group.

    Args:
        scores (`Tensor` of shape `(Q, G)`): how good each of `G` responses of each of `Q` groups is; any number that
            orders them. NaN: not scored, in no pair.
        which (`str`, *optional*, defaults to `"best_worst"`): one pair for each group, or `"all"` of its ordered pairs.
            Equal scores make no pair.
        same (boolean `Tensor` of shape `(Q, G, G)`, *optional*): which responses are the same tokens (see
            [`same_responses`]). They make no pair: how much likelier one of them became than the other depends on the
            order in which it was denoised, not on what it says.

    Returns:
        [`Pairs`]
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
        mask (`Tensor` of shape `(R, C)`): not 0 where a token counts; a response is its first tokens that do.
        size (`int`): responses `G` of a group.

    Returns:
        Boolean `Tensor` of shape `(R / G, G, G)`.
    """
    tokens = torch.where(mask > 0, ids, -1).view(-1, size, ids.shape[1])
    return (tokens[:, :, None] == tokens[:, None, :]).all(3)


def differing_groups(rewards: Tensor, size: int) -> Tensor:
    """
    Which responses are in a group whose rewards are not all the same. Without one, a rollout teaches nothing.

    Args:
        rewards (`Tensor` of shape `(R, F)`): what each of `F` functions gave each response, NaN for nothing; groups of `size`
            neighbours one after another.
        size (`int`): responses `G` of a group.

    Returns:
        Boolean `Tensor` of shape `(R,)`. Responses to which no function applies do not make a difference.
    """
    groups = rewards.view(-1, size, rewards.shape[1])
    scored = ~groups.isnan().all(2)
    same = (groups[:, :, None] == groups[:, None]) | (groups[:, :, None].isnan() & groups[:, None].isnan())
    differ = ~same.all(3) & scored[:, :, None] & scored[:, None]
    return differ.any(2).any(1).repeat_interleave(size)


def pairwise_loss(
    log_ratios: Tensor, pairs: Pairs, beta: float, lengths: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""
    `-log sigmoid(beta * (D[chosen] - D[rejected]))`, averaged over pairs with their weights (DPO,
    https://huggingface.co/papers/2305.18290, eq. 7, with the log-ratios of dTRPO).

    Args:
        log_ratios (`Tensor` of shape `(R,)`): log-ratio `D` of each response, policy over reference, in nats.
        pairs ([`Pairs`]): which responses are compared.
        beta (`float`): how much a nat counts.
        lengths (`Tensor` of shape `(R,)`, *optional*): number of tokens of each response, to divide `D` by.

    Returns:
        The loss, a scalar, and sums over pairs for metrics: `chosen`, `rejected` and `margin` (implicit rewards, `beta`
        times log-ratio), `accuracy` (pairs ordered as the data says), `count`.
    """
    scores = log_ratios if lengths is None else log_ratios / lengths.clamp(min=1)
    chosen, rejected = beta * scores[pairs.chosen], beta * scores[pairs.rejected]
    # The sum over all responses times 0 keeps the graph whole when there is no pair.
    loss = -(F.logsigmoid(chosen - rejected) * pairs.weights).sum() + 0.0 * log_ratios.sum()
    with torch.no_grad():
        sums = {
            "chosen": chosen.sum(),
            "rejected": rejected.sum(),
            "margin": (chosen - rejected).sum(),
            "accuracy": (chosen > rejected).sum().float(),
            "count": torch.tensor(float(len(chosen)), device=chosen.device),
        }
    return loss, sums
