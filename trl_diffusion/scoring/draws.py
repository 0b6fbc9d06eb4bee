"""Which states of a trajectory are scored, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import check_at_least, check_one_of
from ..seeds import derive_seed
from ..trajectories.trajectory import TokenStates


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


StepDistribution = Literal["uniform", "token", "importance"]
STEP_DISTRIBUTIONS: tuple[StepDistribution, ...] = ("uniform", "token", "importance")
UNIFORM_SHARE = 0.1  # of an importance draw: it draws no step ten times more rarely than a uniform one


def draw_steps(
    tokens: TokenStates,
    seeds: list[int],
    distribution: StepDistribution = "uniform",
    num_draws: int = 1,
    weighting: Literal["unbiased", "none"] = "unbiased",
    num_blocks: int | None = None,
    surprises: Tensor | None = None,
) -> StepDraw:
    r"""
    Draws `num_draws` decoding steps per block, independently for each block (docs/method.md, section 2).

    A step takes part if it unmasked at least one drawable token; the others contribute nothing to the log-ratio. With
    `d[t]` the log-ratio of the tokens unmasked at step `t` of a block with `T` such steps and `n` drawable tokens, and
    `weighting="unbiased"`, the expectation of `sum_draws weight * d[step]` is `sum_t d[t]`. `K = min(num_draws, T)`
    different steps are drawn, step `t` with probability `p_t` and weight `1 / p_t`:

    - `"uniform"`: `p_t = K / T`;
    - `"token"`: `p_t` is proportional to the number `n_t` of tokens that the step unmasked;
    - `"importance"`: `p_t` is proportional to `0.9 * m_t / m + 0.1 / T`. Here `m_t` is the sum of `1 - p` over the tokens of
      the step, for the probability `p` that was recorded when a token was unmasked, and `m` that of the block. A step whose
      tokens were certain has hardly any gradient, and is rarely drawn. A weight is at most `max(1, 10 * T / K)`. In a block
      without surprises the draw is uniform, as it is where nothing was recorded.

    Where the share of a step in the `K` draws would be 1 or more, it is always drawn, with weight 1, and the rest is shared
    among the others likewise. The steps are laid end to end in a random order, each as long as it is probable, and a grid
    of spacing 1 with a random start picks them: Madow's systematic sampling with probabilities proportional to size. With
    `num_draws >= T` every distribution is exact.

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
            `"uniform"`, `"token"` or `"importance"`, as above.
        num_draws (`int`, *optional*, defaults to `1`):
            Draws per block.
        weighting (`str`, *optional*, defaults to `"unbiased"`):
            `"unbiased"` as above; `"none"` gives every draw the weight `1 / K` (the estimator as it is printed in the
            paper's figure, up to a factor that beta absorbs when all blocks have the same number of steps).
        num_blocks (`int`, *optional*):
            Blocks drawn from. All if `None`.
        surprises (`Tensor` of shape `(R, C)`, *optional*):
            `1 - p` of each token, between 0 and 1; `"importance"` needs it.

    Returns:
        [`StepDraw`]

    Raises:
        ValueError: for an option that is not listed, a number below 1, too few seeds, `"importance"` without `surprises`, or
            with `weighting="none"`, which would count surprising steps more.

    Example: block 0 has two tokens and two steps, block 1 four tokens and three steps.

    ```python
    >>> import torch
    >>> from trl_diffusion.scoring.draws import draw_steps
    >>> from trl_diffusion.trajectories.trajectory import TokenStates
    >>> blocks = torch.tensor([[0, 0, 1, 1, 1, 1]])
    >>> steps = torch.tensor([[1, 0, 0, 2, 1, 0]])  # the step at which each token was unmasked
    >>> all_count = torch.ones_like(steps, dtype=torch.bool)
    >>> draw = draw_steps(TokenStates(blocks, steps, all_count, all_count), seeds=[0])
    >>> draw.steps.tolist()  # of both blocks, step 1
    [[[1], [1]]]
    >>> draw.weights.tolist()  # it was one of two steps in block 0, and one of three in block 1
    [[[2.0], [3.0]]]

    ```
    """
    check_at_least("num_draws", num_draws)
    if num_blocks is not None:
        check_at_least("num_blocks", num_blocks)
    if len(seeds) != len(tokens.states):
        raise ValueError(f"`seeds` must hold one seed per response: got {len(seeds)} for {len(tokens.states)}.")
    check_one_of("weighting", weighting, ("unbiased", "none"))
    check_one_of("distribution", distribution, STEP_DISTRIBUTIONS)
    if distribution == "importance" and (surprises is None or weighting == "none"):
        raise ValueError("`distribution='importance'` needs `surprises` and `weighting='unbiased'`.")
    device = tokens.states.device
    tokens = TokenStates(*(values.cpu() for values in tokens))
    in_block, counts = _count(tokens)
    sizes = step_sizes(tokens, counts, distribution, surprises)
    block_weights = _pick_blocks(in_block > 0, seeds, num_blocks)
    picks = _pick(sizes, seeds, distribution, num_draws)  # (R, S, K), -1 for none
    picks = torch.where(block_weights[..., None] > 0, picks, -1)
    valid = picks >= 0

    if weighting == "none":
        weights, block_weights = 1.0 / valid.sum(-1, keepdim=True), (block_weights > 0).float()
    else:
        chances = inclusion(sizes, num_draws).gather(2, picks.clamp(min=0))
        weights = block_weights[..., None] / chances
    weights = torch.where(valid, weights.expand_as(picks).float(), 0.0)
    return StepDraw(picks.to(device), weights.to(device), block_weights.to(device))


def step_sizes(
    tokens: TokenStates, counts: Tensor, distribution: StepDistribution, surprises: Tensor | None = None
) -> Tensor:
    """
    What the probability of drawing a step is proportional to; 0 for a step that does not take part.

    Args:
        tokens ([`TokenStates`]): see [`draw_steps`].
        counts (`Tensor` of shape `(R, S, T)`): drawable tokens that each step unmasked.
        distribution, surprises: see [`draw_steps`].

    Returns:
        float64 `Tensor` of shape `(R, S, T)`.
    """
    if distribution == "token":
        return counts.double()
    uniform = (counts > 0).double()
    if distribution == "uniform" or surprises is None:
        return uniform
    taking_part = tokens.drawable & (tokens.states >= 0)
    values = torch.where(taking_part, surprises.cpu().double().clamp(0.0, 1.0), 0.0)
    cells = tokens.groups.clamp(0, counts.shape[1] - 1) * counts.shape[2] + tokens.states.clamp(0, counts.shape[2] - 1)
    masses = torch.zeros(len(counts), counts.shape[1] * counts.shape[2], dtype=torch.float64)
    masses = masses.scatter_add_(1, cells, values).view_as(uniform)
    total, number = masses.sum(-1, keepdim=True), uniform.sum(-1, keepdim=True)
    shares = (1 - UNIFORM_SHARE) * masses / total + UNIFORM_SHARE * uniform / number
    return torch.where(total > 0, shares, uniform)


def inclusion(sizes: Tensor, num_draws: int) -> Tensor:
    """
    Probability with which each step is among those drawn in its block.

    Args:
        sizes (float64 `Tensor` of shape `(R, S, T)`): see [`step_sizes`].
        num_draws (`int`): draws per block.

    Returns:
        float64 `Tensor` of shape `(R, S, T)`; its sum over the steps of a block is the number of different steps drawn.
    """
    support = sizes > 0
    number = support.sum(-1, keepdim=True).clamp(max=num_draws)  # K
    certain = torch.zeros_like(support)
    while True:
        rest = sizes.masked_fill(certain, 0.0)
        share = rest * (number - certain.sum(-1, keepdim=True))  # p_t times what is left of the sum of sizes
        total = rest.sum(-1, keepdim=True)
        more = (rest > 0) & (share >= total * (1 - 1e-12))  # sums of fractions are rounded
        if not more.any():
            return torch.where(certain, 1.0, share / torch.where(total > 0, total, 1.0))
        certain |= more


def expected_weights(
    tokens: TokenStates,
    distribution: StepDistribution = "uniform",
    num_draws: int = 1,
    num_blocks: int | None = None,
) -> Tensor:
    """What the token weights of each response sum to, on average over [`draw_steps`] with `weighting="none"`, `(R,)`."""
    in_block, counts = _count(tokens)
    chances = inclusion(step_sizes(tokens, counts, distribution), num_draws).float()
    chances = chances / chances.sum(-1, keepdim=True).clamp(min=1)
    counts = counts.float()
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


def _pick(sizes: Tensor, seeds: list[int], distribution: StepDistribution, num_draws: int) -> Tensor:
    """Steps drawn in each block, shape `(R, S, K)`, -1 where there is nothing (more) to draw."""
    support = sizes > 0
    width = min(num_draws, sizes.shape[-1])
    keys, starts = _row_uniforms(support, seeds)
    keys = keys.masked_fill(~support, torch.inf)
    if distribution != "uniform":
        # The steps in a random order, each as long as it is probable, on a line whose whole numbers, shifted by a
        # random start, are the draws: no step is longer than 1, so none is drawn twice.
        order = keys.argsort(-1)
        ends = inclusion(sizes, num_draws).gather(-1, order).cumsum(-1)
        marks = (ends - starts[..., None]).ceil().long().clamp(min=0)  # draws before each end
        marked = marks.diff(dim=-1, prepend=torch.zeros_like(marks[..., :1])) > 0
        drawn = torch.zeros_like(support).scatter(-1, order, marked) & support
        keys = torch.where(drawn, keys, torch.inf)
    smallest = keys.topk(width, dim=-1, largest=False)
    return torch.where(torch.isinf(smallest.values), -1, smallest.indices)


def _row_uniforms(support: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """A uniform number for each step, `(R, S, T)`, and for each block, `(R, S)`. Those of a row depend on its own seed,
    blocks and steps alone, never on the widest row of the batch."""
    of_steps = torch.full(support.shape, torch.inf, dtype=torch.float64)
    of_blocks = torch.zeros(support.shape[:2], dtype=torch.float64)
    for row, seed in enumerate(seeds):
        used = support[row].nonzero()
        if len(used) == 0:
            continue
        num_blocks, num_steps = (used.max(0).values + 1).tolist()
        generator = torch.Generator().manual_seed(seed)
        of_steps[row, :num_blocks, :num_steps] = torch.rand(
            num_blocks, num_steps, generator=generator, dtype=torch.float64
        )
        of_blocks[row, :num_blocks] = torch.rand(num_blocks, generator=generator, dtype=torch.float64)
    return of_steps, of_blocks
