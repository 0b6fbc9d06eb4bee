"""The packed layout: one forward pass that holds a clean copy of each response and a noisy copy of each scored block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..policies.attention import PackedMask
from ..policies.spec import DiffusionSpec
from ..trajectories.selection import Selection
from ..trajectories.trajectory import (
    TrajectoryBatch,
    autoregressive_positions,
    response_blocks,
)
from .states import States


@dataclass
class SelectionLayout:
    """
    Where the selection of positions is scored.

    Attributes:
        selection ([`Selection`]): how positions were selected.
        states (`Tensor` of shape `(M,)`): number of the state that each place of a [`PackedLayout`] belongs to.
        unmasked (boolean `Tensor` of shape `(M,)`): places that the step of the state unmasked.
        rejected (boolean `Tensor` of shape `(M,)`): places that this step could have unmasked but did not. Autoregressive
            tokens, and writes over visible tokens, are neither unmasked nor rejected.
    """

    selection: Selection
    states: Tensor
    unmasked: Tensor
    rejected: Tensor


@dataclass
class PackedLayout:
    """
    `Q` packed rows of `N` tokens, and the `M` places in them where tokens of `R` responses are scored.

    With block attention, a row holds all views of a response. If responses share a prompt, it holds several responses.
    With full attention, a row holds one view of one response.

    Attributes:
        input_ids (`Tensor` of shape `(Q, N)`): token ids.
        position_ids (`Tensor` of shape `(Q, N)`): position of each token in its unpadded sequence.
        allowed (boolean `Tensor` of shape `(Q, 1, N or 1, N)`, or [`PackedMask`]): True where the token of the
            mask's row sees the token of its column.
        rows, columns (`Tensor` of shape `(M,)`): where the logits of a scored token are read.
        targets (`Tensor` of shape `(M,)`): the token that is scored there.
        responses, event_columns (`Tensor` of shape `(M,)`): the response and the column of that write in `(R, E)`.
        coefficients (`Tensor` of shape `(M,)`, float32): factor of the log-probability in the token's estimate.
        weights (`Tensor` of shape `(R, E)`, float32): weight of each write, 0 where it is not scored.
        selected ([`SelectionLayout`], *optional*): set if the selection is scored as well. Its rejected
            places have coefficient 0.
    """

    input_ids: Tensor
    position_ids: Tensor
    allowed: Tensor | PackedMask
    rows: Tensor
    columns: Tensor
    targets: Tensor
    responses: Tensor
    event_columns: Tensor
    coefficients: Tensor
    weights: Tensor
    selected: SelectionLayout | None = None


def pack(
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    states: States,
    one_row: bool = True,
    share_prompts: bool = False,
) -> PackedLayout:
    """
    Lays out every state of every response for one forward pass (docs/method.md, section 2).

    Block attention: one row for each response (or for each of its views).

        tokens     [ clean: prompt and canvas | noisy: copies of blocks ]
        attention  a clean token sees: clean tokens of its own block
                                       and of earlier blocks (with a causal
                                       clean part: those before it)
                   a noisy token sees: clean tokens of earlier blocks,
                                       and its own noisy copy

    The clean part ends at the last block that a later block looks back to. The noisy copy of a block shows its state in
    a view. Autoregressive tokens are scored in the clean part, because it contains their state.

    With `share_prompts`, neighbours in the batch with the same prompt share a row. They share the whole blocks of the
    prompt, in which no response is visible:

        tokens     [ whole blocks of the prompt | response 1 | response 2 | ... ]

    Each response consists of a clean and a noisy part, as above.

    Full attention: one row for each view, with prompt and canvas as the view shows them. Every token sees every other
    token.

    Args:
        batch ([`TrajectoryBatch`]):
            The responses. Padding on either side changes nothing.
        spec ([`DiffusionSpec`]):
            Facts about the policy.
        states ([`States`]):
            Which tokens are visible, and which are scored.
        one_row (`bool`, *optional*, defaults to `True`):
            Block attention: whether the views of a response share one row and its clean part, or have a row each. The
            numbers are the same. The cost of attention grows with the square of the length of a row.
        share_prompts (`bool`, *optional*, defaults to `False`):
            Block attention: whether responses share their prompt, as above. This needs
            [`~policies.attention.enable_plans`] on the model.

    Example: the states of the example of [`drawn_states`]. The clean part ends with block 0, since no block looks back
    to block 1.

    ```python
    >>> import torch
    >>> from trl_diffusion import DiffusionSpec, TrajectoryBatch
    >>> from trl_diffusion.scoring.draws import StepDraw
    >>> from trl_diffusion.scoring.layout import pack
    >>> from trl_diffusion.scoring.states import drawn_states
    >>> spec = DiffusionSpec(mask_token_id=0, block_size=4)
    >>> batch = TrajectoryBatch(
    ...     prompt_ids=torch.tensor([[7, 8]]),
    ...     prompt_mask=torch.tensor([[1, 1]]),
    ...     canvas_ids=torch.tensor([[11, 12, 13, 14, 15, 16]]),
    ...     steps=torch.tensor([[1, 0, 0, 2, 1, 0]]),
    ...     logps=torch.zeros(1, 6),
    ...     canvas_lengths=torch.tensor([6]),
    ...     completion_lengths=torch.tensor([6]),
    ... )
    >>> steps, weights = torch.tensor([[[0], [1]]]), torch.tensor([[[2.0], [3.0]]])
    >>> draw = StepDraw(steps, weights, torch.ones(1, 2))
    >>> layout = pack(batch, spec, drawn_states(batch, spec, draw))
    >>> layout.input_ids.tolist()  # clean block 0, noisy block 0, noisy block 1
    [[7, 8, 11, 12, 7, 8, 0, 0, 13, 0, 0, 16]]
    >>> layout.position_ids.tolist()
    [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]]
    >>> layout.allowed.dense()[0, 0, [0, 4, 8]].int()  # what their first tokens see
    tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    >>> layout.columns.tolist(), layout.targets.tolist()  # places, scored tokens
    ([7, 10], [12, 15])

    ```
    """
    if states.prompt_hidden is not None:
        hidden = states.prompt_hidden & (batch.prompt_mask > 0)
        batch = replace(batch, prompt_ids=batch.prompt_ids.masked_fill(hidden, spec.mask_token_id))
    if spec.attention == "full":
        return _pack_full(batch, spec, states)
    if one_row:
        return _pack_blocks(batch, spec, states, share_prompts)
    rows, views = states.view_rows()
    layout = _pack_blocks(batch.select(rows), spec, views, share_prompts)
    return replace(layout, responses=rows[layout.responses], weights=states.weights)


def join_rows(layout: PackedLayout, packs: Tensor) -> PackedLayout:
    """
    Concatenates the rows of several responses into longer rows, without their padding. The numbers are the same: tokens of
    different responses do not see each other, and each token keeps its position.

    Args:
        layout ([`PackedLayout`]): a layout of [`pack`], without shared prompts.
        packs (`Tensor` of shape `(R,)`): number of the longer row that each response belongs to, from 0.
    """
    mask = layout.allowed
    if isinstance(mask, Tensor):  # full attention: all valid tokens of a row are one block
        valid = mask[:, 0, 0]
        mask = PackedMask(torch.zeros_like(layout.input_ids), torch.zeros_like(layout.input_ids[0]), valid)
    row_packs = torch.zeros_like(packs[:1]).expand(len(mask.valid)).clone()
    row_packs[layout.rows] = packs[layout.responses]  # a row without scored tokens goes anywhere
    lengths = mask.valid.sum(1)
    order = row_packs.sort(stable=True).indices
    ends = lengths[order].cumsum(0)
    totals = torch.zeros(int(packs.max()) + 1, dtype=lengths.dtype, device=lengths.device)
    totals.scatter_add_(0, row_packs, lengths)
    starts = torch.empty_like(lengths)
    starts[order] = ends - lengths[order] - (totals.cumsum(0) - totals)[row_packs[order]]
    places = starts[:, None] + mask.valid.cumsum(1) - 1  # (rows, N)
    target = (row_packs[:, None].expand_as(places)[mask.valid], places[mask.valid])
    shape = (len(totals), max(int(totals.max()), 1))

    def joined(values: Tensor) -> Tensor:
        values = values.expand_as(mask.valid)
        return values.new_zeros(shape).index_put(target, values[mask.valid])

    numbers = torch.arange(1, len(mask.valid) + 1, device=lengths.device)[:, None]
    allowed = PackedMask(
        joined(mask.ranks), joined(mask.copies), joined(mask.valid), documents=joined(numbers.expand_as(mask.valid))
    )
    return replace(
        layout,
        input_ids=joined(layout.input_ids),
        position_ids=joined(layout.position_ids),
        allowed=allowed,
        rows=row_packs[layout.rows],
        columns=places[layout.rows, layout.columns],
    )


def rows_to_join(layout: PackedLayout, count: int) -> Tensor:
    """
    Assigns `count` responses to the rows of [`join_rows`]. There are few rows, and none is longer than the longest response,
    because the cost of attention grows with the square of the length of a row.

    Returns:
        `Tensor` of shape `(R,)`: number of the row of each response.
    """
    mask = layout.allowed
    valid = mask[:, 0, 0] if isinstance(mask, Tensor) else mask.valid
    owners = torch.zeros_like(valid[:, 0], dtype=torch.long)
    owners[layout.rows] = layout.responses
    lengths = owners.new_zeros(count).index_add(0, owners, valid.sum(1)).tolist()
    packs, totals, longest = [0] * count, [0], max(lengths)
    for response in sorted(range(count), key=lambda one: -lengths[one]):  # bin packing: first-fit decreasing
        size = lengths[response]
        pack = next((pack for pack, total in enumerate(totals) if total + size <= longest), len(totals))
        totals += [0] * (pack == len(totals))
        packs[response] = pack
        totals[pack] += size
    return torch.tensor(packs, device=owners.device)


def _pack_full(batch: TrajectoryBatch, spec: DiffusionSpec, states: States) -> PackedLayout:
    prompt_lengths = batch.prompt_lengths
    sequence, canvas_columns = _unpad(batch, prompt_lengths)
    needed = (states.coefficients != 0).any(-1)
    needed[:1, :1] |= ~needed.any()  # a pass needs at least one row
    responses, views = needed.nonzero(as_tuple=True)
    positions = torch.arange(sequence.shape[1], device=sequence.device).expand(len(responses), -1)
    in_canvas = positions >= prompt_lengths[responses, None]
    hidden = states.hidden[responses, views].gather(1, canvas_columns[responses]) & in_canvas
    ids = sequence[responses]
    if states.shown is not None:
        ids = torch.where(in_canvas, states.shown[responses, views].gather(1, canvas_columns[responses]), ids)
    valid = positions < (prompt_lengths + batch.canvas_lengths)[responses, None]

    scored = states.coefficients[responses, views]
    rows, columns = states.read[responses, views].nonzero(as_tuple=True)
    cells = batch.event_positions[responses[rows], columns]
    return PackedLayout(
        input_ids=ids.masked_fill(hidden, spec.mask_token_id).masked_fill(~valid, 0),
        position_ids=positions.masked_fill(~valid, 0),
        allowed=valid[:, None, None],
        rows=rows,
        columns=prompt_lengths[responses[rows]] + cells - int(spec.token_shift),
        targets=batch.event_ids[responses[rows], columns],
        responses=responses[rows],
        event_columns=columns,
        coefficients=scored[rows, columns],
        weights=states.weights,
        selected=_selected(states, responses[rows], views[rows], columns, cells, rows),
    )


def _pack_blocks(batch: TrajectoryBatch, spec: DiffusionSpec, states: States, share_prompts: bool) -> PackedLayout:
    block_size, device = spec.block_size, batch.canvas_ids.device
    num_rows, canvas_width = batch.canvas_ids.shape
    prompt_lengths = batch.prompt_lengths
    starts = spec.head(prompt_lengths)
    token_blocks = response_blocks(spec, prompt_lengths, canvas_width)
    sequence, canvas_columns = _unpad(batch, prompt_lengths)
    members = shared_prompts(batch) if share_prompts else None
    if members is not None and starts.max() == 0:
        members = None  # nothing to share

    # Where each token is scored: autoregressive ones in the clean part, others in the noisy copy of their block.
    responses, views, columns = states.read.nonzero(as_tuple=True)
    cells = batch.event_positions[responses, columns]
    blocks = token_blocks[responses, cells]
    from_clean = autoregressive_positions(spec, prompt_lengths, canvas_width)[responses, cells]

    # Clean part: from the end of the shared prompt to the start of the last scored block.
    first = starts if members is not None else torch.zeros_like(starts)
    last_block = torch.full((num_rows,), -1, device=device).scatter_reduce(0, responses, blocks, reduce="amax")
    clean_lengths = torch.where(last_block >= 0, spec.block_start(last_block, starts) - first, 0)
    clean_width = max(int(clean_lengths.max()), 1) if num_rows else 1  # at least one column
    clean_columns = torch.arange(clean_width, device=device)
    clean_positions = first[:, None] + clean_columns
    clean_valid = clean_columns < clean_lengths[:, None]

    # Noisy part: a copy of `B` positions for each pair of a view and a block that it scores.
    num_blocks = int(token_blocks.max()) + 1 if token_blocks.numel() else 1
    needed = torch.zeros(num_rows, states.hidden.shape[1] * num_blocks, dtype=torch.bool, device=device)
    needed[responses[~from_clean], (views * num_blocks + blocks)[~from_clean]] = True
    copy_of = needed.cumsum(1) - 1  # number of each pair's copy
    noisy = _noisy_part(states, spec, needed, sequence, canvas_columns, prompt_lengths, starts)

    clean_ids = sequence.gather(1, clean_positions.clamp(max=sequence.shape[1] - 1))
    part = _Part(
        ids=torch.cat([clean_ids, noisy.ids], 1),
        positions=torch.cat([clean_positions, noisy.positions], 1),
        valid=torch.cat([clean_valid, noisy.valid], 1),
        copies=torch.cat([torch.zeros_like(clean_columns), noisy.copies]),
    )

    slot = spec.place_of(prompt_lengths[responses] + cells, starts[responses]) - int(spec.token_shift)
    in_copy = clean_width + copy_of[responses, views * num_blocks + blocks] * block_size + slot
    before = prompt_lengths[responses] + cells - 1  # position of the last clean token
    in_clean = before - first[responses]
    places = torch.where(from_clean, in_clean, in_copy)
    rows = responses
    if members is None:
        input_ids, position_ids, valid = part.ids, part.positions, part.valid
        allowed = PackedMask(part.ranks(spec, starts), part.copies, valid)
    else:
        prefix = _Part(*_shared_prefix(sequence, starts, members))
        input_ids, position_ids, valid, allowed = _join(prefix, part, spec, starts, members)
        groups, seats = _seats(members)
        rows = groups[responses]
        prefix_width, width = prefix.ids.shape[1], part.ids.shape[1]
        places = torch.where(places < 0, before, prefix_width + seats[responses] * width + places)
    return PackedLayout(
        input_ids=input_ids.masked_fill(~valid, 0),
        position_ids=position_ids.masked_fill(~valid, 0),
        allowed=allowed,
        rows=rows,
        columns=places,
        targets=batch.event_ids[responses, columns],
        responses=responses,
        event_columns=columns,
        coefficients=states.coefficients[responses, views, columns],
        weights=states.weights,
        selected=_selected(
            states,
            responses,
            views,
            columns,
            cells,
            responses * needed.shape[1] + views * num_blocks + blocks,
            from_clean,
        ),
    )


def _selected(
    states: States,
    responses: Tensor,
    views: Tensor,
    columns: Tensor,
    cells: Tensor,
    numbers: Tensor,
    autoregressive: Tensor | None = None,
) -> SelectionLayout | None:
    """Where the selection of `M` places is scored. All arguments but `states` have shape `(M,)`. `cells` holds the canvas position
    of each place, `numbers` a number that identifies its state."""
    if states.selection is None or states.rejected is None:
        return None
    rejected = states.rejected[responses, views, columns]
    unmasked = states.hidden[responses, views, cells] & ~rejected
    if autoregressive is not None:
        unmasked &= ~autoregressive
    return SelectionLayout(states.selection, numbers.unique(return_inverse=True)[1], unmasked, rejected)


@dataclass
class _Part:
    """Tokens of some rows. `copies` (W,) is the number of the noisy copy of each column, 0 in the clean part."""

    ids: Tensor
    positions: Tensor
    valid: Tensor
    copies: Tensor

    def ranks(self, spec: DiffusionSpec, starts: Tensor) -> Tensor:
        """Rank of each token, see [`DiffusionSpec.rank`]. `starts` (R,): first position of block 0."""
        return spec.rank(self.positions, starts[:, None], self.copies > 0)


def _noisy_part(
    states: States,
    spec: DiffusionSpec,
    needed: Tensor,
    sequence: Tensor,
    canvas_columns: Tensor,
    prompt_lengths: Tensor,
    starts: Tensor,
) -> _Part:
    """
    Noisy copies of blocks, `B` positions each. All rows have the same number of copies, the largest that a response needs.

    Args:
        states ([`States`]): what each view hides.
        spec ([`DiffusionSpec`]): facts about the policy.
        needed (boolean `Tensor` of shape `(R, W * S)`): which pairs of a view and a block are needed.
        sequence, canvas_columns: see [`_unpad`].
        prompt_lengths, starts (`Tensor` of shape `(R,)`): length of the prompt, and first position of block 0.
    """
    num_rows, device, block_size = len(needed), needed.device, spec.block_size
    num_blocks = needed.shape[1] // states.hidden.shape[1]
    order = (~needed).long().sort(dim=1, stable=True).indices[:, : int(needed.sum(1).max()) if num_rows else 0]
    views = (order // num_blocks).repeat_interleave(block_size, 1)
    positions = spec.block_start(order % num_blocks, starts[:, None])
    positions = (positions[..., None] + torch.arange(block_size, device=device)).flatten(1)
    in_sequence = positions.clamp(max=sequence.shape[1] - 1)
    index = (torch.arange(num_rows, device=device)[:, None], views, canvas_columns.gather(1, in_sequence))
    in_canvas = positions >= prompt_lengths[:, None]
    hidden = states.hidden[index] & in_canvas
    ids = sequence.gather(1, in_sequence)
    if states.shown is not None:
        ids = torch.where(in_canvas, states.shown[index], ids)
    return _Part(
        ids=ids.masked_fill(hidden, spec.mask_token_id),
        positions=positions,
        valid=needed.gather(1, order).repeat_interleave(block_size, 1),
        copies=torch.arange(1, order.shape[1] + 1, device=device).repeat_interleave(block_size),
    )


def shared_prompts(batch: TrajectoryBatch) -> Tensor | None:
    """
    Neighbours in a batch that have the same prompt.

    Returns:
        `Tensor` of shape `(Q, G)`: the responses to each of `Q` prompts, filled up with -1 for prompts with fewer than `G`
        responses. `None` if sharing would save nothing, because prompts differ or groups are too unequal.
    """
    num_rows = len(batch)
    if num_rows < 2:
        return None
    same = ((batch.prompt_ids[1:] == batch.prompt_ids[:-1]) | (batch.prompt_mask[1:] == 0)).all(1)
    same &= (batch.prompt_mask[1:] == batch.prompt_mask[:-1]).all(1)
    groups = torch.cat([same.new_zeros(1, dtype=torch.long), (~same).long().cumsum(0)])
    sizes = torch.bincount(groups)
    largest = int(sizes.max())
    if largest == 1 or len(sizes) * largest > 1.25 * num_rows:
        return None
    members = torch.full((len(sizes), largest), -1, device=groups.device)
    seats = torch.arange(num_rows, device=groups.device) - (sizes.cumsum(0) - sizes)[groups]
    members[groups, seats] = torch.arange(num_rows, device=groups.device)
    return members


def _seats(members: Tensor) -> tuple[Tensor, Tensor]:
    """Group of each response and its place in it, both `(R,)`."""
    groups, seats = (members >= 0).nonzero(as_tuple=True)
    return groups, seats  # `members` lists the responses in this order


def _shared_prefix(sequence: Tensor, starts: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The whole blocks of each group's prompt, right-padded: ids, positions, validity, copies."""
    lengths = starts[members[:, 0]]
    columns = torch.arange(int(lengths.max()), device=sequence.device)
    ids = sequence[members[:, 0], : len(columns)]
    return ids, columns.expand_as(ids), columns < lengths[:, None], torch.zeros_like(columns)


