"""Which states of a trajectory are scored, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


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
    The states to score: `D` pairs of a block and a decoding step for each of `R` responses.

    Attributes:
        blocks (`Tensor` of shape `(R, D)`):
            Block of the response, -1 where a response has fewer draws than the widest one.
        steps (`Tensor` of shape `(R, D)`):
            Decoding step inside that block.
        weights (`Tensor` of shape `(R, D)`, float32):
            Weight of the step's log-ratio in the estimate, 0 where `blocks` is -1.
    """

    blocks: Tensor
    steps: Tensor
    weights: Tensor

    def token_weights(self, token_blocks: Tensor, token_steps: Tensor, counted: Tensor) -> Tensor:
        """
        The weight that each token carries under this draw, 0 where it is not scored.

        Args:
            token_blocks (`Tensor` of shape `(R, C)`):
                Block of each canvas position.
            token_steps (`Tensor` of shape `(R, C)`):
                Decoding step at which each canvas position was unmasked, -1 for never.
            counted (boolean `Tensor` of shape `(R, C)`):
                Positions that take part in the draw.

        Returns:
            float32 `Tensor` of shape `(R, C)`.
        """
        hit = (self.blocks[:, None, :] == token_blocks[:, :, None]) & (
            self.steps[:, None, :] == token_steps[:, :, None]
        )
        return (hit * self.weights[:, None, :]).sum(-1) * counted


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
    token_blocks: Tensor,
    token_steps: Tensor,
    counted: Tensor,
    seeds: list[int],
    distribution: Literal["uniform", "token"] = "uniform",
    num_draws: int = 1,
    weighting: Literal["unbiased", "none"] = "unbiased",
) -> StepDraw:
    r"""
    Draws `num_draws` decoding steps per block, independently for each block (METHOD.md, section 2).

    A step takes part if it unmasked at least one counted token; the others contribute nothing to the log-ratio. With
    `d[t]` the log-ratio of the tokens unmasked at step `t` of a block with `T` such steps and `n` counted tokens, and
    `weighting="unbiased"`, the expectation of `sum_draws weight * d[step]` is `sum_t d[t]`:

    - `"uniform"`: `K = min(num_draws, T)` different steps, each with weight `T / K`;
    - `"token"`: `K = num_draws` steps with replacement, step `t` with probability `n_t / n`, weight `n / (K * n_t)`.

    Args:
        token_blocks (`Tensor` of shape `(R, C)`):
            Block of each canvas position.
        token_steps (`Tensor` of shape `(R, C)`):
            Decoding step of each canvas position, -1 for never.
        counted (boolean `Tensor` of shape `(R, C)`):
            Positions that take part in the draw.
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

    Returns:
        [`StepDraw`]
    """
    if num_draws < 1:
        raise ValueError(f"`num_draws` must be at least 1, got {num_draws}.")
    if len(seeds) != len(token_steps):
        raise ValueError(f"`seeds` must hold one seed per response: got {len(seeds)} for {len(token_steps)}.")
    device = token_steps.device
    counts = count_tokens(token_blocks.cpu(), token_steps.cpu(), counted.cpu())  # (R, S, T)
    picks = _pick(counts, seeds, distribution, num_draws)  # (R, S, K), -1 for none
    valid = picks >= 0

    in_block = counts.sum(-1, keepdim=True)  # n_s
    at_step = counts.gather(2, picks.clamp(min=0))  # |U[s, t]|
    drawn = valid.sum(-1, keepdim=True)  # K
    if weighting == "none":
        weights = 1.0 / drawn
    elif weighting == "unbiased":
        number_of_steps = (counts > 0).sum(-1, keepdim=True)  # T_s
        weights = number_of_steps / drawn if distribution == "uniform" else in_block / (drawn * at_step)
    else:
        raise ValueError(f"`weighting` must be 'unbiased' or 'none', got {weighting!r}.")
    weights = torch.where(valid, weights.expand_as(picks).float(), 0.0)

    # One flat list of draws per response, those that exist first.
    blocks = torch.arange(picks.shape[1])[None, :, None].expand_as(picks)
    order = (~valid).flatten(1).long().sort(dim=1, stable=True).indices
    width = max(int(valid.flatten(1).sum(1).max()), 0) if len(valid) else 0
    flat = [
        tensor.flatten(1).gather(1, order)[:, :width] for tensor in (torch.where(valid, blocks, -1), picks, weights)
    ]
    return StepDraw(*(tensor.to(device) for tensor in flat))


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
