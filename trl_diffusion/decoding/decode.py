"""The denoising loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..policies.forward import log_distribution, policy_logits, unwrap
from ..policies.spec import DiffusionSpec, get_spec
from ..trajectories.trajectory import NEVER, TrajectoryBatch
from .cache import BlockCache, block_cache
from .config import DecodingConfig
from .strategies import SELECT


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: list[list[int]],
    config: DecodingConfig,
    spec: DiffusionSpec | None = None,
    seeds: list[int] | None = None,
) -> TrajectoryBatch:
    """
    Denoises one response for each prompt, block by block, and remembers how.

    Finished blocks are kept in a key-value cache. The clean pass that fills it shares a forward with the first step of
    the next block. A row leaves the batch with the block that holds its stop token.

    Args:
        model (`nn.Module`):
            A block-attention policy.
        prompts (`list[list[int]]`):
            Token ids of the prompts, unpadded, of any lengths.
        config ([`DecodingConfig`]):
            Settings of the loop.
        spec ([`DiffusionSpec`], *optional*):
            Facts about the policy. Defaults to the ones stored in the model's config.
        seeds (`list[int]`, *optional*):
            One seed for each prompt; needed if `config.temperature > 0`. A response depends on its own prompt and seed
            alone, not on its neighbours in the batch, and not on the global random state.

    Returns:
        [`TrajectoryBatch`]

    Raises:
        ValueError: if there is no prompt, or one is empty, holds the mask token, or leaves no room for the response in
            the model's context; or if a temperature is given without one seed per prompt.
    """
    base = unwrap(model)
    spec = get_spec(base.config) if spec is None else spec
    if spec.attention != "block":
        raise NotImplementedError("Only block-attention policies can be decoded so far.")
    if len(prompts) == 0:
        raise ValueError("There is no prompt to decode.")
    if config.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError(
            "Sampling with a temperature needs `seeds`, one for each prompt, so that a rollout can be reproduced; got "
            f"{'none' if seeds is None else len(seeds)} for {len(prompts)} prompts."
        )
    check_prompts(prompts, spec, base.config, config.max_new_tokens)
    return _Run(model, prompts, config, spec, seeds).result()


def check_prompts(prompts: list[list[int]], spec: DiffusionSpec, config, max_new_tokens: int) -> None:
    """Raises a `ValueError` that names the first prompt that the policy cannot take, and why."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {row} is empty.")
        if spec.mask_token_id in prompt:
            where = prompt.index(spec.mask_token_id)
            raise ValueError(
                f"Prompt {row} contains the mask token ({spec.mask_token_id}) at position {where}. The policy would "
                "take it for a position to be denoised. Remove it from the data."
            )
        if context is None:
            continue
        tail = spec.prompt_tail(len(prompt))
        needed = len(prompt) - tail + -(-(tail + max_new_tokens) // spec.block_size) * spec.block_size
        if needed > context:
            raise ValueError(
                f"Prompt {row} has {len(prompt)} tokens. With up to {max_new_tokens} new tokens in whole blocks of "
                f"{spec.block_size} that makes {needed} positions, more than the policy's context of {context} "
                "(`max_position_embeddings`). Shorten or drop long prompts, or lower the number of new tokens."
            )


class _Run:
    """
    State of one call of [`decode`].

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
        self.num_blocks = -(-(tails + config.max_new_tokens) // block_size)  # (R,)
        width = self.prefix + int(self.num_blocks.max()) * block_size

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
        self.cache: BlockCache = block_cache(unwrap(model).config, width)
        self.slot_block = ((slots - self.prefix).div(block_size, rounding_mode="floor")).to(device)
        if spec.block_origin == "response":
            self.slot_block = self.slot_block.clamp(min=-1)

    def result(self) -> TrajectoryBatch:
        block_size = self.spec.block_size
        for block in range(int(self.num_blocks.max())):
            self._denoise(block)
            self.done_blocks[self.live] = block + 1
            end = self.prefix + (block + 1) * block_size
            canvas = slice(max(self.prefix, 0), end)
            stopped = torch.isin(self.ids[self.live, canvas], self.stop) & (self.steps[self.live, canvas] != NEVER)
            finished = stopped.any(1) | (self.num_blocks.to(self.live.device)[self.live] == block + 1)
            if finished.any():
                keep = ~finished
                self.live = self.live[keep]
                self.cache.select(keep)
            if len(self.live) == 0:
                break
        return self._trajectories()

    def _denoise(self, block: int) -> None:
        """Unmasks one block of every live row. Everything before `cache.length` is in the cache already."""
        start = self.prefix + block * self.spec.block_size
        end = start + self.spec.block_size
        rows = self.live
        ids, masked = self.ids[rows, start:end], self.masked[rows, start:end]
        steps, logps = self.steps[rows, start:end], self.logps[rows, start:end]
        uniforms = self._uniforms()
        first = torch.zeros_like(rows)  # decoding steps of a row before its first denoising step

        if self.spec.first_token == "autoregressive":
            first = masked[:, 0].clone()
            if start > self.cache.length:
                self._first_token(start, first, ids, steps, logps, uniforms)
            masked = masked.clone()
            masked[:, 0] = False
        step = 0
        while masked.any():
            tokens, log_probs = self._propose(start, ids, masked, None if uniforms is None else uniforms[:, step + 1])
            confidence = log_probs.exp()
            chosen = SELECT[self.config.strategy](confidence, masked, self.config)
            ids = torch.where(chosen, tokens, ids)
            logps = torch.where(chosen, log_probs, logps)
            steps = torch.where(chosen, step + first.long()[:, None], steps)
            masked = masked & ~chosen
            step += 1
        self.ids[rows, start:end], self.steps[rows, start:end], self.logps[rows, start:end] = ids, steps, logps

    def _uniforms(self) -> Tensor | None:
        """A random number for each live row, each step that a block can take, and each position of the block."""
        if self.generators is None:
            return None
        shape = (self.spec.block_size + 1, self.spec.block_size)
        rows = [torch.rand(shape, generator=self.generators[row]) for row in self.live.tolist()]
        return torch.stack(rows).to(self.ids.device)

    def _first_token(
        self, start: int, first: Tensor, ids: Tensor, steps: Tensor, logps: Tensor, uniforms: Tensor | None
    ) -> None:
        """The autoregressive first token of a block, from the last clean position before it (in place)."""
        length = self.cache.length
        rows = first.nonzero().squeeze(1)
        logits = self._forward(self.ids[self.live, length:start], rows, torch.full_like(rows, start - length - 1))
        self.cache.commit(start - length)
        tokens, log_probs = self._sample(logits, None if uniforms is None else uniforms[rows, 0, 0])
        ids[rows, 0], logps[rows, 0], steps[rows, 0] = tokens, log_probs, 0

    def _propose(self, start: int, ids: Tensor, masked: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """A token for each masked position of the block that begins at slot `start`, and its log-probability."""
        length = self.cache.length
        pending = start - length  # clean tokens that are not in the cache yet ride along
        inputs = torch.cat([self.ids[self.live, length:start], ids], 1) if pending else ids
        rows, columns = masked.nonzero(as_tuple=True)
        logits = self._forward(inputs, rows, pending + columns - int(self.spec.token_shift))
        self.cache.commit(pending)
        tokens, log_probs = self._sample(logits, None if uniforms is None else uniforms[rows, columns])
        return ids.index_put((rows, columns), tokens), torch.zeros_like(ids, dtype=torch.float).index_put(
            (rows, columns), log_probs
        )

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

    def _sample(self, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        One token for each of `M` rows of logits, and its log-probability under the distribution it was sampled from.
        `uniforms`, of shape `(M,)`, picks it from the cumulative distribution; without it the most likely one is taken.
        """
        log_probs = log_distribution(logits, self.spec, self.config.temperature)
        choices = log_probs
        if self.spec.predicts_mask_token:  # it has a share of the distribution, yet it is no answer
            choices = choices.index_fill(-1, torch.tensor(self.spec.mask_token_id, device=logits.device), -torch.inf)
        if uniforms is None:
            tokens = choices.argmax(-1)
        else:
            cumulative = choices.exp().cumsum(-1)
            tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
            tokens = tokens.clamp(max=logits.shape[-1] - 1)
        return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)

    def _trajectories(self) -> TrajectoryBatch:
        """The canvases, cut out of their slots."""
        device = self.ids.device
        tails = self.tails.to(device)
        canvas_lengths = self.done_blocks * self.spec.block_size - tails
        width = max(int(canvas_lengths.max()), 1)
        columns = torch.arange(width, device=device)
        slots = (self.prefix + tails[:, None] + columns).clamp(max=self.ids.shape[1] - 1)
        inside = columns < canvas_lengths[:, None]
        steps = self.steps.gather(1, slots).masked_fill(~inside, NEVER)
        canvas = self.ids.gather(1, slots).masked_fill(~inside, 0)

        counted = (columns < self.config.max_new_tokens) & inside
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
