"""Which states of a trajectory are scored, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..trajectories.trajectory import TokenStates


_MASK64 = (1 << 64) - 1


def derive_seed(*parts: int) -> int:
    """
    Mixes integers into one seed between 0 and 2**63 - 1 (SplitMix64 finaliser, chained), so that a random stream can
    be addressed by what it is for, such as `(seed, row, iteration)`, instead of by what was drawn before it.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (int(part) & _MASK64)) & _MASK64
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


@dataclass
class StepDraw:
    """
    Decoding steps drawn in each of the `S` groups (blocks) of `R` responses, up to `K` in each.

    Attributes:
        steps (`Tensor` of shape `(R, S, K)`):
            Decoding step inside the block, -1 for no draw.
        weights (`Tensor` of shape `(R, S, K)`, float32):
            Weight of the step's log-ratio in the estimate, 0 where `steps` is -1.
        block_weights (`Tensor` of shape `(R, S)`, float32):
            Weight of a log-ratio that belongs to the block and is in every pass over it, 0 where the block is not
            scored: `S / m` if `m` of `S` blocks are.
    """

    steps: Tensor
    weights: Tensor
    block_weights: Tensor


def count_tokens(token_blocks: Tensor, token_steps: Tensor, counted: Tensor) -> Tensor:
    """
    Number of counted tokens that each step of each block unmasked.

    Returns:
        `Tensor` of shape `(R, S, T)` for `S` blocks and `T` steps, the largest numbers of either in the batch.
    """
    counted = counted & (token_steps >= 0)
    num_blocks = int(token_blocks[counted].max()) + 1 if counted.any() else 1
    num_steps = int(token_steps[counted].max()) + 1 if counted.any() else 1
    cells = token_blocks.clamp(0, num_blocks - 1) * num_steps + token_steps.clamp(0, num_steps - 1)
    counts = torch.zeros(len(counted), num_blocks * num_steps, dtype=torch.long, device=counted.device)
    counts.scatter_add_(1, cells, counted.long())
    return counts.view(-1, num_blocks, num_steps)


def draw_steps(
    tokens: TokenStates,
    seeds: list[int],
    distribution: Literal["uniform", "token"] = "uniform",
    num_draws: int = 1,
    weighting: Literal["unbiased", "none"] = "unbiased",
    num_blocks: int | None = None,
) -> StepDraw:
    r"""
    Draws `num_draws` decoding steps per block, independently for each block (METHOD.md, section 2).

    A step takes part if it unmasked at least one drawable token; the others contribute nothing to the log-ratio. With
    `d[t]` the log-ratio of the tokens unmasked at step `t` of a block with `T` such steps and `n` drawable tokens, and
    `weighting="unbiased"`, the expectation of `sum_draws weight * d[step]` is `sum_t d[t]`:

    - `"uniform"`: `K = min(num_draws, T)` different steps, each with weight `T / K`;
    - `"token"`: `K = num_draws` steps with replacement, step `t` with probability `n_t / n`, weight `n / (K * n_t)`.

    With `num_blocks`, only `m = min(num_blocks, S)` of a response's `S` blocks are drawn from, without replacement, all
    equally likely, and weights grow by `S / m`.

    Args:
        tokens ([`TokenStates`]):
            Block and decoding step of each canvas position, and what takes part. A block with a token that counts is one
            to draw from.
        seeds (`list[int]` of length `R`):
            One seed per response. A response's draw depends on its own seed and steps alone: not on its neighbours in
            the batch, and not on the global random state.
        distribution (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"` over steps, or `"token"` for proportional to the number of tokens a step unmasked.
        num_draws (`int`, *optional*, defaults to `1`):
            Draws per block.
        weighting (`str`, *optional*, defaults to `"unbiased"`):
            `"unbiased"` as above; `"none"` gives every draw the weight `1 / K` (the estimator as it is printed in the
            paper's figure, up to a factor that beta absorbs when all blocks have the same number of steps).
        num_blocks (`int`, *optional*):
            Blocks drawn from. All if `None`.

    Returns:
        [`StepDraw`]
    """
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1, got {num_draws}.")
    if num_blocks is not None and num_blocks < 1:
        raise ValueError(f"`num_blocks` must be at least 1, got {num_blocks}.")
    if len(seeds) != len(tokens.states):
        raise ValueError(f"`seeds` must hold one seed per response: got {len(seeds)} for {len(tokens.states)}.")
    if weighting not in ("unbiased", "none"):
        raise ValueError(f"`weighting` must be 'unbiased' or 'none', got {weighting!r}.")
    device = tokens.states.device
    in_block, counts = _count(TokenStates(*(values.cpu() for values in tokens)))
    block_weights = _pick_blocks(in_block > 0, seeds, num_blocks)
    picks = _pick(counts, seeds, distribution, num_draws)  # (R, S, K), -1 for none
    picks = torch.where(block_weights[..., None] > 0, picks, -1)
    valid = picks >= 0

    at_step = counts.gather(2, picks.clamp(min=0))  # |U[s, t]|
    drawn = valid.sum(-1, keepdim=True)  # K
    if weighting == "none":
        weights, block_weights = 1.0 / drawn, (block_weights > 0).float()
    else:
        number_of_steps = (counts > 0).sum(-1, keepdim=True)  # T_s
        total = counts.sum(-1, keepdim=True)  # n_s
        weights = number_of_steps / drawn if distribution == "uniform" else total / (drawn * at_step)
        weights = weights * block_weights[..., None]
    weights = torch.where(valid, weights.expand_as(picks).float(), 0.0)
    return StepDraw(picks.to(device), weights.to(device), block_weights.to(device))


