"""Proposes a token for each candidate position, from its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..policies.forward import log_distribution
from ..policies.spec import DiffusionSpec
from .config import DecodingConfig


class Proposal(NamedTuple):
    """
    A token for each of `M` candidates, with log-probabilities. All log-probabilities are float32, in nats.

    Attributes:
        tokens (`Tensor` of shape `(M,)`): the tokens.
        logps (`Tensor` of shape `(M,)`): their log-probabilities under the distributions they were sampled from. A
            trajectory records these.
        seen_logps (`Tensor` of shape `(M,)`): their log-probabilities under `seen`.
        best_logps (`Tensor` of shape `(M,)`): log-probabilities of the likeliest tokens that may be proposed,
            under `seen`.
        best_tokens (`Tensor` of shape `(M,)`): these tokens.
        log_probs (`Tensor` of shape `(M, V)`): the log-distributions that the tokens were sampled from.
        seen (`Tensor` of shape `(M, V)`): the log-distributions that a strategy looks at, see
            `DecodingConfig.tempered_confidence`.
    """

    tokens: Tensor
    logps: Tensor
    seen_logps: Tensor
    best_logps: Tensor
    best_tokens: Tensor
    log_probs: Tensor
    seen: Tensor


def sampled_distribution(logits: Tensor, spec: DiffusionSpec, config: DecodingConfig) -> Tensor:
    """
    The log-distribution that tokens are sampled from: after temperature, `suppress_tokens`, `top_k` and `top_p`.

    Args:
        logits (`Tensor` of shape `(M, V)`): logits of the model.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`DecodingConfig`]): settings.

    Returns:
        A new float32 `Tensor` of shape `(M, V)`.
    """
    log_probs = log_distribution(logits, spec, config.temperature)
    if not config.is_truncated:
        return log_probs
    if config.suppress_tokens:
        log_probs[:, list(config.suppress_tokens)] = -torch.inf
    if (config.top_k is not None or config.top_p is not None) and not config.allow_mask_token:
        # Otherwise it could be the only token that is kept, and no token could be proposed.
        log_probs[:, spec.mask_token_id] = -torch.inf
    if config.top_k is not None and config.top_k < log_probs.shape[-1]:
        log_probs = log_probs.masked_fill(log_probs < log_probs.topk(config.top_k).values[:, -1:], -torch.inf)
    if config.top_p is not None:
        ordered, order = log_probs.log_softmax(-1).sort(descending=True, stable=True)
        before = ordered.exp().cumsum(-1).roll(1, dims=-1)
        before[:, 0] = 0.0  # the most likely token is always kept
        outside = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before > config.top_p)
        log_probs = log_probs.masked_fill(outside, -torch.inf)
    return log_probs.log_softmax(-1)


def propose(logits: Tensor, spec: DiffusionSpec, config: DecodingConfig, uniforms: Tensor | None) -> Proposal:
    """
    Proposes one token for each row of logits.

    Args:
        logits (`Tensor` of shape `(M, V)`): logits of the model.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`DecodingConfig`]): settings.
        uniforms (`Tensor` of shape `(M,)`, *optional*): picks the token from the cumulative distribution. Without it, the
            most likely token is taken.

    Returns:
        [`Proposal`]. `logps` is NaN or `-inf` for a row whose logits hold NaN or `+inf`, or leave no token to propose. It is
        finite for all other rows.
    """
    log_probs = sampled_distribution(logits, spec, config)
    never = spec.mask_token_id if spec.predicts_mask_token and not config.allow_mask_token else None
    if never is None:
        tokens, best = _pick(log_probs, log_probs, uniforms)
        logps = _at(log_probs, tokens)
    else:  # it keeps its probability, but is never proposed
        share = log_probs[:, never].clone()
        log_probs[:, never] = -torch.inf
        # Without this, the other probabilities could be too small for float32 before they are scaled.
        scaled = log_probs if uniforms is None else log_probs - log_probs.amax(-1, keepdim=True)
        tokens, best = _pick(log_probs, scaled, uniforms)
        logps = _at(log_probs, tokens)
        log_probs[:, never] = share
    if config.tempered_confidence or (config.temperature in (0.0, 1.0) and not config.is_truncated):
        return Proposal(tokens, logps, logps, _at(log_probs, best), best, log_probs, log_probs)
    seen = log_distribution(logits, spec)
    return Proposal(tokens, logps, _at(seen, tokens), _at(seen, best), best, log_probs, seen)


def _pick(log_probs: Tensor, scaled: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    A token of each row, and the most likely token, `(M,)` each. The first is a sample from `scaled` with `uniforms`, and the
    most likely token without. `scaled` is `log_probs` up to a constant for each row.
    """
    best = log_probs.argmax(-1)
    if uniforms is None:
        return best, best
    cumulative = scaled.exp().cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    tokens = tokens.clamp(max=log_probs.shape[-1] - 1)
    # A parallel cumulative sum may increase by rounding at a token of probability 0. Such a token is not taken.
    return torch.where(_at(log_probs, tokens) == -torch.inf, best, tokens), best


def _at(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The value of each row at its token, `(M,)`."""
    return log_probs.gather(-1, tokens[:, None]).squeeze(-1)