def _join(
    prefix: _Part, part: _Part, spec: DiffusionSpec, starts: Tensor, members: Tensor
) -> tuple[Tensor, Tensor, Tensor, PackedMask]:
    """One row for each group: its prefix, followed by the parts of its members."""
    group_starts = starts[members[:, 0]]
    flat = members.clamp(min=0).flatten()

    def side_by_side(name: str) -> Tensor:
        values = getattr(part, name)[flat]
        if name == "valid":
            values = values & (members.flatten() >= 0)[:, None]
        return torch.cat([getattr(prefix, name), values.unflatten(0, members.shape).flatten(1)], 1)

    valid = side_by_side("valid")
    ranks = torch.cat(
        [prefix.ranks(spec, group_starts), part.ranks(spec, starts)[flat].unflatten(0, members.shape).flatten(1)], 1
    )
    copies = torch.cat([prefix.copies, part.copies.repeat(members.shape[1])])
    allowed = PackedMask(ranks, copies, valid, prefix.ids.shape[1], members.shape[1])
    return side_by_side("ids"), side_by_side("positions"), valid, allowed


def _unpad(batch: TrajectoryBatch, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and canvas as one right-padded sequence, and the canvas column of each position (0 in the prompt)."""
    order = (batch.prompt_mask == 0).long().sort(dim=1, stable=True).indices
    prompt = batch.prompt_ids.gather(1, order)
    width = int((prompt_lengths + batch.canvas_lengths).max()) if len(batch) else 0
    positions = torch.arange(max(width, 1), device=prompt.device).expand(len(batch), -1)
    in_canvas = (positions - prompt_lengths[:, None]).clamp(0, max(batch.canvas_ids.shape[1] - 1, 0))
    in_prompt = positions.clamp(max=prompt.shape[1] - 1)
    is_prompt = positions < prompt_lengths[:, None]
    return torch.where(is_prompt, prompt.gather(1, in_prompt), batch.canvas_ids.gather(1, in_canvas)), in_canvas
