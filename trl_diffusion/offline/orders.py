"""Decoding orders for responses without a recorded order (docs/method.md, section 6)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..policies.forward import NON_FINITE_ADVICE, NonFiniteLogits
from ..policies.spec import DiffusionSpec
from ..policies.trial import try_policy
from ..scoring.layout import pack
from ..scoring.score import layout_logits, score_logits
from ..scoring.states import States
from ..seeds import derive_seed
from ..trajectories.by_block import has_in_block, rank_in_block
from ..trajectories.trajectory import NEVER, TrajectoryBatch, autoregressive_positions, response_blocks


DecodingOrder = Literal["random", "left_to_right", "confidence"]
ORDERS = ("random", "left_to_right", "confidence")


def finished_batch(prompts: list[list[int]], responses: list[list[int]], spec: DiffusionSpec) -> TrajectoryBatch:
    """
    A batch of responses whose order is unknown. The steps of all tokens are 0. The last block is filled up with positions that
    are never unmasked.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    sizes = torch.tensor([len(response) for response in responses])
    canvas_lengths = spec.canvas_end(lengths, sizes) - lengths
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
    The batch with an order that needs no model. Each step of a block unmasks `tokens_per_step` tokens, in a uniformly random
    order or from left to right. Autoregressive tokens come first, in a step of their own.

    Args:
        batch ([`TrajectoryBatch`]): finished responses.
        spec ([`DiffusionSpec`]): facts about the policy.
        order (`str`): `"random"` or `"left_to_right"`.
        tokens_per_step (`int`, *optional*, defaults to `1`): tokens unmasked at a step.
        seeds (`list[int]`, *optional*): one per response, for `"random"`.

    Raises:
        ValueError: if `order` is another one, or `"random"` does not get one seed for each response.
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
    rank = rank_in_block(blocks, keys, movable)
    steps = rank // tokens_per_step + has_in_block(blocks, first).long()
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
    The batch in the order in which confidence decoding would have unmasked these tokens. In every state, the
    `tokens_per_step` masked tokens of the block to which the policy gives the highest probability are unmasked. As in
    [`decode`], these are probabilities at temperature 1. The recorded log-probabilities are those at `temperature`.

    Forward passes: the largest number of steps of a block (block attention, where all blocks advance at once), or the
    number of steps of the whole response (full attention).

    Args:
        model (`nn.Module`): the policy, usually the reference.
        batch ([`TrajectoryBatch`]): finished responses.
        spec ([`DiffusionSpec`]): facts about the policy.
        tokens_per_step (`int`, *optional*, defaults to `1`): tokens unmasked at a step.
        temperature (`float`, *optional*, defaults to `1.0`): temperature of the recorded log-probabilities.

    Raises:
        NonFiniteLogits: a `FloatingPointError`, if a log-probability is NaN or infinite.
    """
    try_policy(model, spec)
    device = next(model.parameters()).device
    batch = batch.to(device)
    blocks, movable, first = _parts(batch, spec)
    offset = has_in_block(blocks, first).long()  # 1 in blocks whose step 0 is the autoregressive token
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
        layout = pack(batch, spec, states)
        logits = layout_logits(model, layout)
        values, _ = score_logits(logits, layout, spec, temperature)
        sure = values if temperature in (0.0, 1.0) else score_logits(logits, layout, spec)[0]
        broken = ~values.isfinite().all(1)
        if broken.any():
            reason = f"the policy's log-probabilities of the response are NaN or infinite. {NON_FINITE_ADVICE}"
            raise NonFiniteLogits(int(broken.nonzero()[0]), reason)
        logps = torch.where(unread, values, logps)
        seen |= unread
        picked = active & (rank_in_block(blocks, -sure.double(), active) < tokens_per_step)
        logps = torch.where(picked, values, logps)
        steps = torch.where(picked, counter + offset, steps)
        counter += has_in_block(blocks, picked).long()
        waiting &= ~picked
    return replace(batch, steps=steps, logps=logps)


def _parts(batch: TrajectoryBatch, spec: DiffusionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Block of each position, tokens whose order is free, and autoregressive tokens, `(R, C)` each."""
    width, lengths = batch.canvas_ids.shape[1], batch.prompt_lengths
    first = autoregressive_positions(spec, lengths, width) & batch.completion_mask
    return response_blocks(spec, lengths, width), batch.completion_mask & ~first, first
