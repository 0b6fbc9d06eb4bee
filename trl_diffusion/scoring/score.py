"""Log-probabilities that the policy gives to unmasked tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..policies.forward import last_mlp_at, log_distribution, policy_logits
from ..policies.spec import DiffusionSpec
from .layout import PackedLayout, SelectionLayout


def score(
    model: nn.Module,
    layout: PackedLayout,
    spec: DiffusionSpec,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """
    Estimated log-probabilities of the tokens of a layout, computed in one forward pass. The estimate of a token is the sum
    of its log-probabilities in the states that score it, times their coefficients (see [`States`]).

    Args:
        model (`nn.Module`): the policy, wrapped or not.
        layout ([`PackedLayout`]): the states to score.
        spec ([`DiffusionSpec`]): facts about the policy.
        temperature (`float`, *optional*, defaults to `1.0`): temperature at which the tokens were sampled.
        compute_entropy (`bool`, *optional*, defaults to `False`): whether to return entropies as well.
        entropy_gradient (`bool`, *optional*, defaults to `False`):
            whether gradients flow through the entropies. This needs two more tensors of the size of the logits.

    Returns:
        Two float32 tensors of shape `(R, E)`, in nats and 0 where nothing is scored. The first holds log-probabilities.
        The second holds the entropies of their distributions (the mean over the states that score the token), or is
        `None`.
    """
    logits = layout_logits(model, layout)
    return score_logits(logits, layout, spec, temperature, compute_entropy, entropy_gradient)


def layout_logits(model: nn.Module, layout: PackedLayout) -> Tensor:
    """Logits at the places of a layout that are read, `(M, V)`, in one forward pass that computes little else in its last layer."""
    with last_mlp_at(model, layout.rows, layout.columns):
        return policy_logits(model, layout.input_ids, layout.position_ids, layout.allowed, layout.rows, layout.columns)


def score_logits(
    logits: Tensor,
    layout: PackedLayout,
    spec: DiffusionSpec,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[`score`] for given logits of shape `(M, V)`, at the scored places of the layout."""
    log_probs = log_distribution(logits, spec, temperature)  # (M, V)
    scored = layout.coefficients != 0
    picked = log_probs.gather(1, layout.targets[:, None]).squeeze(1)
    if layout.selected is not None:
        picked = picked + _selection_shares(log_probs, logits, layout, layout.selected, spec, temperature)
        picked = torch.where(scored, picked, 0.0)  # the mask token at a rejected place may have probability 0
    picked = picked * layout.coefficients
    shape, places = layout.weights.shape, (layout.responses, layout.event_columns)
    # `index_put` on fresh zeros, out of place, keeps the result connected to the graph even when nothing is scored.
    logps = torch.zeros(shape, device=picked.device).index_put(places, picked, accumulate=True)
    if not compute_entropy:
        return logps, None
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 * -inf is not 0
        entropies = -(finite.exp() * finite).sum(-1)
        sums, counts = (
            torch.zeros(shape, device=picked.device).index_put(places, values, accumulate=True)
            for values in (entropies * scored, scored.float())
        )
    return logps, sums / counts.clamp(min=1)


def _selection_shares(
    log_probs: Tensor,
    logits: Tensor,
    layout: PackedLayout,
    selected: SelectionLayout,
    spec: DiffusionSpec,
    temperature: float,
) -> Tensor:
    """The share of each place in the log-probability of the selection, `(M,)`; see [`Selection.shares`]."""
    seen = log_probs
    if not selected.selection.tempered and temperature not in (0.0, 1.0):
        seen = log_distribution(logits.detach(), spec)
    return selected.selection.shares(
        log_probs, seen, layout.targets, selected.states, selected.unmasked, selected.rejected
    )


def high_entropy(entropies: Tensor, weights: Tensor, pool: tuple[Tensor, Tensor], quantile: float) -> Tensor:
    """
    Which scored tokens have the highest entropies of a pool (https://huggingface.co/papers/2506.01939, where every token
    is scored).

    A scored token stands for as many tokens as its weight says. Compare a token with all other tokens of the pool: it is
    chosen if those whose entropy is not higher have at least the share `quantile` of the weight. With equal weights, the
    chosen tokens are those at or above `torch.quantile(entropies, quantile)`.

    Args:
        entropies (`Tensor` of shape `(R, E)`): entropy of each token, in nats.
        weights (`Tensor` of shape `(R, E)`): weight of each token, 0 where it is not scored.
        pool (tuple of two `Tensor` of shape `(tokens,)`): entropies and weights of all scored tokens, of these rows and others.
        quantile (`float`): between 0 (every token) and 1 (the token with the highest entropy).

    Returns:
        Boolean `Tensor` of shape `(R, E)`.
    """
    scored = weights > 0
    if pool[0].numel() == 0:
        return scored
    ordered, order = pool[0].sort()
    cumulated = pool[1][order].double().cumsum(0)
    below = cumulated[torch.searchsorted(ordered, entropies[scored], right=True) - 1] - weights[scored]
    others = cumulated[-1] - weights[scored]
    chosen = below >= quantile * others - 1e-6 * cumulated[-1]  # tolerance for rounding
    return scored.masked_scatter(scored, chosen)
