"""Decoding orders for responses that nobody watched being denoised (docs/method.md, section 6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..policies.spec import DiffusionSpec
from ..policies.trial import try_policy
from ..scoring.layout import pack
from ..scoring.score import score
from ..scoring.states import States
from ..seeds import derive_seed
from ..trajectories.trajectory import NEVER, TrajectoryBatch, autoregressive_positions, response_blocks


DecodingOrder = Literal["random", "left_to_right", "confidence"]
ORDERS = ("random", "left_to_right", "confidence")


def finished_batch(prompts: list[list[int]], responses: list[list[int]], spec: DiffusionSpec) -> TrajectoryBatch:
    """
    Responses of unknown order as a batch: the canvas is filled up to the end of its last block with positions that are
    never unmasked; `steps` are all 0.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tails = spec.prompt_tail(lengths)
    sizes = torch.tensor([len(response) for response in responses])
    canvas_lengths = -((tails + sizes) // -spec.block_size) * spec.block_size - tails
    width, prompt_width = int(canvas_lengths.max()), int(lengths.max())
    batch = TrajectoryBatch(
        prompt_ids=torch.zeros(len(prompts), prompt_width, dtype=torch.long),
        prompt_mask=(torch.arange(prompt_width) >= (prompt_width - lengths)[:, None]).long(),
        canvas_ids=torch.full((len(prompts), width), spec.mask_token_id),
        steps=torch.full((len(prompts), width), NEVER),
        logps=torch.zeros(len(prompts), width),
        canvas_lengths=canvas_lengths,
        completion_lengths=sizes,
    )
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        batch.prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        batch.canvas_ids[row, : len(response)] = torch.tensor(response)
        batch.steps[row, : len(response)] = 0
    return batch


def given_order(
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    order: Literal["random", "left_to_right"],
    tokens_per_step: int = 1,
    seeds: list[int] | None = None,
) -> TrajectoryBatch:
    """
    The batch with an order that needs no model: in every block, `tokens_per_step` tokens a step, in a uniformly random
    order or from left to right. Tokens made autoregressively come first, in a step of their own.

    Args:
        batch ([`TrajectoryBatch`]): finished responses.
        spec ([`DiffusionSpec`]): facts about the policy.
        order (`str`): `"random"` or `"left_to_right"`.
        tokens_per_step (`int`, *optional*, defaults to `1`): tokens unmasked at a step.
        seeds (`list[int]`, *optional*): one per response, for `"random"`.
    """
    blocks, movable, first = _parts(batch, spec)
    keys = torch.arange(batch.canvas_ids.shape[1], dtype=torch.float64).expand(batch.canvas_ids.shape).clone()
    if order == "random":
        if seeds is None or len(seeds) != len(batch):
            raise ValueError("A random order needs `seeds`, one for each response.")
        for row, (seed, length) in enumerate(zip(seeds, batch.canvas_lengths.tolist(), strict=True)):
            generator = torch.Generator().manual_seed(derive_seed(seed))
            keys[row, :length] = torch.rand(length, generator=generator, dtype=torch.float64)
    elif order != "left_to_right":
        raise ValueError(f"`order` must be 'random' or 'left_to_right', got {order!r}.")
    rank = _ranks(keys, blocks, movable)
    steps = rank // tokens_per_step + _has(first, blocks).long()
    return replace(batch, steps=torch.where(movable, steps, torch.where(first, 0, NEVER)))


@torch.no_grad()
def replay_confidence(
    model: nn.Module,
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    tokens_per_step: int = 1,
    temperature: float = 1.0,
) -> TrajectoryBatch:
    """
    The batch in the order in which a policy would have unmasked these tokens, had it chosen them: at every state, those
    of a block whose log-probability is highest, `tokens_per_step` of them. The log-probabilities seen on the way are
    recorded.

    Costs one pass for each step: of the block with the most (block attention, all blocks go on at once), or of the whole
    response (full attention).

    Args:
        model (`nn.Module`): the policy, usually the reference.
        batch ([`TrajectoryBatch`]): finished responses.
        spec ([`DiffusionSpec`]): facts about the policy.
        tokens_per_step (`int`, *optional*, defaults to `1`): tokens unmasked at a step.
        temperature (`float`, *optional*, defaults to `1.0`): what logits are divided by.
    """
    try_policy(model, spec)
    device = next(model.parameters()).device
    batch = batch.to(device)
    blocks, movable, first = _parts(batch, spec)
    later = _has(first, blocks).long()  # where a block's step 0 is its autoregressive token
    steps = torch.where(first, 0, torch.full_like(batch.steps, NEVER))
    logps = torch.zeros_like(batch.logps)
    counter = torch.zeros_like(batch.steps)
    waiting = movable.clone()
    seen = torch.zeros_like(first)
    while waiting.any() or not torch.equal(seen, first):
        active = waiting
        if spec.attention == "full":  # one block at a time; the others are clean or masked
            current = torch.where(waiting, blocks, blocks.max() + 1).amin(1, keepdim=True)
            active = waiting & (blocks == current)
        unread = first & ~seen
        weights = (active | unread).float()
        states = States((waiting | ~(movable | first))[:, None], weights[:, None], weights)
        values, _ = score(model, pack(batch, spec, states), spec, temperature)
        logps = torch.where(unread, values, logps)
        seen |= unread
        picked = active & (_ranks(-values.double(), blocks, active) < tokens_per_step)
        logps = torch.where(picked, values, logps)
        steps = torch.where(picked, counter + later, steps)
        counter += _has(picked, blocks).long()
        waiting &= ~picked
    return replace(batch, steps=steps, logps=logps)


def _parts(batch: TrajectoryBatch, spec: DiffusionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Block of each position, tokens whose order is free, and tokens made autoregressively; `(R, C)`."""
    width, lengths = batch.canvas_ids.shape[1], batch.prompt_lengths
    first = autoregressive_positions(spec, lengths, width) & batch.completion_mask
    return response_blocks(spec, lengths, width), batch.completion_mask & ~first, first


def _has(hits: Tensor, blocks: Tensor) -> Tensor:
    """For each position, whether its block has a hit; `(R, C)`."""
    counts = torch.zeros(len(blocks), int(blocks.max()) + 1, dtype=torch.long, device=blocks.device)
    return counts.scatter_add_(1, blocks, hits.long()).gather(1, blocks) > 0


def _ranks(keys: Tensor, blocks: Tensor, taking_part: Tensor) -> Tensor:
    """Rank of a position's key among those of its block that take part, smallest first; `(R, C)`."""
    order = torch.where(taking_part, keys, torch.inf).argsort(dim=1, stable=True)
    ordered_blocks = blocks.gather(1, order)
    by_block = ordered_blocks.argsort(dim=1, stable=True)
    order = order.gather(1, by_block)  # sorted by block, then by key
    sizes = torch.zeros(len(blocks), int(blocks.max()) + 1, dtype=torch.long, device=blocks.device)
    sizes.scatter_add_(1, blocks, torch.ones_like(blocks))
    starts = sizes.cumsum(1) - sizes
    places = torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks)
    rank = torch.zeros_like(blocks).scatter(1, order, places)
    return rank - starts.gather(1, blocks)
