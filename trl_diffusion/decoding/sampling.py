"""From logits to a proposed token for each candidate position."""

from __future__ import annotations

import torch
from torch import Tensor

from ..policies.forward import log_distribution
from ..policies.spec import DiffusionSpec
from .config import DecodingConfig


def sampled_distribution(logits: Tensor, spec: DiffusionSpec, config: DecodingConfig) -> Tensor:
    """
    The log-distribution that tokens are sampled from: after temperature, `suppress_tokens`, `top_k` and `top_p`.

    Args:
        logits (`Tensor` of shape `(M, V)`): logits of the model.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`DecodingConfig`]): settings.

    Returns:
        float32 `Tensor` of shape `(M, V)`, a fresh one.
    """
    log_probs = log_distribution(logits, spec, config.temperature)
    if not config.suppress_tokens and config.top_k is None and config.top_p is None:
        return log_probs
    if config.suppress_tokens:
        log_probs[:, list(config.suppress_tokens)] = -torch.inf
    if config.top_k is not None and config.top_k < log_probs.shape[-1]:
        log_probs = log_probs.masked_fill(log_probs < log_probs.topk(config.top_k).values[:, -1:], -torch.inf)
    if config.top_p is not None:
        ordered, order = log_probs.log_softmax(-1).sort(descending=True, stable=True)
        before = ordered.exp().cumsum(-1).roll(1, dims=-1)
        before[:, 0] = 0.0  # the most likely token is always kept
        outside = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before > config.top_p)
        log_probs = log_probs.masked_fill(outside, -torch.inf)
    return log_probs.log_softmax(-1)


def propose(
    logits: Tensor, spec: DiffusionSpec, config: DecodingConfig, uniforms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    One token for each row of logits.

    Args:
        logits (`Tensor` of shape `(M, V)`): logits of the model.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`DecodingConfig`]): settings.
        uniforms (`Tensor` of shape `(M,)`, *optional*): picks the token from the cumulative distribution; without it the
            most likely one is taken.

    Returns:
        Tokens and their log-probabilities, of shape `(M,)`, and the distributions they come from, `(M, V)`.
    """
    log_probs = sampled_distribution(logits, spec, config)
    never = spec.mask_token_id if spec.predicts_mask_token and not config.allow_mask_token else None
    if never is not None:  # it has a share of the distribution, yet it is no answer
        share = log_probs[:, never].clone()
        log_probs[:, never] = -torch.inf
    if uniforms is None:
        tokens = log_probs.argmax(-1)
    else:
        cumulative = log_probs.exp().cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)
    if never is not None:
        log_probs[:, never] = share
    return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1), log_probs
