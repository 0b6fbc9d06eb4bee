"""Estimators of a response's log-probability. Each decides which states are scored, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import AtLeast, Within, check_fields, check_one_of
from ..policies.spec import DiffusionSpec
from ..seeds import derive_seed
from ..trajectories.by_block import at_block, rank_in_block, sum_by_block
from ..trajectories.selection import Selection
from ..trajectories.trajectory import NEVER, TrajectoryBatch, token_states
from .draws import StepDistribution, draw_steps
from .states import States, all_states, drawn_states, states_to_draw


COUPLED_RANGE = (0.2, 0.8)  # range of the mask ratio of coupled-GRPO


@dataclass(frozen=True)
class EstimatorConfig:
    r"""
    Settings of an estimator.

    Args:
        name (`str`, *optional*, defaults to `"dtrpo"`):
            One of [`ESTIMATORS`].
        num_draws (`int`, *optional*, defaults to `1`):
            `"dtrpo"`: steps drawn per block. `"elbo"`: random masks per response.
        step_distribution (`str`, *optional*, defaults to `"importance"`):
            `"dtrpo"`: distribution from which a step is drawn, `"importance"`, `"uniform"` or `"token"` (see [`draw_steps`]).
        weighting (`str`, *optional*, defaults to `"unbiased"`):
            `"dtrpo"`: `"unbiased"` or `"none"` (see [`draw_steps`]).
        num_blocks (`int`, *optional*):
            `"dtrpo"` with block attention: number of blocks scored per response, drawn at random. `None`: all.
        prompt_mask_probability (`float`, *optional*, defaults to `0.15`):
            `"mean_field"`: probability with which a prompt token is masked.
        selection ([`Selection`], *optional*):
            `"dtrpo"` and `"exact"`: how positions were selected, if the selection is scored as well.

    Raises:
        ValueError: for an unknown estimator or a value out of range.
    """

    name: str = "dtrpo"
    num_draws: Annotated[int, AtLeast(1)] = 1
    step_distribution: StepDistribution = "importance"
    weighting: Literal["unbiased", "none"] = "unbiased"
    num_blocks: Annotated[int, AtLeast(1)] | None = None
    prompt_mask_probability: Annotated[float, Within("[0, 1)")] = 0.15
    selection: Selection | None = None

    def __post_init__(self):
        check_one_of("estimator", self.name, ESTIMATORS)
        check_fields(self)
        if self.weighting == "none" and self.step_distribution == "importance":
            raise ValueError(
                "`step_distribution='importance'` needs `weighting='unbiased'`: without weights, steps with surprising tokens "
                "would have more influence. Set `step_distribution='uniform'`."
            )
        for name, users in (
            ("num_draws", ("dtrpo", "elbo")),
            ("step_distribution", ("dtrpo",)),
            ("weighting", ("dtrpo",)),
            ("num_blocks", ("dtrpo",)),
            ("prompt_mask_probability", ("mean_field",)),
            ("selection", ("dtrpo", "exact")),
        ):
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and self.name not in users:
                raise ValueError(
                    f"`{name}` is for estimator={' or '.join(repr(user) for user in users)}, not for {self.name!r}; "
                    f"leave it at {default!r}."
                )


def check_estimator(config: EstimatorConfig, spec: DiffusionSpec) -> None:
    """Raises a `ValueError` for a setting that does not apply to this policy."""
    if config.num_blocks is not None and spec.attention == "full":
        raise ValueError(
            "`num_blocks` (`num_scored_blocks` of the trainer) is for block attention. With full attention a row holds one state, and "
            "`num_draws` sets the number of rows."
        )


@dataclass(frozen=True)
class Estimator:
    """
    An estimator.

    Attributes:
        states (callable): `(batch, spec, seeds, config) -> States`; `seeds` holds one seed per response.
        recorded (`bool`):
            Whether it scores tokens in the states in which they were unmasked. The log-probabilities recorded while
            decoding are then those of the old policy in these states.
        one_row (`bool`):
            Whether, with block attention, all views of a response run in one packed row, instead of one row each.
    """

    states: Callable[[TrajectoryBatch, DiffusionSpec, list[int], EstimatorConfig], States]
    recorded: bool
    one_row: bool


def dtrpo(batch: TrajectoryBatch, spec: DiffusionSpec, seeds: list[int], config: EstimatorConfig) -> States:
    """
    State reduction of dTRPO (https://huggingface.co/papers/2603.18806; docs/method.md, section 2). It draws `num_draws`
    denoising steps of each block (full attention: of the response), and scores the tokens that these steps unmasked.

    Forward passes per response: 1 with block attention, `num_draws` with full attention.
    """
    check_estimator(config, spec)
    draw = draw_steps(
        states_to_draw(batch, spec, config.selection),
        seeds,
        distribution=config.step_distribution,
        num_draws=config.num_draws,
        weighting=config.weighting,
        num_blocks=config.num_blocks,
        surprises=-torch.expm1(batch.event_logps),
    )
    return drawn_states(batch, spec, draw, selection=config.selection)


def exact(batch: TrajectoryBatch, spec: DiffusionSpec, seeds: list[int], config: EstimatorConfig) -> States:
    """
    The whole trajectory: scores every token in the state in which it was unmasked (docs/method.md, section 1). Nothing
    is random.

    Forward passes per response: the largest number of steps of a block (block attention), or the number of all steps
    (full attention).
    """
    return all_states(batch, spec, selection=config.selection)


def elbo(batch: TrajectoryBatch, spec: DiffusionSpec, seeds: list[int], config: EstimatorConfig) -> States:
    """
    Evidence lower bound as in VRPO (LLaDA 1.5, https://huggingface.co/papers/2505.19223). A mask hides `m` of the `N`
    tokens of the final response, chosen at random, where `m` is uniform in 1 to `N`. The sum of the log-probabilities of
    these tokens is multiplied by `N / m`. The bound is the mean of this product over `num_draws` masks. With block
    attention each block has its own masks, given the blocks before it.

    The weight of a token is the sum of `N / m` over the masks that hide it, divided by `num_draws`. Its estimate is the
    mean of its log-probabilities over these masks, weighted by `N / m`. The weighted sum of the estimates is then the
    bound.

    Forward passes per response: `num_draws`.
    """
    tokens = final_tokens(batch, spec)
    groups, _, drawn, counted = tokens
    keys = uniforms(batch, seeds, config.num_draws)  # (R, W, C)
    sizes = at_block(groups, sum_by_block(groups, drawn[:, None].float()))  # (R, 1, C): N of the token's group
    sizes = sizes.expand(-1, config.num_draws, -1)
    # All positions of group `g` use number `g`.
    numbers = at_block(groups, uniforms(batch, [derive_seed(seed, 1) for seed in seeds], config.num_draws))
    num_masked = (numbers * sizes).floor() + 1  # m, uniform in 1 to N
    masked = drawn[:, None] & (rank_in_block(groups, keys, drawn[:, None]) < num_masked)
    shares = (masked & counted[:, None]) * sizes / num_masked / config.num_draws
    return masked_states(batch, tokens, masked, shares)


def mean_field(batch: TrajectoryBatch, spec: DiffusionSpec, seeds: list[int], config: EstimatorConfig) -> States:
    """
    One-step log-probabilities as in diffu-GRPO (d1, https://huggingface.co/papers/2504.12216). Every token of the
    response is scored while the whole response is masked (block attention: while its whole block is masked). Each
    prompt token is masked with probability `prompt_mask_probability`.

    Forward passes per response: 1.
    """
    _, autoregressive, drawn, counted = final_tokens(batch, spec)
    prompt_hidden = torch.zeros_like(batch.prompt_mask, dtype=torch.bool)
    for row, seed in enumerate(seeds):
        length = int(batch.prompt_lengths[row])
        chances = torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        hits = (chances < config.prompt_mask_probability).to(prompt_hidden.device)
        prompt_hidden[row, batch.prompt_mask[row].bool()] = hits
    scored = (counted & drawn).float()
    states = _random_states(batch, drawn[:, None], scored[:, None], scored, autoregressive, counted)
    states.prompt_hidden = prompt_hidden
    return states


def coupled(batch: TrajectoryBatch, spec: DiffusionSpec, seeds: list[int], config: EstimatorConfig) -> States:
    """
    Coupled sampling as in DiffuCoder (https://huggingface.co/papers/2506.20639). The mask ratio `r` is uniform in 0.2 to
    0.8. There are three states. The first masks each token with probability `r`. The second masks the tokens that the
    first leaves visible. The third masks all tokens. The estimate of a token is half its log-probability in the third
    state, plus half its log-probability in the first or second state, whichever masks it, divided by `r` or `1 - r`.
    With block attention, each block has its own states, given the blocks before it.

    Forward passes per response: 3.
    """
    _, autoregressive, drawn, counted = final_tokens(batch, spec)
    low, high = COUPLED_RANGE
    ratios = [
        low + (high - low) * torch.rand((), generator=torch.Generator().manual_seed(derive_seed(seed, 1))).item()
        for seed in seeds
    ]
    ratio = torch.tensor(ratios, device=drawn.device)[:, None]
    first = uniforms(batch, seeds, 1)[:, 0] < ratio
    masked = torch.stack([torch.ones_like(first), first, ~first], 1) & drawn[:, None]
    scored = (counted & drawn).float()
    worth = torch.stack([torch.full_like(ratio, 0.5), 0.5 / ratio, 0.5 / (1 - ratio)], 1)  # (R, 3, 1)
    return _random_states(batch, masked, masked * worth * scored[:, None], scored, autoregressive, counted)


ESTIMATORS: dict[str, Estimator] = {
    "dtrpo": Estimator(dtrpo, recorded=True, one_row=True),
    "exact": Estimator(exact, recorded=True, one_row=False),
    "elbo": Estimator(elbo, recorded=False, one_row=False),
    "mean_field": Estimator(mean_field, recorded=False, one_row=False),
    "coupled": Estimator(coupled, recorded=False, one_row=False),
}


class FinalTokens(NamedTuple):
    """
    The tokens of the final text, for estimators with masks of their own. All of shape `(R, C)`.

    Attributes:
        groups (`Tensor`): the group of each token. Tokens of a group are masked together.
        autoregressive (boolean `Tensor`): tokens that are always visible, and always scored if they count.
        drawn (boolean `Tensor`): tokens that can be masked.
        counted (boolean `Tensor`): tokens that count.
    """

    groups: Tensor
    autoregressive: Tensor
    drawn: Tensor
    counted: Tensor


def final_tokens(batch: TrajectoryBatch, spec: DiffusionSpec) -> FinalTokens:
    """The tokens of the final text. Estimators with masks of their own score these only, without writes that were taken back."""
    unmasked = batch.steps != NEVER
    groups, _, drawn, _ = token_states(spec, replace(batch, revisions=None), unmasked)
    return FinalTokens(groups, unmasked & ~drawn, drawn, batch.completion_mask & unmasked)


def counted_tokens(batch: TrajectoryBatch, spec: DiffusionSpec, config: EstimatorConfig) -> Tensor:
    """
    Number of tokens of each response that an estimator counts, `(R,)`. With `weighting="unbiased"` it is the expected sum of
    the weights over the draws. Estimators with masks of their own count the tokens of the completion. The others count the
    writes of [`counted_writes`].
    """
    if ESTIMATORS[config.name].recorded:
        return states_to_draw(batch, spec, config.selection).counted.sum(1)
    return final_tokens(batch, spec).counted.sum(1)


def masked_states(batch: TrajectoryBatch, tokens: FinalTokens, masked: Tensor, shares: Tensor) -> States:
    """
    States that hide the `masked` tokens. The estimate of a token is the mean of its log-probabilities over the states, weighted by
    `shares`. Its weight is the sum of `shares`.

    Args:
        batch ([`TrajectoryBatch`]): the responses.
        tokens ([`FinalTokens`]): which tokens are autoregressive, and which count.
        masked (boolean `Tensor` of shape `(R, W, C)`): what each state hides.
        shares (`Tensor` of shape `(R, W, C)`): weight of each token in each state.
    """
    weights = shares.sum(1)
    coefficients = shares / weights.clamp(min=torch.finfo(weights.dtype).tiny)[:, None]
    return _random_states(batch, masked, coefficients, weights, tokens.autoregressive, tokens.counted)


def _random_states(
    batch: TrajectoryBatch,
    masked: Tensor,
    coefficients: Tensor,
    weights: Tensor,
    autoregressive: Tensor,
    counted: Tensor,
) -> States:
    """States that hide the `masked` tokens. Autoregressive tokens are always visible and always scored."""
    always = (autoregressive & counted).float()
    coefficients = coefficients.clone()
    coefficients[:, 0] += always
    taken_back = batch.event_steps.shape[1] - batch.steps.shape[1]
    coefficients, weights = (F.pad(values.float(), (0, taken_back)) for values in (coefficients, weights + always))
    return States((batch.steps == NEVER)[:, None] | masked, coefficients, weights)


def uniforms(batch: TrajectoryBatch, seeds: list[int], num: int) -> Tensor:
    """Uniform random numbers, `(R, num, C)`, float64. Those of a row depend only on its seed and canvas length."""
    values = torch.zeros(len(batch), num, batch.canvas_ids.shape[1], dtype=torch.float64)
    for row, (seed, length) in enumerate(zip(seeds, batch.canvas_lengths.tolist(), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        values[row, :, :length] = torch.rand(num, length, generator=generator, dtype=torch.float64)
    return values.to(batch.canvas_ids.device)