def expected_weights(
    tokens: TokenStates, distribution: Literal["uniform", "token"] = "uniform", num_blocks: int | None = None
) -> Tensor:
    """What the token weights of each response sum to, on average over [`draw_steps`] with `weighting="none"`, `(R,)`."""
    in_block, counts = _count(tokens)
    counts = counts.float()
    chances = (counts > 0).float() if distribution == "uniform" else counts
    chances = chances / chances.sum(-1, keepdim=True).clamp(min=1)
    always = in_block - counts.sum(-1)  # in every pass over the block
    total = (chances * counts).sum((1, 2)) + always.sum(1)
    num = (in_block > 0).sum(1)
    return total if num_blocks is None else total * (num.clamp(max=num_blocks) / num.clamp(min=1))


def _count(tokens: TokenStates) -> tuple[Tensor, Tensor]:
    """Number of tokens that count in each block, `(R, S)`, and of those that each step unmasked, `(R, S, T)`."""
    groups, states, drawable, counted = tokens
    in_block = count_tokens(groups, torch.zeros_like(states), counted)[..., 0]
    counts = count_tokens(groups, states, drawable)
    return in_block, F.pad(counts, (0, 0, 0, in_block.shape[1] - counts.shape[1]))


def _pick_blocks(support: Tensor, seeds: list[int], num_blocks: int | None) -> Tensor:
    """Weight of each block, shape `(R, S)`: `S / m` for the `m` drawn ones of a row, 0 for the others."""
    if num_blocks is None:
        return support.float()
    weights = torch.zeros(support.shape)
    for row, seed in enumerate(seeds):
        blocks = support[row].nonzero().squeeze(1)
        if len(blocks):
            generator = torch.Generator().manual_seed(derive_seed(seed, 1))  # another stream than that of the steps
            drawn = blocks[torch.randperm(len(blocks), generator=generator)[:num_blocks]]
            weights[row, drawn] = len(blocks) / len(drawn)
    return weights


def _pick(counts: Tensor, seeds: list[int], distribution: str, num_draws: int) -> Tensor:
    """Steps drawn in each block, shape `(R, S, K)`, -1 where there is nothing (more) to draw."""
    support = counts > 0
    rows, blocks, steps = counts.shape
    if distribution == "uniform":
        width = min(num_draws, steps)
        keys = torch.full(counts.shape, torch.inf, dtype=torch.float64)
        for row, uniforms in _row_uniforms(support, seeds, steps_of_row=True):
            keys[row, : uniforms.shape[0], : uniforms.shape[1]] = uniforms
        keys = keys.masked_fill(~support, torch.inf)
        smallest = keys.topk(width, dim=-1, largest=False)
        return torch.where(torch.isinf(smallest.values), -1, smallest.indices)
    if distribution == "token":
        targets = torch.zeros(rows, blocks, num_draws, dtype=torch.float64)
        for row, uniforms in _row_uniforms(support, seeds, width=num_draws):
            targets[row, : uniforms.shape[0]] = uniforms
        cumulative = counts.cumsum(-1)
        thresholds = (targets * cumulative[..., -1:]).floor()  # a token index, uniform over the block's tokens
        picks = torch.searchsorted(cumulative.double().contiguous(), thresholds, right=True)
        return torch.where(support.any(-1, keepdim=True), picks.clamp(max=steps - 1), -1)
    raise ValueError(f"`distribution` must be 'uniform' or 'token', got {distribution!r}.")


def _row_uniforms(support: Tensor, seeds: list[int], width: int = 0, steps_of_row: bool = False):
    """Yields, row by row, uniforms whose number depends on that row alone, never on the widest row of the batch."""
    for row, seed in enumerate(seeds):
        used = support[row].nonzero()
        if len(used) == 0:
            continue
        num_blocks, num_steps = (used.max(0).values + 1).tolist()
        generator = torch.Generator().manual_seed(seed)
        columns = num_steps if steps_of_row else width
        yield row, torch.rand(num_blocks, columns, generator=generator, dtype=torch.float64)
