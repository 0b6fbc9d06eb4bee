"""The denoising loop, for block attention and for full attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..policies.forward import log_distribution, policy_logits, unwrap
from ..trajectories.trajectory import NEVER, TrajectoryBatch
from .cache import block_cache
from .strategies import SELECT, leftmost_part, quota_at


class _Loop:
    """
    State of one call of [`decode`]; what is common to block and full attention.

    Every row is laid out in *slots*, left-padded so that block `k` of the response starts at the same slot in all
    rows: `[padding | whole blocks of the prompt | block 0 | block 1 | ...]`. Block 0 begins with the prompt's tail.
    """

    def __init__(self, model, prompts, config, spec, seeds):
        self.model, self.config, self.spec = model, config, spec
        self.generators = None
        if config.temperature > 0:
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        device = next(model.parameters()).device
        block_size = spec.block_size
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tails = spec.prompt_tail(lengths)
        heads = lengths - tails  # tokens of the prompt before block 0
        self.prefix = int(heads.max())
        num_blocks = -(-(tails + config.max_new_tokens) // block_size)  # (R,)
        width = self.prefix + int(num_blocks.max()) * block_size
        self.num_blocks = num_blocks.to(device)

        ids = torch.full((len(prompts), width), spec.mask_token_id)
        for row, (prompt, head) in enumerate(zip(prompts, heads.tolist(), strict=True)):
            start = self.prefix - head
            ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        slots = torch.arange(width)
        self.prompts, self.lengths, self.tails = prompts, lengths, tails
        self.starts = (self.prefix - heads).to(device)  # slot of position 0
        self.ids = ids.to(device)
        self.masked = (slots >= (self.prefix + tails)[:, None]).to(device)
        self.steps = torch.full_like(self.ids, NEVER)
        self.logps = torch.zeros(self.ids.shape, device=device)
        self.live = torch.arange(len(prompts), device=device)  # rows still in the batch
        self.stop = torch.tensor(spec.stop_token_ids, dtype=torch.long, device=device)
        self.done_blocks = torch.zeros(len(prompts), dtype=torch.long, device=device)

    def run(self) -> TrajectoryBatch:
        """Denoises block after block until every row has stopped or is full."""
        for block in range(int(self.num_blocks.max())):
            self._denoise(block)
            self.done_blocks[self.live] = block + 1
            canvas = slice(self.prefix, self.prefix + (block + 1) * self.spec.block_size)
            stopped = torch.isin(self.ids[self.live, canvas], self.stop) & (self.steps[self.live, canvas] != NEVER)
            finished = stopped.any(1) | (self.num_blocks[self.live] == block + 1)
            if finished.any():
                self._keep(~finished)
            if len(self.live) == 0:
                break
        return self._trajectories()

    def _keep(self, rows: Tensor) -> None:
        """Only these of the live rows go on; a boolean mask."""
        self.live = self.live[rows]

    def _denoise(self, block: int) -> None:
        """Unmasks one block of every live row."""
        start = self.prefix + block * self.spec.block_size
        end = start + self.spec.block_size
        if self.config.allow_mask_token:  # what earlier blocks have left is tried again
            start = self.prefix
        here = (self.live, slice(start, end))
        ids, masked, steps, logps = self.ids[here], self.masked[here], self.steps[here], self.logps[here]
        uniforms = self._uniforms()
        row_steps = torch.zeros_like(self.live)  # decoding steps that each row has taken in this block

        if self.spec.first_token == "autoregressive":
            row_steps += masked[:, 0]
            masked = self._first_token(start, ids, masked, steps, logps, uniforms)
        total = masked[:, -self.spec.block_size :].sum(1)
        step = 0
        while masked.any() and not (self.config.allow_mask_token and step >= self.config.steps_per_block):
            quota = quota_at(step, total, masked.sum(1), self.config)
            step += 1
            if not quota.any():
                continue
            candidates = leftmost_part(masked, self.config.sub_block_size)
            tokens, log_probs = self._propose(start, ids, candidates, None if uniforms is None else uniforms[:, step])
            chosen = SELECT[self.config.strategy](log_probs.exp(), candidates, quota, self.config)
            chosen = chosen & (tokens != self.spec.mask_token_id)  # only if `allow_mask_token`
            ids = torch.where(chosen, tokens, ids)
            logps = torch.where(chosen, log_probs, logps)
            steps = torch.where(chosen, row_steps[:, None], steps)
            row_steps += chosen.any(1)
            masked = masked & ~chosen
        self.ids[here], self.masked[here], self.steps[here], self.logps[here] = ids, masked, steps, logps

    def _uniforms(self) -> Tensor | None:
        """A random number for each live row, each step that a block can take, and each position of the block."""
        if self.generators is None:
            return None
        shape = (self.spec.block_size + (self.config.steps_per_block or 0) + 1, self.spec.block_size)
        rows = [torch.rand(shape, generator=self.generators[row]) for row in self.live.tolist()]
        return torch.stack(rows).to(self.ids.device)

    def _propose(self, start: int, ids: Tensor, candidates: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """A token for each candidate position of the block that begins at slot `start`, and its log-probability."""
        rows, columns = candidates.nonzero(as_tuple=True)
        logits = self._block_logits(start, ids, rows, columns - int(self.spec.token_shift))
        tokens, log_probs = self._sample(logits, None if uniforms is None else uniforms[rows, columns])
        return ids.index_put((rows, columns), tokens), torch.zeros_like(ids, dtype=torch.float).index_put(
            (rows, columns), log_probs
        )

    def _block_logits(self, start: int, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits at places of the block that begins at slot `start` and holds `ids`; column -1 is the slot before."""
        raise NotImplementedError

    def _sample(self, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        One token for each of `M` rows of logits, and its log-probability under the distribution it was sampled from.
        `uniforms`, of shape `(M,)`, picks it from the cumulative distribution; without it the most likely one is taken.
        """
        log_probs = log_distribution(logits, self.spec, self.config.temperature, self.config.top_k)
        choices = log_probs
        if self.spec.predicts_mask_token and not self.config.allow_mask_token:
            # It has a share of the distribution, yet it is no answer.
            choices = choices.index_fill(-1, torch.tensor(self.spec.mask_token_id, device=logits.device), -torch.inf)
        if uniforms is None:
            tokens = choices.argmax(-1)
        else:
            cumulative = choices.exp().cumsum(-1)
            tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
            tokens = tokens.clamp(max=logits.shape[-1] - 1)
        return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)

    def _canvas_blocks(self) -> Tensor:
        """Number of blocks of each row that belong to its canvas, shape `(R,)`."""
        raise NotImplementedError

    def _trajectories(self) -> TrajectoryBatch:
        """The canvases, cut out of their slots."""
        device = self.ids.device
        tails = self.tails.to(device)
        canvas_lengths = self._canvas_blocks() * self.spec.block_size - tails
        width = max(int(canvas_lengths.max()), 1)
        columns = torch.arange(width, device=device)
        slots = (self.prefix + tails[:, None] + columns).clamp(max=self.ids.shape[1] - 1)
        inside = columns < canvas_lengths[:, None]
        steps = self.steps.gather(1, slots).masked_fill(~inside, NEVER)
        canvas = self.ids.gather(1, slots).masked_fill(~inside, 0)

        reached = self.done_blocks * self.spec.block_size - tails
        counted = (columns < self.config.max_new_tokens) & (columns < reached[:, None])
        stops = torch.isin(canvas, self.stop) & counted
        ends = torch.where(stops.any(1), stops.long().argmax(1) + 1, counted.sum(1))

        prompt_width = int(self.lengths.max())
        prompt_ids = torch.zeros(len(self.prompts), prompt_width, dtype=torch.long)
        for row, prompt in enumerate(self.prompts):
            prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        prompt_mask = torch.arange(prompt_width) >= (prompt_width - self.lengths)[:, None]
        return TrajectoryBatch(
            prompt_ids=prompt_ids.to(device),
            prompt_mask=prompt_mask.long().to(device),
            canvas_ids=canvas,
            steps=steps,
            logps=self.logps.gather(1, slots).masked_fill(~inside, 0.0),
            canvas_lengths=canvas_lengths,
            completion_lengths=ends,
        )


class BlockLoop(_Loop):
    """Block attention: what is finished is in a cache, what is to come does not exist yet."""

    def __init__(self, model, prompts, config, spec, seeds):
        super().__init__(model, prompts, config, spec, seeds)
        width = self.ids.shape[1]
        self.cache = block_cache(unwrap(model).config, width)
        slots = torch.arange(width, device=self.ids.device)
        self.slot_block = (slots - self.prefix).div(spec.block_size, rounding_mode="floor")
        if spec.block_origin == "response":
            self.slot_block = self.slot_block.clamp(min=-1)

    def _canvas_blocks(self) -> Tensor:
        return self.done_blocks

    def _keep(self, rows: Tensor) -> None:
        super()._keep(rows)
        self.cache.select(rows)

    def _first_token(self, start, ids, masked, steps, logps, uniforms) -> Tensor:
        """
        Writes the autoregressive first token of a block, from the last clean position before it, into `ids`, `steps`
        and `logps`; returns what is masked then.
        """
        length = self.cache.length
        if start > length:
            rows = masked[:, 0].nonzero().squeeze(1)
            logits = self._forward(self.ids[self.live, length:start], rows, torch.full_like(rows, start - length - 1))
            self.cache.commit(start - length)
            tokens, log_probs = self._sample(logits, None if uniforms is None else uniforms[rows, 0, 0])
            ids[rows, 0], logps[rows, 0], steps[rows, 0] = tokens, log_probs, 0
        masked = masked.clone()
        masked[:, 0] = False
        return masked

    def _block_logits(self, start: int, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        length = self.cache.length
        pending = start - length  # clean tokens that are not in the cache yet ride along
        inputs = torch.cat([self.ids[self.live, length:start], ids], 1) if pending else ids
        logits = self._forward(inputs, rows, pending + columns)
        self.cache.commit(pending)
        return logits

    def _forward(self, inputs: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits at `(rows, columns)` of `inputs`, which continue the cache."""
        begin, end = self.cache.length, self.cache.length + inputs.shape[1]
        starts = self.starts[self.live]
        slots = torch.arange(end, device=inputs.device)
        query_slots = slots[begin:]
        allowed = self.slot_block[:end][None, :] <= self.slot_block[begin:end][:, None]
        allowed = allowed[None] & (slots >= starts[:, None])[:, None, :]
        allowed = allowed | (slots == query_slots[:, None])  # padding looks at itself, nothing looks at padding
        positions = (query_slots - starts[:, None]).clamp(min=0)
        return policy_logits(self.model, inputs, positions, allowed[:, None], rows, columns, cache=self.cache)


class FullLoop(_Loop):
    """Full attention: every step runs the whole canvas, whose blocks to come are masks."""

    def _canvas_blocks(self) -> Tensor:
        return self.num_blocks  # also what was never reached was seen, as masks

    def _block_logits(self, start: int, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        inputs = self.ids[self.live]
        inputs[:, start : start + ids.shape[1]] = ids
        starts = self.starts[self.live][:, None]
        slots = torch.arange(inputs.shape[1], device=inputs.device)
        ends = self.prefix + self.num_blocks[self.live][:, None] * self.spec.block_size
        allowed = (slots >= starts) & (slots < ends)
        positions = (slots - starts).clamp(min=0)
        return policy_logits(self.model, inputs, positions, allowed[:, None, None], rows, start + columns)
