"""States to be scored: which tokens the policy sees, which tokens are scored, and with which weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policies.spec import DiffusionSpec
from ..trajectories.by_block import at_block, max_by_block
from ..trajectories.revisions import Revisions
from ..trajectories.selection import Selection
from ..trajectories.trajectory import (
    NEVER,
    TokenStates,
    TrajectoryBatch,
    autoregressive_positions,
    counted_writes,
    response_blocks,
    token_states,
)
from .draws import StepDraw


@dataclass
class States:
    r"""
    `W` views of each of `R` responses with `E` writes. The estimate of the log-probability of write $e$ of response $r$,
    which put token $y_{r,e}$ into its position, is

    $$
    s_{r,e} = \sum_{v} a_{r,v,e} \log p(y_{r,e} \mid \text{view } v)
    $$

    with the coefficients $a$. The estimate of the log-probability of the response is $\sum_e w_{r,e} s_{r,e}$, with the
    weights $w$. Unless the decoder revises, the writes are the `C` positions of the canvas.

    With block attention, a view shows one state of every block, after clean blocks. A block without coefficients in a
    view is not run. With full attention, a view is one state of the whole response. Autoregressive tokens are scored
    from the clean tokens before them, and do not depend on what the view hides.

    Attributes:
        hidden (boolean `Tensor` of shape `(R, W, C)`): True where the view shows the mask token.
        coefficients (`Tensor` of shape `(R, W, E)`, float32): 0 where the view does not score the write.
        weights (`Tensor` of shape `(R, E)`, float32): weight of each write in the loss, 0 where it is not scored.
        prompt_hidden (boolean `Tensor` of shape `(R, P)`, *optional*): prompt tokens replaced by the mask token.
        selection ([`Selection`], *optional*): how positions were selected, if the selection is scored as well. A token's
            log-probability then contains its share of the log-probability of the selection.
        rejected (boolean `Tensor` of shape `(R, W, E)`, *optional*): with `selection`, positions that the step of the view
            could have unmasked but did not.
        shown (`Tensor` of shape `(R, W, C)`, *optional*): the token that the view shows at each position that it does not
            hide. `None` stands for the tokens of the canvas. A view shows other tokens if the decoder revises, or if a document
            of supervised fine-tuning is corrupted.
    """

    hidden: Tensor
    coefficients: Tensor
    weights: Tensor
    prompt_hidden: Tensor | None = None
    selection: Selection | None = None
    rejected: Tensor | None = None
    shown: Tensor | None = None

    @property
    def read(self) -> Tensor:
        """Places where logits are needed, boolean, `(R, W, E)`."""
        scored = self.coefficients != 0
        return scored if self.rejected is None else scored | self.rejected

    def view_rows(self) -> tuple[Tensor, States]:
        """
        Turns every view into a response with a single view.

        Returns:
            The index of the response that each row belongs to, `(R * W,)`, and the states.
        """
        num_responses, num_views = self.hidden.shape[:2]
        rows = torch.arange(num_responses, device=self.hidden.device).repeat_interleave(num_views)
        return rows, States(
            hidden=self.hidden.flatten(0, 1)[:, None],
            coefficients=self.coefficients.flatten(0, 1)[:, None],
            weights=self.weights[rows],
            prompt_hidden=None if self.prompt_hidden is None else self.prompt_hidden[rows],
            selection=self.selection,
            rejected=None if self.rejected is None else self.rejected.flatten(0, 1)[:, None],
            shown=None if self.shown is None else self.shown.flatten(0, 1)[:, None],
        )


def drawn_states(
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    draw: StepDraw,
    counted: Tensor | None = None,
    selection: Selection | None = None,
) -> States:
    """
    The states just before the drawn denoising steps. The tokens that these steps unmasked are scored in them.

    Args:
        batch ([`TrajectoryBatch`]): the responses.
        spec ([`DiffusionSpec`]): facts about the policy.
        draw ([`StepDraw`]): the drawn steps. Groups and steps are numbered as in [`token_states`].
        counted (boolean `Tensor` of shape `(R, E)`, *optional*): writes that may be scored. Defaults to [`counted_writes`].
        selection ([`Selection`], *optional*): how positions were selected, if the selection is scored
            as well.

    Example: the prompt has two tokens, and blocks have four positions. Block 0 therefore has the prompt and two tokens of
    the canvas. Block 1 has the other four tokens.

    ```python
    >>> import torch
    >>> from trl_diffusion import DiffusionSpec, TrajectoryBatch
    >>> from trl_diffusion.scoring.draws import StepDraw
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
    >>> states = drawn_states(batch, spec, draw)
    >>> states.hidden.int().tolist()  # unmasked at the drawn step or later
    [[[1, 1, 0, 1, 1, 0]]]
    >>> states.coefficients.tolist()  # unmasked at the drawn step
    [[[0.0, 1.0, 0.0, 0.0, 1.0, 0.0]]]
    >>> states.weights.tolist()
    [[0.0, 2.0, 0.0, 0.0, 3.0, 0.0]]

    ```
    """
    tokens = states_to_draw(batch, spec, selection) if counted is None else token_states(spec, batch, counted)
    groups, steps, drawable, counted = tokens
    num_groups, num_draws = draw.steps.shape[1:]

    def of_write(values: Tensor) -> Tensor:  # (R, S, ...) -> (R, E, ...)
        index = groups.clamp(max=num_groups - 1)
        return values.gather(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:]))

    drawn, weights = of_write(draw.steps), of_write(draw.weights)  # (R, E, K)
    hit = (drawn == steps[..., None]) & (drawn >= 0) & drawable[..., None]
    hit &= (groups < num_groups)[..., None]
    always = (counted & ~drawable).float()  # autoregressive: their state is in every pass
    coefficients = hit.float()
    coefficients[..., 0] += always * (of_write(draw.block_weights) > 0)
    hidden = ((steps[..., None] == NEVER) | (steps[..., None] >= drawn)).transpose(1, 2)
    shown = None
    if batch.revisions is not None:
        hidden, shown = _shown(batch, batch.revisions, hidden, drawn.transpose(1, 2))
    return States(
        hidden=hidden,
        coefficients=coefficients.transpose(1, 2),
        weights=(hit * weights).sum(-1) + always * of_write(draw.block_weights),
        selection=selection,
        rejected=None if selection is None else _rejected(batch, spec, selection, hidden, hit.transpose(1, 2)),
        shown=shown,
    )


def _shown(batch: TrajectoryBatch, revisions: Revisions, unwritten: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """
    What each view shows of a revised response: which positions it hides, and which tokens it shows at the others, `(R, W, C)`
    each.

    Args:
        batch ([`TrajectoryBatch`]): the responses.
        revisions ([`Revisions`]): their writes that were taken back.
        unwritten (boolean `Tensor` of shape `(R, W, E)`): writes that had not been made before the step of the view.
        drawn (`Tensor` of shape `(R, W, E)`): the step of the view.
    """
    width = batch.canvas_ids.shape[1]
    hidden = unwritten[..., :width].clone()
    shown = batch.canvas_ids[:, None].expand_as(hidden).clone()
    visible = ~unwritten[..., width:] & (drawn[..., width:] <= revisions.until[:, None])
    rows, views, columns = visible.nonzero(as_tuple=True)
    positions = revisions.positions[rows, columns]
    hidden[rows, views, positions] = False
    shown[rows, views, positions] = revisions.tokens[rows, columns]
    return hidden, shown


def states_to_draw(batch: TrajectoryBatch, spec: DiffusionSpec, selection: Selection | None) -> TokenStates:
    """[`token_states`] of the tokens that count. Which tokens count depends on whether the selection is scored."""
    return token_states(spec, batch, counted_writes(spec, batch, whole_steps=selection is not None))


def _rejected(
    batch: TrajectoryBatch, spec: DiffusionSpec, selection: Selection, hidden: Tensor, written: Tensor
) -> Tensor:
    """
    Positions that the step of each view could have unmasked but did not, boolean, `(R, W, E)`. These are the positions that
    stayed masked in the block, or part of a block, in which the step unmasked something. With revisions and full attention,
    they are the positions that stayed masked in all blocks begun by then. `written`, of the same shape: the step's writes.
    """
    lengths, width = batch.prompt_lengths, batch.canvas_ids.shape[1]
    unmasked = written
    if batch.revisions is not None:  # from writes to positions, without writes over visible tokens
        rows, views, columns = written.nonzero(as_tuple=True)
        unmasked = torch.zeros_like(hidden)
        unmasked[rows, views, batch.event_positions[rows, columns]] = True
        unmasked &= hidden
    columns = torch.arange(width, device=lengths.device)
    blocks = response_blocks(spec, lengths, width)
    places = spec.place_of(lengths[:, None] + columns, lengths[:, None])
    part_size = selection.sub_block_size or spec.block_size
    parts = blocks * spec.block_size + places // part_size  # a different number for each part
    groups = blocks if spec.attention == "block" else torch.zeros_like(blocks)
    active = at_block(groups, max_by_block(groups, torch.where(unmasked, parts[:, None] + 1, 0)))
    candidates = parts[:, None] + 1 == active
    if batch.revisions is not None and spec.attention == "full":
        steps = batch.event_steps[:, None]
        last = torch.where(written, steps, NEVER).amax(-1, keepdim=True)  # the step of the view
        begun = (steps <= last) & (steps != NEVER)
        newest = torch.where(begun, batch.of_events(blocks)[:, None], NEVER).amax(-1, keepdim=True)
        candidates = (blocks[:, None] <= newest) & unmasked.any(-1, keepdim=True)
    ends = batch.canvas_lengths
    if selection.new_tokens is not None:
        ends = ends.minimum(spec.writing_end(lengths, selection.new_tokens) - lengths)
    open_to_all = (columns < ends[:, None]) & ~autoregressive_positions(spec, lengths, width)
    rejected = hidden & ~unmasked & candidates & open_to_all[:, None]
    return F.pad(rejected, (0, batch.event_steps.shape[1] - width))


def all_states(
    batch: TrajectoryBatch, spec: DiffusionSpec, counted: Tensor | None = None, selection: Selection | None = None
) -> States:
    """Every state of every trajectory, with one denoising step in each view. Every token is scored with weight 1."""
    tokens = states_to_draw(batch, spec, selection) if counted is None else token_states(spec, batch, counted)
    groups, steps, drawable, counted = tokens
    num_groups = int(groups[counted].max()) + 1 if counted.any() else 1
    num_steps = int(steps[drawable].max()) + 1 if drawable.any() else 1
    every = torch.arange(num_steps, device=steps.device).expand(len(batch), num_groups, -1)
    ones = torch.ones(every.shape, device=steps.device)
    return drawn_states(batch, spec, StepDraw(every, ones, ones[..., 0]), counted, selection)
