"""How likely the policy finds what was unmasked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..policies.forward import log_distribution, policy_logits
from ..policies.spec import DiffusionSpec
from .layout import PackedLayout


def score(
    model: nn.Module,
    layout: PackedLayout,
    spec: DiffusionSpec,
    temperature: float = 1.0,
    compute_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """
    Estimated log-probabilities of the tokens of a layout, in one forward pass: for each token, the sum of its
    log-probabilities in the states that score it, times their coefficients (see [`States`]).

    Args:
        model (`nn.Module`): the policy, wrapped or not.
        layout ([`PackedLayout`]): the states to score.
        spec ([`DiffusionSpec`]): facts about the policy.
        temperature (`float`, *optional*, defaults to `1.0`): the one the tokens were sampled with.
        compute_entropy (`bool`, *optional*, defaults to `False`): whether to return entropies as well.

    Returns:
        Two float32 tensors of shape `(R, C)`, 0 where nothing is scored: log-probabilities in nats, and entropies (the
        mean over the states that score the token; no gradient) or `None`.
    """
    logits = policy_logits(model, layout.input_ids, layout.position_ids, layout.allowed, layout.rows, layout.columns)
    return score_logits(logits, layout, spec, temperature, compute_entropy)


def score_logits(
    logits: Tensor,
    layout: PackedLayout,
    spec: DiffusionSpec,
    temperature: float = 1.0,
    compute_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[`score`] for logits that are there already, of shape `(M, V)`: those at the scored places of the layout."""
    log_probs = log_distribution(logits, spec, temperature)  # (M, V)
    picked = log_probs.gather(1, layout.targets[:, None]).squeeze(1) * layout.coefficients
    shape, places = layout.weights.shape, (layout.responses, layout.canvas_columns)
    # `index_put` on fresh zeros, out of place, keeps the result connected to the graph even when nothing is scored.
    logps = torch.zeros(shape, device=picked.device).index_put(places, picked, accumulate=True)
    if not compute_entropy:
        return logps, None
    with torch.no_grad():
        finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 * -inf is not 0
        entropies = -(finite.exp() * finite).sum(-1)
        sums, counts = (
            torch.zeros(shape, device=picked.device).index_put(places, values, accumulate=True)
            for values in (entropies, torch.ones_like(entropies))
        )
    return logps, sums / counts.clamp(min=1)
