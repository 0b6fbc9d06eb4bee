"""The record of a batch of responses: tokens, denoising steps and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policies.spec import DiffusionSpec
from .by_block import at_block, max_by_block
from .revisions import NEVER, Revisions


@dataclass
class TrajectoryBatch:
    """
    `R` responses together with the order in which their tokens were unmasked.

    The *canvas* is everything that the decoder worked on, in whole blocks. The *completion* is the part of the canvas that
    is the response: the tokens up to and including the first stop token (docs/method.md, section 3.1).

    A *write* puts a token into a position. Most decoders write a position once. A revising decoder may take a token back and
    write the position again. The tensors of shape `(R, C)` then hold the last write of each position, unless it was erased.
    `revisions` holds the `X` other writes. The properties `event_...` of shape `(R, E)`, with `E = C + X`, hold all writes:
    first a column for each position of the canvas, then a column for each write of `revisions`.

    Attributes:
        prompt_ids (`Tensor` of shape `(R, P)`):
            Prompt tokens, padded on either side.
        prompt_mask (`Tensor` of shape `(R, P)`):
            1 where `prompt_ids` holds a token of the prompt, 0 where it is padding.
        canvas_ids (`Tensor` of shape `(R, C)`):
            Tokens of the canvas, right-padded.
        steps (`Tensor` of shape `(R, C)`):
            Denoising step, counted from 0 inside its block, that unmasked the position; -1 if it was never unmasked. With
            `revisions` and full attention, steps are counted over the whole response.
        logps (`Tensor` of shape `(R, C)`, float32):
            Log-probability, in nats, that the decoding policy gave the token when it was unmasked; 0 if it never was.
        canvas_lengths (`Tensor` of shape `(R,)`):
            Number of canvas positions of each response.
        completion_lengths (`Tensor` of shape `(R,)`):
            Number of tokens of each completion.
        cache (`str`, *optional*, defaults to `"exact"`):
            How the responses were decoded: `"exact"`, or the `approximate_cache` of [`DecodingConfig`] that was used. With an
            approximate cache, the recorded log-probabilities are not those of the policy in the recorded states.
        revisions ([`Revisions`], *optional*):
            Writes that were taken back. `None` if the decoder never takes a token back.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    canvas_ids: Tensor
    steps: Tensor
    logps: Tensor
    canvas_lengths: Tensor
    completion_lengths: Tensor
    cache: str = "exact"
    revisions: Revisions | None = None

    def __len__(self) -> int:
        return self.canvas_ids.shape[0]

    @property
    def prompt_lengths(self) -> Tensor:
        """Number of prompt tokens of each response, shape `(R,)`."""
        return self.prompt_mask.long().sum(1)

    @property
    def completion_mask(self) -> Tensor:
        """True where a canvas position belongs to the completion, shape `(R, C)`."""
        columns = torch.arange(self.canvas_ids.shape[1], device=self.canvas_ids.device)
        return columns < self.completion_lengths[:, None]

    @property
    def event_positions(self) -> Tensor:
        """Canvas position of each write, `(R, E)`."""
        columns = torch.arange(self.canvas_ids.shape[1], device=self.canvas_ids.device).expand_as(self.canvas_ids)
        return columns if self.revisions is None else torch.cat([columns, self.revisions.positions], 1)

    @property
    def event_ids(self) -> Tensor:
        """Token of each write, `(R, E)`."""
        return self.canvas_ids if self.revisions is None else torch.cat([self.canvas_ids, self.revisions.tokens], 1)

    @property
    def event_steps(self) -> Tensor:
        """Step of each write, `(R, E)`; -1 in a column without one."""
        return self.steps if self.revisions is None else torch.cat([self.steps, self.revisions.steps], 1)

    @property
    def event_logps(self) -> Tensor:
        """Recorded log-probability of each write, `(R, E)`, in nats; 0 in a column without one."""
        return self.logps if self.revisions is None else torch.cat([self.logps, self.revisions.logps], 1)

    def of_events(self, values: Tensor) -> Tensor:
        """Looks up the values of canvas positions, `(R, C)`, at the position of each write: `(R, E)`."""
        return values if self.revisions is None else values.gather(1, self.event_positions)

    def completions(self) -> list[list[int]]:
        """The token ids of each completion."""
        lengths = self.completion_lengths.tolist()
        return [ids[:n] for ids, n in zip(self.canvas_ids.tolist(), lengths, strict=True)]

    def completion_logps(self) -> list[list[float]]:
        """The recorded log-probability of each token of each completion."""
        lengths = self.completion_lengths.tolist()
        return [logps[:n] for logps, n in zip(self.logps.tolist(), lengths, strict=True)]

    def select(self, rows: Tensor | slice) -> TrajectoryBatch:
        """The responses at `rows` (indices, a boolean mask of shape `(R,)`, or a slice)."""
        return self._map(lambda values: values[rows])

    @classmethod
    def concatenate(cls, batches: list[TrajectoryBatch]) -> TrajectoryBatch:
        """
        Joins several batches into one, padded to the widest: prompts on the left, canvases on the right.

        Raises:
            ValueError: if the batches were decoded with different caches, or only some by a decoder that revises.
        """
        prompt_width = max(batch.prompt_ids.shape[1] for batch in batches)
        canvas_width = max(batch.canvas_ids.shape[1] for batch in batches)

        def widen(name: str, batch: TrajectoryBatch) -> Tensor:
            values = getattr(batch, name)
            if name.startswith("prompt"):
                return F.pad(values, (prompt_width - values.shape[1], 0))
            if values.dim() == 2:
                return F.pad(values, (0, canvas_width - values.shape[1]), value=NEVER if name == "steps" else 0)
            return values

        caches = sorted({batch.cache for batch in batches})
        if len(caches) > 1:
            raise ValueError(f"Responses that were decoded in different ways cannot be put in one batch: {caches}.")
        revisions = [batch.revisions for batch in batches if batch.revisions is not None]
        if revisions and len(revisions) < len(batches):
            raise ValueError(
                "Responses of a decoder that revises and of one that does not cannot be put in one batch."
            )
        return cls(
            **{name: torch.cat([widen(name, batch) for batch in batches]) for name in _TENSORS},
            cache=caches[0],
            revisions=Revisions.concatenate(revisions) if revisions else None,
        )

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        """A copy on `device`."""
        return self._map(lambda values: values.to(device))

    def to_dict(self) -> dict[str, Any]:
        """The attributes as tensors, text and dictionaries of them."""
        return {**vars(self), "revisions": None if self.revisions is None else vars(self.revisions)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrajectoryBatch:
        """The batch of [`TrajectoryBatch.to_dict`]."""
        revisions = values.get("revisions")
        return cls(**{**values, "revisions": None if revisions is None else Revisions(**revisions)})

    def _map(self, function: Callable[[Tensor], Tensor]) -> TrajectoryBatch:
        """A copy with every tensor replaced."""
        return TrajectoryBatch(
            **{name: function(getattr(self, name)) for name in _TENSORS},
            cache=self.cache,
            revisions=None if self.revisions is None else self.revisions.map(function),
        )


_TENSORS = [field.name for field in fields(TrajectoryBatch) if field.name not in ("cache", "revisions")]


def response_blocks(spec: DiffusionSpec, prompt_lengths: Tensor, width: int) -> Tensor:
    """
    The block of the response that each canvas position belongs to.

    Args:
        spec ([`DiffusionSpec`]):
            Facts about the policy, of which the block size and the origin are used.
        prompt_lengths (`Tensor` of shape `(R,)`):
            Number of prompt tokens.
        width (`int`):
            Number of canvas columns `C`.

    Returns:
        `Tensor` of shape `(R, C)`: 0 for the block of the first response token, 1 for the next block, and so on.
    """
    columns = torch.arange(width, device=prompt_lengths.device)
    return spec.block_of(prompt_lengths[:, None] + columns, prompt_lengths[:, None])


def autoregressive_positions(spec: DiffusionSpec, prompt_lengths: Tensor, width: int) -> Tensor:
    """
    Canvas positions of autoregressive tokens, which are the first of their block (docs/method.md, section 3.4).

    Returns:
        Boolean `Tensor` of shape `(R, C)`.
    """
    columns = torch.arange(width, device=prompt_lengths.device)
    first = spec.place_of(prompt_lengths[:, None] + columns, prompt_lengths[:, None]) == 0
    return first & (spec.first_token == "autoregressive")


class TokenStates(NamedTuple):
    """
    The states that a draw chooses from, for every write of `R` responses. The draw chooses one state of each group,
    independently.

    Attributes:
        groups (`Tensor` of shape `(R, E)`): group of the write.
        states (`Tensor` of shape `(R, E)`): number, in its group, of the state in which the token was written; -1 in a
            column without a write.
        drawable (boolean `Tensor` of shape `(R, E)`): writes that take part in the draw.
        counted (boolean `Tensor` of shape `(R, E)`): drawable writes, and writes whose state is in every pass over their
            group.
    """

    groups: Tensor
    states: Tensor
    drawable: Tensor
    counted: Tensor


def token_states(spec: DiffusionSpec, batch: TrajectoryBatch, counted: Tensor | None = None) -> TokenStates:
    """
    The states in which tokens were written.

    With block attention a group is a block, and its states are the denoising steps of the block. One pass holds a state of
    every block. Autoregressive tokens are in every pass. With full attention a pass holds only one state. The whole
    response is therefore one group, and its states are the steps of all blocks, numbered consecutively
    (docs/method.md, section 2).

    Args:
        spec ([`DiffusionSpec`]): facts about the policy.
        batch ([`TrajectoryBatch`]): the responses.
        counted (boolean `Tensor` of shape `(R, E)`, *optional*): writes that count. Defaults to [`counted_writes`].
    """
    steps = batch.event_steps
    counted = counted_writes(spec, batch) if counted is None else counted & (steps != NEVER)
    regions = event_regions(spec, batch)
    if spec.attention == "block":
        first = autoregressive_positions(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
        return TokenStates(regions, steps, counted & ~batch.of_events(first), counted)
    return TokenStates(torch.zeros_like(regions), global_steps(regions, steps), counted, counted)


def event_regions(spec: DiffusionSpec, batch: TrajectoryBatch) -> Tensor:
    """
    The region inside which the steps of each write are counted, `(R, E)`. It is the block, numbered as in
    [`response_blocks`]. With revisions and full attention it is the whole response, because any position may be revised at
    any step.
    """
    blocks = response_blocks(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
    if batch.revisions is not None and spec.attention == "full":
        return torch.zeros_like(batch.event_positions)
    return batch.of_events(blocks)


def counted_writes(spec: DiffusionSpec, batch: TrajectoryBatch, whole_steps: bool = False) -> Tensor:
    """
    The writes whose log-probabilities add up to that of a response.

    These are the tokens of the completion, and tokens after it that were unmasked before the step that unmasked its last
    token. The policy saw them while it wrote the completion, so they belong to the gradient of the expected reward.
    Later tokens changed nothing (docs/method.md, section 3.1). With a decoder that revises, every write counts, because the
    decoder may change the completion until its last step.

    Args:
        spec ([`DiffusionSpec`]): facts about the policy.
        batch ([`TrajectoryBatch`]): the responses.
        whole_steps (`bool`, *optional*, defaults to `False`):
            whether all tokens of the step that unmasked the last token of the completion count. This is needed if the
            selection is scored, because the step is then one action and its tokens are not independent.

    Returns:
        Boolean `Tensor` of shape `(R, E)`. In a response without a completion, no write counts.
    """
    if batch.revisions is not None:
        return (batch.event_steps != NEVER) & (batch.completion_lengths > 0)[:, None]
    blocks = response_blocks(spec, batch.prompt_lengths, batch.canvas_ids.shape[1])
    steps = global_steps(blocks, batch.steps)
    settled = steps.masked_fill(~batch.completion_mask, NEVER).amax(1, keepdim=True)
    before = steps <= settled if whole_steps else steps < settled
    return (batch.completion_mask | before) & (batch.steps != NEVER)


def steps_of_responses(spec: DiffusionSpec, batch: TrajectoryBatch) -> Tensor:
    """
    The number of denoising steps that wrote each response, `(R,)`. Steps that wrote only tokens after the completion do not
    count. With a decoder that revises, every step counts.
    """
    written = batch.completion_mask if batch.revisions is None else batch.event_steps != NEVER
    keys = torch.stack([written.nonzero()[:, 0], event_regions(spec, batch)[written], batch.event_steps[written]])
    return torch.bincount(torch.unique(keys, dim=1)[0], minlength=len(batch))


def global_steps(blocks: Tensor, steps: Tensor) -> Tensor:
    """
    Denoising steps numbered consecutively over all blocks, instead of inside each block.

    Args:
        blocks (`Tensor` of shape `(R, E)`): block of each position or write.
        steps (`Tensor` of shape `(R, E)`): denoising step inside the block, -1 if there was none.

    Returns:
        `Tensor` of shape `(R, E)`, -1 if there was none.
    """
    lengths = max_by_block(blocks, steps + 1)  # number of steps of each block
    before = lengths.cumsum(1) - lengths
    return torch.where(steps == NEVER, NEVER, steps + at_block(blocks, before))
