"""How likely a policy finds given text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fields import check_at_least
from ..offline.orders import finished_batch, given_order
from ..policies.forward import NON_FINITE_ADVICE, log_distribution, unwrap
from ..policies.policy import Policy
from ..policies.spec import DiffusionSpec, impossible_token
from ..scoring.estimators import EstimatorConfig, elbo
from ..scoring.layout import pack
from ..scoring.score import layout_logits, score
from ..scoring.states import States, all_states
from ..seeds import derive_seed
from ..trajectories.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class Likelihood:
    """
    Attributes:
        value (`float`): log-likelihood of the continuation, or a lower bound of it, in nats.
        is_greedy (`bool`): whether each token is the most likely one in the state it is read from.
    """

    value: float
    is_greedy: bool


def is_autoregressive(spec: DiffusionSpec) -> bool:
    """Whether the policy writes one token after another, so that the chain rule gives its likelihood exactly."""
    return spec.attention == "block" and spec.block_size == 1


@torch.no_grad()
def chain_likelihoods(
    policy: Policy, prompts: list[list[int]], continuations: list[list[int]], batch_size: int = 32
) -> list[Likelihood]:
    """
    Log-likelihood of continuations when they are unmasked from left to right, a token at a step:
    `sum_i log p(y_i | prompt, y_1 .. y_{i-1}, the rest masked)`. Nothing is random.

    It is the exact likelihood under that order of decoding. With blocks of one token there is no other order, and it is
    the likelihood of the policy. Costs a row for each token (full attention), for each token of a block (block
    attention), or a single one (blocks of one token).

    Args:
        policy ([`Policy`]): the policy.
        prompts, continuations (`list[list[int]]`): token ids. No prompt may be empty.
        batch_size (`int`, *optional*, defaults to `32`): rows of a forward pass.

    Raises:
        ValueError: naming the prompt or continuation, if it holds the mask token or a token that does not exist.
        FloatingPointError: naming the continuation, if its likelihood is NaN or infinite.
    """
    _check_tokens(policy, prompts, continuations)
    found = [_chain(policy, *pair, batch_size) for pair in zip(prompts, continuations, strict=True)]
    _check_finite([likelihood.value for likelihood in found])
    return found


def _chain(policy: Policy, prompt: list[int], continuation: list[int], batch_size: int) -> Likelihood:
    if not continuation:
        return Likelihood(0.0, True)
    batch = given_order(_finished([prompt], [continuation], policy.spec), policy.spec, "left_to_right")
    batch = batch.to(policy.device)
    rows, states = all_states(batch, policy.spec).view_rows()
    value, is_greedy = 0.0, True
    for begin in range(0, len(rows), batch_size):
        chunk = slice(begin, begin + batch_size)
        views = States(states.hidden[chunk], states.coefficients[chunk], states.weights[chunk])
        if not (views.coefficients != 0).any():
            continue
        log_probs, greedy = _read(policy, batch.select(rows[chunk]), views)
        value += log_probs.double().sum().item()
        is_greedy &= bool(greedy.all())
    return Likelihood(value, is_greedy)


def _read(policy: Policy, batch: TrajectoryBatch, states: States) -> tuple[Tensor, Tensor]:
    """Log-probability of each scored token, and whether it is the most likely one, both `(M,)`."""
    layout = pack(batch, policy.spec, states)
    logits = layout_logits(policy.model, layout)
    log_probs = log_distribution(logits, policy.spec)
    choices = log_probs.index_fill(-1, torch.tensor(policy.spec.mask_token_id, device=logits.device), -torch.inf)
    return log_probs.gather(1, layout.targets[:, None]).squeeze(1), choices.argmax(-1) == layout.targets


@torch.no_grad()
def elbo_likelihoods(
    policy: Policy,
    prompts: list[list[int]],
    continuations: list[list[int]],
    num_draws: int = 128,
    seed: int = 0,
    batch_size: int = 32,
) -> list[float]:
    """
    Evidence lower bound of the log-likelihood of continuations, estimated with `num_draws` random masks. With block
    attention, it is the sum of the bounds of the blocks, each given the blocks before it; with full attention, that of
    the continuation as a whole. An estimate depends on its own prompt and continuation, `num_draws` and `seed` alone,
    and continuations of the same length are hidden by the same masks, so that choices are compared on equal terms.

    Args:
        policy ([`Policy`]): the policy.
        prompts, continuations (`list[list[int]]`): token ids. No prompt may be empty.
        num_draws (`int`, *optional*, defaults to `128`): random masks for each continuation.
        seed (`int`, *optional*, defaults to `0`): source of the masks.
        batch_size (`int`, *optional*, defaults to `32`): rows of a forward pass, one for each mask.

    Returns:
        `list[float]`: the estimates, in nats.

    Raises:
        ValueError: if `num_draws` is not positive, or, naming it, if a prompt or continuation holds the mask token or a
            token that does not exist.
        FloatingPointError: naming the continuation, if its estimate is NaN or infinite.
    """
    check_at_least("num_draws", num_draws)
    _check_tokens(policy, prompts, continuations)
    seeds = [derive_seed(seed, draw) for draw in range(num_draws)]
    jobs = [(row, draw_seed) for row, text in enumerate(continuations) if text for draw_seed in seeds]
    totals = [0.0] * len(prompts)
    for begin in range(0, len(jobs), batch_size):
        rows = [row for row, _ in jobs[begin : begin + batch_size]]
        batch = _finished([prompts[row] for row in rows], [continuations[row] for row in rows], policy.spec)
        batch = batch.to(policy.device)
        draw_seeds = [draw_seed for _, draw_seed in jobs[begin : begin + batch_size]]
        states = elbo(batch, policy.spec, draw_seeds, EstimatorConfig(name="elbo"))
        layout = pack(batch, policy.spec, states)
        log_probs, _ = score(policy.model, layout, policy.spec)
        for row, value in zip(rows, (layout.weights * log_probs).double().sum(1).tolist(), strict=True):
            totals[row] += value / num_draws
    _check_finite(totals)
    return totals


def _check_tokens(policy: Policy, prompts: list[list[int]], continuations: list[list[int]]) -> None:
    """Raises a `ValueError` that names the first text that cannot have been written."""
    vocab_size = unwrap(policy.model).config.get_text_config().vocab_size
    for name, texts in (("Prompt", prompts), ("Continuation", continuations)):
        for number, text in enumerate(texts):
            found = impossible_token(text, policy.spec, vocab_size)
            if found is not None:
                raise ValueError(f"{name} {number}, position {found[0]}, holds {found[1]}: it has no likelihood.")


def _check_finite(values: list[float]) -> None:
    for number, value in enumerate(values):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"Continuation {number}: the policy's log-likelihood of it is {value}. {NON_FINITE_ADVICE}"
            )


def _finished(prompts: list[list[int]], continuations: list[list[int]], spec: DiffusionSpec) -> TrajectoryBatch:
    """
    Prompts with their continuations. With block attention the last block is filled up with positions that stay masked,
    which is what a decoder would have had in front of it; with full attention the sequence ends with the continuation,
    as in the families' published evaluations.
    """
    return finished_batch(prompts, continuations, spec if spec.attention == "block" else spec.replace(block_size=1))
