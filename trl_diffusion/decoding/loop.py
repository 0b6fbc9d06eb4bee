"""
The denoising loop, for block and full attention and for any number of responses.

Responses are denoised in *lanes*. Every forward pass advances every lane by one denoising step. The tokens of the lanes are
concatenated in a single row, so there is no padding, and no lane waits for another. When the response of a lane ends, the
lane takes the next prompt of the queue. The host knows which positions are masked. It waits for the device only once a step,
for the positions that were unmasked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..policies.attention import plans_enabled
from ..policies.cache import lane_cache
from ..policies.forward import NON_FINITE_ADVICE, NonFiniteLogits, policy_logits, unwrap
from ..policies.spec import DiffusionSpec
from ..trajectories.revisions import NEVER
from ..trajectories.trajectory import TrajectoryBatch
from .attention import Spans, ragged_mask
from .config import DecodingConfig
from .history import History
from .pace import Pace
from .revising import ReviseView, Revising
from .sampling import Proposal, propose
from .strategies import SCHEDULED, STRATEGIES, StepView, step_quota


@dataclass
class Lane:
    """
    A lane, in which one response after another is denoised.

    Attributes:
        row (`int`): index of the response.
        block (`int`): its active block.
        step (`int`): finished steps of the block's schedule, including those that would unmask nothing.
        taken (`int`): denoising steps taken in this block, or, with a revising strategy and full attention, in the response.
        total (`int`): positions that the schedule of the block divides into steps.
        cached (`int`): number of tokens, from position 0, that are read from the cache. Without an approximate cache they are
            clean.
        part (`int`): with the cache `"sub_block"`, the part of the block whose surroundings are in the cache, -1 for none.
        uniforms (`Tensor` of shape `(kinds, T, B)`, *optional*): random numbers for the block, by kind, step and
            position.
        filled (`bool`): whether the block has been without masked positions at least once. This and the next two attributes
            are used only with a revising strategy.
        revised (`int`): steps taken after the step that filled the block.
        settled (`bool`): whether the last step was one of these and took nothing back.
    """

    row: int
    block: int = -1
    step: int = 0
    taken: int = 0
    total: int = 0
    cached: int = 0
    part: int = -1
    uniforms: Tensor | None = None
    filled: bool = False
    revised: int = 0
    settled: bool = False


@dataclass
class Window:
    """
    The active block of each of `L` lanes, and the positions in it that may be unmasked in this step. All attributes are
    arrays on the host. With full attention and either a revising strategy or `allow_mask_token`, the window is not the active
    block alone but everything from block 0 to its end.

    Attributes:
        starts (`np.ndarray` of shape `(L,)`): first position of each block.
        positions (`np.ndarray` of shape `(L, B)`): positions of each block. A shorter block repeats its last one.
        inside (boolean `np.ndarray` of shape `(L, B)`): False where a position is repeated.
        masked (boolean `np.ndarray` of shape `(L, B)`): positions that are masked.
        candidates (boolean `np.ndarray` of shape `(L, B)`): positions that may be unmasked now.
        autoregressive (boolean `np.ndarray` of shape `(L,)`): lanes whose next token is the autoregressive first one of
            the block.
        quota (`np.ndarray` of shape `(L,)`): number of positions to unmask.
        visible (boolean `np.ndarray` of shape `(L, B)`): positions whose token may be taken back.
    """

    starts: np.ndarray
    positions: np.ndarray
    inside: np.ndarray
    masked: np.ndarray
    candidates: np.ndarray
    autoregressive: np.ndarray
    quota: np.ndarray
    visible: np.ndarray

    @property
    def looked_at(self) -> np.ndarray:
        """Positions whose logits are needed, boolean, `(L, B)`."""
        return self.candidates | self.visible


@dataclass
class Choice:
    """
    What a step does at the `M` positions that it looked at. All attributes are tensors of shape `(M,)`.

    Attributes:
        tokens: the proposed tokens.
        written (boolean): where they are written.
        erased (boolean): where a visible token is erased.
        broken (boolean): where no token can be proposed.
        before, logps_before: tokens, and their recorded log-probabilities, before the step.
    """

    tokens: Tensor
    written: Tensor
    erased: Tensor
    broken: Tensor
    before: Tensor
    logps_before: Tensor


class DenoisingLoop:
    """State of one call of [`decode`], with the same arguments."""

    NOWHERE = np.iinfo(np.int64).max  # stands for the position of a stop token where there is none

    def __init__(
        self,
        model: nn.Module,
        prompts: list[list[int]],
        config: DecodingConfig,
        spec: DiffusionSpec,
        seeds: list[int] | None,
        batch_size: int | None = None,
        pace: Pace | None = None,
        on_step: Callable[[DenoisingLoop], None] | None = None,
    ):
        self.model, self.config, self.spec, self.prompts = model, config, spec, prompts
        self.on_step, self.pace = on_step, pace or Pace()
        self.strategy = config.strategy if callable(config.strategy) else STRATEGIES[config.strategy]
        self.revising = config.revising
        # Whether a step also looks at positions of earlier blocks.
        self.is_wide = config.allow_mask_token or (self.revising is not None and spec.attention == "full")
        self.device = next(model.parameters()).device
        self.generators = None
        own = callable(config.strategy) or isinstance(config.revision, Revising)
        if seeds is not None and (config.is_random or own):
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        self.new_tokens = np.full(len(prompts), config.max_new_tokens)
        self.lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        self.tails = spec.prompt_tail(self.lengths)
        self.heads = spec.head(self.lengths)  # tokens of the prompt before block 0
        self.num_blocks = spec.num_blocks(self.lengths, config.max_new_tokens)
        self.canvas_ends = spec.canvas_end(self.lengths, config.max_new_tokens)
        width = int(self.canvas_ends.max(initial=0))

        # Each row begins at position 0: there is no padding before the prompt.
        ids = torch.full((len(prompts), width), spec.mask_token_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        self.ids = ids.to(self.device)
        self.logps = torch.zeros(self.ids.shape, device=self.device)
        positions = np.arange(width)
        self.writing_ends = spec.writing_end(self.lengths, config.max_new_tokens)  # what follows stays masked
        self.masked = (positions >= self.lengths[:, None]) & (positions < self.writing_ends[:, None])
        self.steps = np.full(self.masked.shape, NEVER, dtype=np.int64)
        self.history = History(self.masked.shape) if self.revising is not None else None
        self.stops = torch.tensor(spec.stop_token_ids, dtype=torch.long, device=self.device)
        self.stopped_at = np.full(len(prompts), self.NOWHERE)  # position of the leftmost stop token so far
        self.reached = np.zeros(len(prompts), dtype=np.int64)  # number of blocks begun

        num_lanes = min(len(prompts), batch_size or len(prompts))
        self.lanes: list[Lane | None] = [None] * num_lanes
        self.queue = iter(range(len(prompts)))
        self.cache, self.capacity = None, None
        if spec.attention == "block" or config.approximate_cache is not None:
            self.capacity = width
            self.cache = lane_cache(unwrap(model).config, num_lanes, width)

    def run(self) -> TrajectoryBatch:
        """Denoises every response to its end."""
        with plans_enabled(unwrap(self.model)), self.pace as pace:
            self._admit()
            while pace.go_on(any(self.lanes)):
                if any(self.lanes):
                    self._step()
                    self._admit()
                else:
                    self._idle()
        return self._trajectories()

    # ---------------------------------------------------------------------------------------------------- lanes

    def _admit(self) -> None:
        """Gives free lanes the next prompts of the queue."""
        for place, lane in enumerate(self.lanes):
            if lane is None:
                row = next(self.queue, None)
                if row is None:
                    return
                self.lanes[place] = self._begin_block(Lane(row))

    def _begin_block(self, lane: Lane) -> Lane:
        """Moves a lane to the next block of its response, and returns the lane."""
        lane.block, lane.step, lane.part = lane.block + 1, 0, -1
        lane.filled, lane.revised, lane.settled = False, 0, False
        if self.revising is None or self.spec.attention == "block":
            lane.taken = 0
        if self.spec.attention == "full":
            lane.cached = 0  # all keys and values have changed
        start = self.spec.block_start(lane.block, self.lengths[lane.row])
        masked = self.masked[lane.row, start : start + self.spec.block_size]
        lane.total = int(masked.sum()) - int(self.spec.first_token == "autoregressive" and masked[0])
        if self.generators is not None and self.revising is None:
            kinds = 2 if self._strategy_is_random else 1
            width = self.spec.block_size * (lane.block + 1 if self.is_wide else 1)
            steps = self.spec.block_size + (self.config.steps_per_block or 0) + 1
            lane.uniforms = torch.rand(kinds, steps, width, generator=self.generators[lane.row])
        self.reached[lane.row] = lane.block + 1
        return lane

    @property
    def _strategy_is_random(self) -> bool:
        return callable(self.config.strategy) or self.config.strategy == "random"

    def _is_over(self, lane: Lane, left: int) -> bool:
        """Whether the active block, of which `left` positions are masked, is finished."""
        if self.revising is not None:
            return left == 0 and (lane.settled or not self._may_take_back(lane))
        if self.config.allow_mask_token:  # the schedule ends even if positions are left
            steps = self.config.steps_per_block
            assert steps is not None  # see DecodingConfig
            while lane.step < steps and not step_quota(lane.step, lane.total, left, self.config):
                lane.step += 1
            return left == 0 or lane.step >= steps
        if self.config.stop_rule == "token":
            end = min(self.stopped_at[lane.row], self.lengths[lane.row] + self.new_tokens[lane.row])
            return left == 0 or not self.masked[lane.row, :end].any()
        return left == 0

    def _has_stopped(self, row: int) -> bool:
        return self.stopped_at[row] < self.canvas_ends[row]

    def active_lanes(self) -> list[Lane]:
        """The lanes with a response, for a function that shows progress."""
        return [lane for lane in self.lanes if lane is not None]

    def canvas(self, row: int) -> list[tuple[int, bool]]:
        """Each token of a response up to the end of its active block, and whether it is masked."""
        positions = self._begun(row)
        return list(zip(self.ids[row, positions].tolist(), self.masked[row, positions].tolist(), strict=True))

    def canvas_logps(self, row: int) -> list[float]:
        """The recorded log-probability of each token of [`canvas`], 0 where it is masked."""
        return self.logps[row, self._begun(row)].tolist()

    def _begun(self, row: int) -> slice:
        """The positions of a response up to the end of its active block."""
        end = min(self.spec.block_start(self.reached[row], self.lengths[row]), self.writing_ends[row])
        return slice(self.lengths[row], end)

    def most_steps_left(self, lane: Lane) -> int:
        """
        The largest number of denoising steps that a response may still take. It takes fewer if it ends early, or if its
        strategy unmasks more positions than the schedule says.
        """
        size, row = self.spec.block_size, lane.row
        start = int(self.spec.block_start(lane.block, self.lengths[row]))
        masked = self.masked[row, start : start + size]
        left = 0
        if not self._is_over(lane, int(masked.sum())):
            left = most_steps(masked, lane.step, lane.total, self.spec, self.config, lane.revised)
        later = int(self.num_blocks[row]) - lane.block - 1
        if later and not self._has_stopped(row):
            total = size - int(self.spec.first_token == "autoregressive")
            left += later * most_steps(np.ones(size, dtype=bool), 0, total, self.spec, self.config)
        return left

    # ----------------------------------------------------------------------------------------------------- step

    def _step(self) -> None:
        """One denoising step of every lane."""
        places = [place for place, lane in enumerate(self.lanes) if lane is not None]
        lanes = self.active_lanes()
        rows = np.array([lane.row for lane in lanes])
        window = self._window(lanes, rows)
        spans = self._spans(np.array(places), lanes, rows, window)
        row_of, column_of = np.nonzero(window.looked_at)
        shift = (
            int(self.spec.token_shift) | window.autoregressive[row_of]
        )  # a token is read from the position before it
        logits = self._forward(spans, row_of, window.positions[row_of, column_of] - shift)

        choice = self._choose(lanes, rows, window, row_of, column_of, logits)
        stops = torch.isin(choice.tokens, self.stops) & choice.written
        flags = torch.stack([choice.written, choice.erased, stops, choice.broken])
        written, erased, stops, broken = flags.cpu().numpy()  # the only wait for the device
        if broken.any():
            candidate = int(broken.argmax())
            raise self._broken(lanes[row_of[candidate]], logits[candidate])
        taken_back = np.zeros(len(lanes), dtype=np.int64)
        if self.history is not None:
            taken_back = self._take_back(lanes, rows, window, row_of, column_of, choice, written, erased, stops)
        self._remember(lanes, rows, window, row_of[written], column_of[written], stops[written], taken_back)
        if self.on_step is not None:
            self.on_step(self)
        for place, lane, left in zip(places, lanes, self._left(rows, window), strict=True):
            if self._is_over(lane, left):
                last = self._has_stopped(lane.row) or lane.block + 1 == self.num_blocks[lane.row]
                self.lanes[place] = None if last else self._begin_block(lane)

    def _window(self, lanes: list[Lane], rows: np.ndarray) -> Window:
        """The active block of each lane, and the positions in it that may be unmasked."""
        size = self.spec.block_size
        starts = self.heads[rows] + np.array([lane.block for lane in lanes]) * size
        ends = starts + size
        if self.is_wide:  # positions of earlier blocks are looked at again
            starts = self.heads[rows]
        positions = starts[:, None] + np.arange((ends - starts).max())
        inside = positions < ends[:, None]
        positions = np.minimum(positions, ends[:, None] - 1)
        masked = self.masked[rows[:, None], positions] & inside
        candidates = leftmost_part(masked, self.config.sub_block_size)
        autoregressive = masked[:, 0] & (self.spec.first_token == "autoregressive")
        candidates[autoregressive, 1:] = False
        quota = [
            1 if first else self._quota(lane, int(left))
            for lane, left, first in zip(lanes, masked.sum(1), autoregressive, strict=True)
        ]
        quota = np.minimum(quota, candidates.sum(1))
        visible = np.zeros_like(masked)
        if self.history is not None:
            may = self.history.counts[rows[:, None], positions] < self.config.revision_limit
            written = (positions >= self.lengths[rows][:, None]) & (positions < self.writing_ends[rows][:, None])
            visible = inside & ~masked & written & may
            if self.spec.first_token == "autoregressive":
                visible[:, 0] = False  # it is not revised
            visible[[not self._may_take_back(lane) for lane in lanes]] = False
        return Window(starts, positions, inside, masked, candidates, autoregressive, quota, visible)

    def _may_take_back(self, lane: Lane) -> bool:
        """Whether the next step of a block may take tokens back. The last step of a block erases nothing, because erased
        positions would stay masked."""
        assert self.revising is not None
        last = 0 if self.revising.edits else 1
        steps, more = self.config.steps_per_block, self.config.revision_steps
        within = steps is None or lane.step + last < steps
        return within and (more is None or not lane.filled or lane.revised + last < more)

    def _quota(self, lane: Lane, left: int) -> int:
        """Number of positions that the next step of the schedule unmasks. Steps that unmask nothing are skipped."""
        if lane.filled:
            return left
        while not (quota := step_quota(lane.step, lane.total, left, self.config)):
            lane.step += 1
        return quota

    def _spans(self, places: np.ndarray, lanes: list[Lane], rows: np.ndarray, window: Window) -> Spans:
        """The tokens that this step runs: those that are not in the cache."""
        size, shift = self.spec.block_size, int(self.spec.token_shift)
        starts = self.heads[rows] + np.array([lane.block for lane in lanes]) * size
        cached = np.array([lane.cached for lane in lanes])
        cache = self.config.approximate_cache
        if self.spec.attention == "full":
            begins, key_ends = cached, self.canvas_ends[rows]
            ends = np.where(cached > 0, starts + size, key_ends) if cache == "dual" else key_ends
            if cache is not None:  # valid until the block is finished
                for lane, start in zip(lanes, starts, strict=True):
                    lane.cached = int(start) - shift
        else:
            # Clean tokens that are not in the cache yet run in the same pass, which adds them to the cache.
            begins = self._share_prompts(places, lanes, cached)
            ends = key_ends = np.where(window.autoregressive, starts, starts + size)
            for lane, start in zip(lanes, starts, strict=True):
                lane.cached = int(start)
            if cache == "sub_block":
                begins, ends = self._part_spans(lanes, window, begins, ends)
        return Spans(rows, places, self.heads[rows], starts, begins, ends, key_ends)

    def _share_prompts(self, places: np.ndarray, lanes: list[Lane], cached: np.ndarray) -> np.ndarray:
        """
        Where each lane begins to run in this pass. Of lanes with the same prompt, one runs its whole blocks, and the others copy their
        keys and values.
        """
        assert self.cache is not None and self.capacity is not None
        self.cache.slots.copy = None
        new = [index for index, number in enumerate(cached) if not number and self.heads[lanes[index].row]]
        if not new:
            return cached
        prefixes = [tuple(self.prompts[lane.row][: self.heads[lane.row]]) for lane in lanes]
        owners: dict[tuple[int, ...], int] = {prefix: index for index, prefix in enumerate(prefixes) if cached[index]}
        begins, sources, targets = cached.copy(), [], []
        for index in new:
            owner = owners.setdefault(prefixes[index], index)
            if owner != index:
                begins[index] = self.spec.copied(len(prefixes[index]))
                slots = np.arange(begins[index])
                sources.append(places[owner] * self.capacity + slots)
                targets.append(places[index] * self.capacity + slots)
        if sources:
            self.cache.slots.copy = (
                self._to_device(np.concatenate(sources)),
                self._to_device(np.concatenate(targets)),
            )
        return begins

    def _part_spans(
        self, lanes: list[Lane], window: Window, begins: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Narrows the tokens of a pass to the active part of a block, as soon as its surroundings are in the cache."""
        begins, ends, size = begins.copy(), ends.copy(), self.config.sub_block_size
        parts = window.candidates.argmax(1) // size
        for index, (lane, part) in enumerate(zip(lanes, parts, strict=True)):
            if window.autoregressive[index]:
                continue
            if lane.part == part:
                start = window.starts[index] + part * size
                begins[index] = max(start - int(self.spec.token_shift), window.starts[index])
                ends[index] = min(start + size, ends[index])
            lane.part = int(part)
        return begins, ends

    def _forward(self, spans: Spans, sequences: np.ndarray, positions: np.ndarray) -> Tensor:
        """Logits at some positions of sequences of `spans`: `(M, V)`."""
        sequence, position = spans.tokens()
        num_keys = len(position)
        if self.cache is not None:
            num_keys = self.cache.slots.number
            self.cache.slots.write = self._to_device(spans.lanes[sequence] * self.capacity + position)
        position_ids = self._to_device(position)[None]
        columns = self._to_device(spans.offsets[sequences] + positions - spans.begins[sequences])
        return policy_logits(
            self.model,
            self.ids[self._to_device(spans.rows[sequence]), position_ids[0]][None],
            position_ids,
            ragged_mask(spans, self.spec, self.capacity, num_keys, self.device),
            torch.zeros_like(columns),
            columns,
            cache=self.cache,
        )

    def _choose(self, lanes, rows, window: Window, row_of, column_of, logits: Tensor) -> Choice:
        """Proposes a token for each position that is looked at. Writes and erases the tokens that the strategies select."""
        places = (self._to_device(row_of), self._to_device(column_of))
        uniforms = self._uniforms(lanes, window)
        noise = uniforms[0][places] if uniforms is not None and self.config.temperature > 0 else None
        proposal = propose(logits, self.spec, self.config, noise)
        candidates, quota = torch.from_numpy(window.candidates).to(self.device), self._to_device(window.quota)
        where = (self._to_device(rows[row_of]), self._to_device(window.positions[row_of, column_of]))
        before, logps_before = self.ids[where], self.logps[where]
        nothing = torch.zeros_like(proposal.tokens, dtype=torch.bool)
        is_masked, erased, edited = ~nothing, nothing, nothing
        if self.revising is not None:
            is_masked = candidates[places]
            selected = self._select_visible(window, places, proposal, before, uniforms)
            erased, edited = (nothing, selected[places]) if self.revising.edits else (selected[places], nothing)
            more = torch.zeros_like(quota).index_add(0, places[0], erased.long())
            quota = (quota + more).minimum(candidates.sum(1))  # the schedule says how many more tokens are visible
        unmasked = self._select_masked(window, candidates, quota, places, is_masked, proposal, uniforms)
        logps = proposal.logps
        if self.config.selection is not None:
            logps = logps + self.config.selection.shares(
                proposal.log_probs, proposal.seen, proposal.tokens, places[0], unmasked, is_masked & ~unmasked
            )
        written = unmasked | edited
        others: int | Tensor = self.spec.mask_token_id
        logps_of_others: float | Tensor = 0.0
        if self.revising is not None:
            stays = ~is_masked & ~erased
            others, logps_of_others = before.where(stays, self.spec.mask_token_id), logps_before.where(stays, 0.0)
        self.ids[where] = torch.where(written, proposal.tokens, others)
        self.logps[where] = torch.where(written, logps, logps_of_others)
        return Choice(proposal.tokens, written, erased, ~proposal.logps.isfinite(), before, logps_before)

    def _select_masked(
        self,
        window: Window,
        candidates: Tensor,
        quota: Tensor,
        places: tuple[Tensor, Tensor],
        is_masked: Tensor,
        proposal: Proposal,
        uniforms: Tensor | None,
    ) -> Tensor:
        """Which places are unmasked, boolean, `(M,)`."""
        zeros = torch.zeros(candidates.shape, device=self.device)
        log_probs, own = proposal.seen, places
        if self.revising is not None:
            log_probs, own = log_probs[is_masked], (places[0][is_masked], places[1][is_masked])
        view = StepView(
            candidates=candidates,
            quota=quota,
            token_logps=zeros.index_put(places, proposal.seen_logps).masked_fill(~candidates, 0.0),
            best_logps=zeros.index_put(places, proposal.best_logps).masked_fill(~candidates, 0.0),
            log_probs=log_probs,
            places=own,
            config=self.config,
            uniforms=uniforms[1] if uniforms is not None and self._strategy_is_random else None,
        )
        chosen = self._checked(self.strategy(view), candidates.shape, f"decoding strategy {self.config.strategy!r}")
        unmasked = (chosen & candidates)[places]
        if window.autoregressive.any():
            unmasked = unmasked | torch.from_numpy(window.autoregressive).to(self.device)[places[0]]
        if self.config.allow_mask_token:
            unmasked = unmasked & (proposal.tokens != self.spec.mask_token_id)
        return unmasked

    def _select_visible(
        self,
        window: Window,
        places: tuple[Tensor, Tensor],
        proposal: Proposal,
        before: Tensor,
        uniforms: Tensor | None,
    ) -> Tensor:
        """Which visible tokens are taken back, boolean, `(L, B)`."""
        assert self.revising is not None
        visible, masked = (torch.from_numpy(one).to(self.device) for one in (window.visible, window.candidates))
        zeros = torch.zeros(visible.shape, device=self.device)
        shown = proposal.seen.gather(1, before[:, None]).squeeze(1)
        size = self.config.revision_max
        limit = torch.from_numpy(-(-window.inside.sum(1) // 5)).to(self.device)
        view = ReviseView(
            masked=masked,
            visible=visible,
            quota=self._to_device(window.quota),
            limit=limit if size is None else torch.full_like(limit, size),
            shown_logps=zeros.index_put(places, shown).masked_fill(~visible, 0.0),
            best_logps=zeros.index_put(places, proposal.best_logps),
            best_differs=(zeros > 0).index_put(places, proposal.best_tokens != before) & visible,
            sampled_logps=zeros.index_put(places, proposal.seen_logps),
            sampled_differs=(zeros > 0).index_put(places, proposal.tokens != before) & visible,
            config=self.config,
            uniforms=None if uniforms is None else uniforms[2],
        )
        selected = self.revising.select(view)
        return self._checked(selected, visible.shape, f"revising strategy {self.revising.name!r}") & visible

    @staticmethod
    def _checked(selected: Tensor, shape: torch.Size, what: str) -> Tensor:
        if selected.dtype != torch.bool or selected.shape != shape:
            raise ValueError(
                f"The {what} must return a boolean tensor of the positions' shape, {tuple(shape)}; got "
                f"{selected.dtype} of shape {tuple(selected.shape)}."
            )
        return selected

    def _broken(self, lane: Lane, logits: Tensor) -> NonFiniteLogits:
        """The error for a candidate whose logits, `(V,)`, leave no token to propose."""
        advice = NON_FINITE_ADVICE
        tempered = logits.float() / (self.config.temperature or 1.0)
        if logits.isnan().any():
            found = "hold NaN"
        elif (logits == torch.inf).any():
            found = "hold infinity"
        elif (tempered == torch.inf).any():
            found = f"overflow when they are divided by the temperature, {self.config.temperature}"
            advice = "Raise it, or set it to 0 for the likeliest token."
        else:
            found = "give every token that may be proposed probability 0"
            advice = "Are all of them among `suppress_tokens`?" if self.config.suppress_tokens else advice
        where = f"at step {lane.taken} of block {lane.block} of its response (counted from 0)"
        return NonFiniteLogits(lane.row, f"the policy's logits {found}, {where}. {advice}")

    def _uniforms(self, lanes: list[Lane], window: Window) -> Tensor | None:
        """Random numbers of this step, `(kinds, L, B)`."""
        if self.generators is None:
            return None
        if self.revising is not None:  # drawn step by step, since the number of steps is not known in advance
            uniforms = torch.zeros(3, *window.masked.shape)
            for index, (lane, width) in enumerate(zip(lanes, window.inside.sum(1).tolist(), strict=True)):
                uniforms[:, index, :width] = torch.rand(3, width, generator=self.generators[lane.row])
            return uniforms.to(self.device, non_blocking=True)
        drawn = [lane.uniforms for lane in lanes if lane.uniforms is not None]  # every lane has some
        uniforms = torch.zeros(drawn[0].shape[0], *window.masked.shape)
        for index, (lane, own) in enumerate(zip(lanes, drawn, strict=True)):
            step = 0 if window.autoregressive[index] else lane.step + 1
            uniforms[:, index, : own.shape[2]] = own[:, step]
        return uniforms.to(self.device, non_blocking=True)

    def _take_back(
        self, lanes, rows, window: Window, row_of, column_of, choice: Choice, written, erased, stops
    ) -> np.ndarray:
        """Records on the host which tokens this step took back. Returns their number in each lane."""
        assert self.history is not None
        changed = erased | (written & window.visible[row_of, column_of])
        own, positions = rows[row_of], window.positions[row_of, column_of]
        taken = np.array([lane.taken for lane in lanes])
        index = self._to_device(np.nonzero(changed)[0])
        self.history.add(
            own[changed],
            positions[changed],
            self.steps[own[changed], positions[changed]],
            taken[row_of[changed]],
            choice.before[index],
            choice.logps_before[index],
        )
        self.masked[own[erased], positions[erased]] = True
        self.steps[own[erased], positions[erased]] = NEVER
        self.history.stops[own[changed], positions[changed]] = False
        self.history.stops[own[stops], positions[stops]] = True
        found = self.history.stops[rows]
        self.stopped_at[rows] = np.where(found.any(1), found.argmax(1), self.NOWHERE)
        return np.bincount(row_of[changed], minlength=len(lanes))

    def _remember(self, lanes, rows, window: Window, row_of, column_of, stops, taken_back) -> None:
        """Records on the host what this step wrote. `row_of`, `column_of` and `stops` have one entry for each write."""
        progress = np.bincount(row_of, minlength=len(lanes))
        if not (progress > 0)[window.candidates.any(1)].all() and not self.config.allow_mask_token:
            raise ValueError(
                f"The decoding strategy {self.config.strategy!r} unmasked nothing in a block that still has masked positions, "
                "so decoding would never end. A strategy must select at least one candidate of every row that has candidates."
            )
        positions = window.positions[row_of, column_of]
        taken = np.array([lane.taken for lane in lanes])
        self.masked[rows[row_of], positions] = False
        self.steps[rows[row_of], positions] = taken[row_of]
        if self.history is None:
            np.minimum.at(self.stopped_at, rows[row_of][stops], positions[stops])
        changed, left = progress + taken_back, self._left(rows, window)
        for index, (lane, first) in enumerate(zip(lanes, window.autoregressive, strict=True)):
            lane.taken += bool(changed[index])
            lane.step += not first
            if self.revising is not None:
                lane.revised += lane.filled
                lane.settled = lane.filled and not taken_back[index]
                lane.filled = lane.filled or not left[index]

    def _left(self, rows: np.ndarray, window: Window) -> np.ndarray:
        """Positions of each window that are masked."""
        return (self.masked[rows[:, None], window.positions] & window.inside).sum(1)

    def _idle(self) -> None:
        """Runs a forward pass without a response, because all processes must gather parameters together."""
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        policy_logits(self.model, zero, zero, allowed, zero[0], zero[0])

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(self.device, non_blocking=True)

    # --------------------------------------------------------------------------------------------------- result

    def _trajectories(self) -> TrajectoryBatch:
        """The trajectories, with canvases cut from their rows."""
        # With full attention, the policy saw blocks that were never reached, as masks.
        blocks = self.num_blocks if self.spec.attention == "full" else self.reached
        lengths = blocks * self.spec.block_size - self.tails
        width = max(int(lengths.max(initial=0)), 1)
        columns = np.arange(width)
        inside = columns < lengths[:, None]
        slots = np.minimum(self.lengths[:, None] + columns, max(self.masked.shape[1] - 1, 0))
        steps = np.where(inside, np.take_along_axis(self.steps, slots, 1), NEVER)

        # A completion ends at the first stop token, or at `max_new_tokens`.
        counted = np.minimum(self.reached * self.spec.block_size - self.tails, self.new_tokens)
        ends = np.minimum(counted, self.stopped_at - self.lengths + 1)

        prompt_width = int(self.lengths.max(initial=0))
        prompt_ids = torch.zeros(len(self.prompts), prompt_width, dtype=torch.long)
        for row, prompt in enumerate(self.prompts):
            prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        prompt_mask = np.arange(prompt_width) >= (prompt_width - self.lengths)[:, None]
        slots, outside = self._to_device(slots), torch.from_numpy(~inside).to(self.device)
        return TrajectoryBatch(
            prompt_ids=prompt_ids.to(self.device),
            prompt_mask=self._to_device(prompt_mask),
            canvas_ids=self.ids.gather(1, slots).masked_fill(outside, 0),
            steps=self._to_device(steps),
            logps=self.logps.gather(1, slots).masked_fill(outside, 0.0),
            canvas_lengths=self._to_device(lengths),
            completion_lengths=self._to_device(ends),
            cache=self.config.approximate_cache or "exact",
            revisions=None if self.history is None else self.history.revisions(self.lengths, self.device),
        )


def leftmost_part(masked: np.ndarray, size: int | None) -> np.ndarray:
    """
    The masked positions of the leftmost part that has masked positions, boolean, `(L, B)`. Parts have `size` positions;
    `None`: the whole block is one part. The result is a copy.
    """
    if size is None:
        return masked.copy()
    parts = np.arange(masked.shape[1]) // size
    first = np.where(masked, parts, masked.shape[1]).min(1, keepdims=True)
    return masked & (parts == first)


def most_steps(
    masked: np.ndarray, step: int, total: int, spec: DiffusionSpec, config: DecodingConfig, revised: int = 0
) -> int:
    """
    The largest number of denoising steps that a block may still take.

    Args:
        masked (boolean `np.ndarray` of shape `(B,)`): positions that are masked.
        step (`int`): finished steps of the block's schedule.
        total (`int`): positions that the schedule divides into steps.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`DecodingConfig`]): settings.
        revised (`int`, *optional*, defaults to `0`): steps after the block was filled for the first time.
    """
    if config.allow_mask_token:  # positions may stay masked, so no step is left out
        assert config.steps_per_block is not None  # see DecodingConfig
        return config.steps_per_block - step
    masked, count, finished = masked.copy(), 0, step
    if spec.first_token == "autoregressive" and masked[0]:
        masked[0], count = False, 1
    first = count
    follows = config.strategy in (*SCHEDULED, "threshold", "sampled_threshold")  # others unmask at least one position
    while masked.any():
        quota = step_quota(step, total, int(masked.sum()), config) if follows else 1
        (candidates,) = np.nonzero(leftmost_part(masked[None], config.sub_block_size)[0])
        masked[candidates[:quota]] = False
        step, count = step + 1, count + bool(quota)
    if config.revising is None:
        return count
    if config.steps_per_block is not None:
        return max(config.steps_per_block - finished + first, count)
    return count + max((config.revision_steps or config.revision_limit * len(masked) + 1) - revised, 0)
