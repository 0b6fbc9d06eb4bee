"""The packed layout: one forward pass that holds a clean copy of each response and a noisy copy of each drawn block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..policies.spec import DiffusionSpec
from ..trajectories.trajectory import (
    NEVER,
    TrajectoryBatch,
    autoregressive_positions,
    drawable_states,
    response_blocks,
)
from .draws import StepDraw


@dataclass
class PackedLayout:
    """
    `Q` packed rows of `N` tokens, and the `M` places in them where the tokens of `R` responses are scored. With block
    attention a row holds all drawn states of a response; with full attention it holds one.

    Attributes:
        input_ids (`Tensor` of shape `(Q, N)`): token ids.
        position_ids (`Tensor` of shape `(Q, N)`): position of each token in its unpadded sequence.
        allowed (boolean `Tensor` of shape `(Q, 1, N or 1, N)`): True where the token of the row may look at the column's.
        rows, columns (`Tensor` of shape `(M,)`): where the logits of a scored token are read.
        targets (`Tensor` of shape `(M,)`): the token whose log-probability is wanted there.
        responses, canvas_columns (`Tensor` of shape `(M,)`): the response and the canvas position of that token.
        weights (`Tensor` of shape `(R, C)`, float32): weight of each canvas position, 0 where it is not scored.
    """

    input_ids: Tensor
    position_ids: Tensor
    allowed: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    responses: Tensor
    canvas_columns: Tensor
    weights: Tensor


def pack(
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    draw: StepDraw,
    counted: Tensor | None = None,
) -> PackedLayout:
    """
    Lays out every drawn state of every response for one forward pass (METHOD.md, section 2).

    Block attention: one row for each response.

        tokens     [ prompt and canvas up to the last block that anything looks back to | noisy copies of blocks ]
        attention  clean token: clean tokens of its own block and the blocks before it
                   noisy token: clean tokens of the blocks before its own, and its own noisy copy

    The noisy copy of block `s` at step `t` shows what the policy saw just before that step: tokens of the block that
    earlier steps had unmasked, and the mask token elsewhere. Tokens that are made autoregressively are read from the
    clean part; their state is in every pass, so they are always scored, with weight 1.

    Full attention: one row for each drawn state, `[ prompt and canvas as they were just before that step ]`, in which
    every token sees every other.

    Args:
        batch ([`TrajectoryBatch`]):
            The responses. Padding, wherever it is, changes nothing.
        spec ([`DiffusionSpec`]):
            Facts about the policy.
        draw ([`StepDraw`]):
            Which states to lay out, and their weights; groups and states are those of [`drawable_states`].
        counted (boolean `Tensor` of shape `(R, C)`, *optional*):
            Canvas positions that may be scored. Defaults to the completions.
    """
    return (_pack_blocks if spec.attention == "block" else _pack_full)(batch, spec, draw, counted)


def _pack_full(batch: TrajectoryBatch, spec: DiffusionSpec, draw: StepDraw, counted: Tensor | None) -> PackedLayout:
    groups, states, counted = drawable_states(spec, batch, counted)
    weights = draw.token_weights(groups, states, counted)
    prompt_lengths = batch.prompt_lengths
    sequence, sequence_states = _unpad(batch, prompt_lengths, states)

    responses, draws = (draw.blocks >= 0).nonzero(as_tuple=True)
    # One row for each state: what is drawn twice is scored once, with both weights.
    responses, steps = torch.unique(torch.stack([responses, draw.steps[responses, draws]]), dim=1)
    positions = torch.arange(sequence.shape[1], device=sequence.device).expand(len(responses), -1)
    lengths = (prompt_lengths + batch.canvas_lengths)[responses]
    hidden = sequence_states[responses]
    hidden = ((hidden == NEVER) | (hidden >= steps[:, None])) & (positions >= prompt_lengths[responses, None])
    valid = positions < lengths[:, None]

    rows, canvas_columns = ((states[responses] == steps[:, None]) & counted[responses]).nonzero(as_tuple=True)
    return PackedLayout(
        input_ids=sequence[responses].masked_fill(hidden, spec.mask_token_id).masked_fill(~valid, 0),
        position_ids=positions.masked_fill(~valid, 0),
        allowed=valid[:, None, None],
        rows=rows,
        columns=prompt_lengths[responses[rows]] + canvas_columns - int(spec.token_shift),
        targets=batch.canvas_ids[responses[rows], canvas_columns],
        responses=responses[rows],
        canvas_columns=canvas_columns,
        weights=weights,
    )


def _pack_blocks(batch: TrajectoryBatch, spec: DiffusionSpec, draw: StepDraw, counted: Tensor | None) -> PackedLayout:
    block_size = spec.block_size
    device = batch.canvas_ids.device
    num_rows, canvas_width = batch.canvas_ids.shape
    prompt_lengths = batch.prompt_lengths
    starts = prompt_lengths - spec.prompt_tail(prompt_lengths)  # position of the first token of block 0
    counted = (batch.completion_mask if counted is None else counted) & (batch.steps != NEVER)

    token_blocks = response_blocks(spec, prompt_lengths, canvas_width)
    autoregressive = autoregressive_positions(spec, prompt_lengths, canvas_width) & counted
    weights = draw.token_weights(token_blocks, batch.steps, counted & ~autoregressive) + autoregressive.float()

    sequence, sequence_steps = _unpad(batch, prompt_lengths, batch.steps)

    # Clean part: up to the start of the last block that is scored.
    last_block = torch.where(weights > 0, token_blocks, -1).max(1).values if canvas_width else prompt_lengths * 0 - 1
    clean_lengths = torch.where(last_block >= 0, starts + last_block * block_size, 0)
    clean_width = max(int(clean_lengths.max()), 1)
    clean_positions = torch.arange(clean_width, device=device).expand(num_rows, -1)
    clean_ids = sequence[:, :clean_width]
    clean_valid = clean_positions < clean_lengths[:, None]

    # Noisy part: `D` copies of `B` positions.
    num_draws = draw.blocks.shape[1]
    drawn = draw.blocks >= 0
    copy_starts = starts[:, None] + draw.blocks.clamp(min=0) * block_size
    noisy_positions = (copy_starts[..., None] + torch.arange(block_size, device=device)).flatten(1)
    noisy_valid = drawn.repeat_interleave(block_size, 1)
    in_sequence = noisy_positions.clamp(max=sequence.shape[1] - 1)
    noisy_steps = sequence_steps.gather(1, in_sequence)
    hidden = (noisy_steps == NEVER) | (noisy_steps >= draw.steps.repeat_interleave(block_size, 1))
    hidden &= noisy_positions >= prompt_lengths[:, None]
    noisy_ids = sequence.gather(1, in_sequence).masked_fill(hidden, spec.mask_token_id)

    input_ids = torch.cat([clean_ids, noisy_ids], 1)
    position_ids = torch.cat([clean_positions, noisy_positions], 1)
    valid = torch.cat([clean_valid, noisy_valid], 1)
    blocks = _position_blocks(spec, position_ids, starts)
    copies = torch.cat(
        [
            torch.zeros(clean_width, dtype=torch.long, device=device),
            torch.arange(1, num_draws + 1, device=device).repeat_interleave(block_size),
        ]
    )
    allowed = _attention(blocks, copies, valid)

    # Where each scored token is read: in the copy that its draw made, or in the clean part.
    rows, canvas_columns = (weights > 0).nonzero(as_tuple=True)
    targets = batch.canvas_ids[rows, canvas_columns]
    positions = prompt_lengths[rows] + canvas_columns
    slot_in_block = (positions - starts[rows]) % block_size - int(spec.token_shift)
    same_state = (draw.blocks[rows] == token_blocks[rows, canvas_columns][:, None]) & (
        draw.steps[rows] == batch.steps[rows, canvas_columns][:, None]
    )
    in_copy = clean_width + same_state.long().argmax(1) * block_size + slot_in_block if num_draws else slot_in_block
    columns = torch.where(slot_in_block < 0, positions - 1, in_copy)
    return PackedLayout(
        input_ids=input_ids.masked_fill(~valid, 0),
        position_ids=position_ids.masked_fill(~valid, 0),
        allowed=allowed,
        rows=rows,
        columns=columns,
        targets=targets,
        responses=rows,
        canvas_columns=canvas_columns,
        weights=weights,
    )


def _unpad(batch: TrajectoryBatch, prompt_lengths: Tensor, canvas_steps: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and canvas as one right-padded sequence, with the unmasking step of each position (prompt: never)."""
    order = (batch.prompt_mask == 0).long().sort(dim=1, stable=True).indices
    prompt = batch.prompt_ids.gather(1, order)
    width = int((prompt_lengths + batch.canvas_lengths).max()) if len(batch) else 0
    positions = torch.arange(max(width, 1), device=prompt.device).expand(len(batch), -1)
    in_canvas = (positions - prompt_lengths[:, None]).clamp(0, max(batch.canvas_ids.shape[1] - 1, 0))
    is_prompt = positions < prompt_lengths[:, None]
    in_prompt = positions.clamp(max=prompt.shape[1] - 1)
    sequence = torch.where(is_prompt, prompt.gather(1, in_prompt), batch.canvas_ids.gather(1, in_canvas))
    steps = torch.where(is_prompt, NEVER, canvas_steps.gather(1, in_canvas))
    return sequence, steps


def _position_blocks(spec: DiffusionSpec, positions: Tensor, starts: Tensor) -> Tensor:
    """Attention block of each position: blocks of the response count from 0, those of the prompt are negative."""
    blocks = torch.div(positions - starts[:, None], spec.block_size, rounding_mode="floor")
    return blocks if spec.block_origin == "sequence" else blocks.clamp(min=-1)


def _attention(blocks: Tensor, copies: Tensor, valid: Tensor) -> Tensor:
    """Who may look at whom, shape `(R, 1, N, N)`; copy 0 is the clean part."""
    query_copy, key_copy = copies[:, None], copies[None, :]
    query_block, key_block = blocks[:, :, None], blocks[:, None, :]
    clean_key = key_copy == 0
    looks_back = key_block < query_block
    same_block = (key_block == query_block) & (query_copy == 0)
    allowed = torch.where(clean_key, looks_back | same_block, query_copy == key_copy)
    allowed &= valid[:, None, :]
    # A padding token looks at itself, so that no row of the softmax is empty; nothing looks at a padding token.
    allowed |= torch.eye(len(copies), dtype=torch.bool, device=valid.device)
    return allowed[:, None]
