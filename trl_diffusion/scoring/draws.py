"""Draws the states of a trajectory that are scored, and computes their weights."""

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
    Denoising steps drawn in the `S` blocks of `R` responses, at most `K` in each block.

    With full attention the whole response counts as one block here (see [`~trajectories.trajectory.token_states`]).

    Attributes:
        steps (`Tensor` of shape `(R, S, K)`):
            Denoising step inside the block. -1 stands for no draw.
        weights (`Tensor` of shape `(R, S, K)`, float32):
            Weight of the step's log-ratio in the estimate. It is 0 where `steps` is -1.
        block_weights (`Tensor` of shape `(R, S)`, float32):
            Weight of the tokens that every pass over the block scores. It is `S / m` if `m` of `S` blocks are scored,
            and 0 for a block that is not scored.
    """

    steps: Tensor
    weights: Tensor
    block_weights: Tensor


def count_tokens(token_blocks: Tensor, token_steps: Tensor, counted: Tensor) -> Tensor:
    """
    Number of counted tokens that each step of each block unmasked.

    Args:
        token_blocks, token_steps, counted (`Tensor` of shape `(R, E)`): block and step of each write, and whether it counts.

    Returns:
        `Tensor` of shape `(R, S, T)`. `S` and `T` are the largest numbers of blocks and of steps in the batch.
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
# Uniform part of an importance draw. The probability of a step is at least a tenth of its probability in a
# uniform draw.
UNIFORM_SHARE = 0.1


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
    Draws `num_draws` denoising steps per block, independently for each block (docs/method.md, section 2).

    A step takes part in the draw if it unmasked at least one drawable token. Other steps add nothing to the log-ratio.

    Take a block with $T$ steps that take part. $d_t$ is the log-ratio of the tokens that step $t$ unmasked. With
    `weighting="unbiased"`, the expected sum of the weighted log-ratios of the drawn steps is $\sum_t d_t$. The draw takes
    $K = \min(\text{num draws}, T)$ different steps. Step $t$ is drawn with probability $p_t$ and has the weight $1 / p_t$:

    - `"uniform"`: $p_t = K / T$.
    - `"token"`: $p_t$ is proportional to $n_t$, the number of drawable tokens that the step unmasked.
    - `"importance"`: $p_t$ is proportional to $0.9 m_t / m + 0.1 / T$. Each token has a surprise $1 - p$, where $p$
      is the probability recorded when the token was unmasked. $m_t$ is the sum of the surprises over the tokens of the
      step, and $m$ is the sum over the block. A step whose tokens were certain has almost no gradient and is rarely
      drawn. A weight is at most $\max(1, 10 T / K)$. The draw is uniform in a block whose surprises are all 0, and in
      a block without recorded probabilities.

    The $p_t$ of a block add up to $K$. For some steps this rule would give a $p_t$ of 1 or more. Such a step is always
    drawn, with weight 1. The remaining draws are shared among the other steps by the same rule.

    The draw uses Madow's systematic sampling with probabilities proportional to size. It puts the steps end to end on
    a line, in a random order. The length of a step is its probability. A grid with spacing 1 and a random start picks
    the steps that its points fall into. With at least $T$ draws every step is drawn, so the result is exact with every
    distribution.

    With `num_blocks`, steps are drawn only in $k = \min(\text{num blocks}, S)$ of the $S$ blocks of a response. These
    blocks are chosen uniformly, without replacement. With `weighting="unbiased"`, all weights are then multiplied by
    $S / k$.

    Args:
        tokens ([`TokenStates`]):
            Block and denoising step of each write, and which writes take part. A block can be drawn from if one of its
            writes counts.
        seeds (`list[int]` of length `R`):
            One seed per response. The draw of a response depends only on its seed and its steps. It depends neither on
            the other responses in the batch nor on the global random state.
        distribution (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`, `"token"` or `"importance"`, as above.
        num_draws (`int`, *optional*, defaults to `1`):
            Draws per block.
        weighting (`str`, *optional*, defaults to `"unbiased"`):
            `"unbiased"`: as above. `"none"`: every draw has the weight $1 / K$, as in the paper's figure. If all
            blocks have the same number of steps, `"none"` only changes the scale of the estimate, which `beta` can
            absorb.
        num_blocks (`int`, *optional*):
            Number of blocks to draw from. `None` means all blocks.
        surprises (`Tensor` of shape `(R, E)`, *optional*):
            Surprise $1 - p$ of each write, between 0 and 1. `"importance"` needs it.

    Returns:
        [`StepDraw`]

    Raises:
        ValueError: if an option has an unknown value, a number is below 1, or the number of seeds is not the number of
            responses. Also if `"importance"` has no `surprises`, or is combined with `weighting="none"`, which would
            give surprising steps too much weight.

    Example: block 0 has two tokens and two steps. Block 1 has four tokens and three steps.

    ```python
    >>> import torch
    >>> from trl_diffusion.scoring.draws import draw_steps
    >>> from trl_diffusion.trajectories.trajectory import TokenStates
    >>> blocks = torch.tensor([[0, 0, 1, 1, 1, 1]])
    >>> steps = torch.tensor([[1, 0, 0, 2, 1, 0]])  # step that unmasked it
    >>> all_count = torch.ones_like(steps, dtype=torch.bool)
    >>> tokens = TokenStates(blocks, steps, all_count, all_count)
    >>> draw = draw_steps(tokens, seeds=[0])
    >>> draw.steps.tolist()  # step 1 is drawn in both blocks
    [[[1], [1]]]
    >>> draw.weights.tolist()  # block 0 has two steps, block 1 has three
    [[[2.0], [3.0]]]

    ```
    """
    check_at_least("num_draws", num_draws)
    if num_blocks is not None:
        check_at_least("num_blocks", num_blocks)
    if len(seeds) != len(tokens.states):
        raise ValueError(
            f"`seeds` must hold one seed per response: got {len(seeds)} seeds for {len(tokens.states)} responses."
        )
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
    Size of each step. The probability of drawing a step is proportional to its size.

    A step that does not take part in the draw has size 0.

    Args:
        tokens ([`TokenStates`]): see [`draw_steps`].
        counts (`Tensor` of shape `(R, S, T)`): number of drawable tokens that each step unmasked.
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
    Probability that a step is drawn in its block.

    Args:
        sizes (float64 `Tensor` of shape `(R, S, T)`): see [`step_sizes`].
        num_draws (`int`): draws per block.

    Returns:
        float64 `Tensor` of shape `(R, S, T)`. The sum over the steps of a block is the number of different steps
        drawn.
    """
    support = sizes > 0
    number = support.sum(-1, keepdim=True).clamp(max=num_draws)  # K
    certain = torch.zeros_like(support)
    while True:
        rest = sizes.masked_fill(certain, 0.0)
        share = rest * (number - certain.sum(-1, keepdim=True))  # p_t times the sum of the remaining sizes
        total = rest.sum(-1, keepdim=True)
        more = (rest > 0) & (share >= total * (1 - 1e-12))  # tolerance for rounding in the sum
        if not more.any():
            return torch.where(certain, 1.0, share / torch.where(total > 0, total, 1.0))
        certain |= more


def expected_weights(
    tokens: TokenStates,
    distribution: StepDistribution = "uniform",
    num_draws: int = 1,
    num_blocks: int | None = None,
) -> Tensor:
    """
    Expected sum of the token weights of each response, over the draws of [`draw_steps`] with `weighting="none"`.

    Returns:
        `Tensor` of shape `(R,)`.
    """
    in_block, counts = _count(tokens)
    chances = inclusion(step_sizes(tokens, counts, distribution), num_draws).float()
    chances = chances / chances.sum(-1, keepdim=True).clamp(min=1)
    counts = counts.float()
    always = in_block - counts.sum(-1)  # tokens that every pass over the block scores
    total = (chances * counts).sum((1, 2)) + always.sum(1)
    num = (in_block > 0).sum(1)
    return total if num_blocks is None else total * (num.clamp(max=num_blocks) / num.clamp(min=1))


def _count(tokens: TokenStates) -> tuple[Tensor, Tensor]:
    """Number of counted tokens in each block, `(R, S)`, and number of drawable tokens of each step, `(R, S, T)`."""
    groups, states, drawable, counted = tokens
    in_block = count_tokens(groups, torch.zeros_like(states), counted)[..., 0]
    counts = count_tokens(groups, states, drawable)
    return in_block, F.pad(counts, (0, 0, 0, in_block.shape[1] - counts.shape[1]))


def _pick_blocks(support: Tensor, seeds: list[int], num_blocks: int | None) -> Tensor:
    """Weight of each block, shape `(R, S)`: `S / m` for the `m` drawn blocks of a response, 0 for the others."""
    if num_blocks is None:
        return support.float()
    weights = torch.zeros(support.shape)
    for row, seed in enumerate(seeds):
        blocks = support[row].nonzero().squeeze(1)
        if len(blocks):
            generator = torch.Generator().manual_seed(derive_seed(seed, 1))  # not the random stream of the steps
            drawn = blocks[torch.randperm(len(blocks), generator=generator)[:num_blocks]]
            weights[row, drawn] = len(blocks) / len(drawn)
    return weights


def _pick(sizes: Tensor, seeds: list[int], distribution: StepDistribution, num_draws: int) -> Tensor:
    """Steps drawn in each block, shape `(R, S, K)`. A block with fewer than `K` steps is filled up with -1."""
    support = sizes > 0
    width = min(num_draws, sizes.shape[-1])
    keys, starts = _row_uniforms(support, seeds)
    keys = keys.masked_fill(~support, torch.inf)
    if distribution != "uniform":
        # Put the steps on a line in a random order. The length of a step is its probability. A grid with spacing 1 and
        # a random start picks the steps. No step is longer than 1, so no step is drawn twice.
        order = keys.argsort(-1)
        ends = inclusion(sizes, num_draws).gather(-1, order).cumsum(-1)
        marks = (ends - starts[..., None]).ceil().long().clamp(min=0)  # grid points before the end of each step
        marked = marks.diff(dim=-1, prepend=torch.zeros_like(marks[..., :1])) > 0
        drawn = torch.zeros_like(support).scatter(-1, order, marked) & support
        keys = torch.where(drawn, keys, torch.inf)
    smallest = keys.topk(width, dim=-1, largest=False)
    return torch.where(torch.isinf(smallest.values), -1, smallest.indices)


def _row_uniforms(support: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """
    A uniform random number for each step, `(R, S, T)`, and for each block, `(R, S)`.

    The numbers of a response depend only on its seed, its blocks and its steps. The size of the batch does not matter.
    """
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
