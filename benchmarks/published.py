"""
The generation loops that the families published, rewritten plainly from what they do: one prompt at a time, logits of every
position of every pass, greedy. The benchmark of decoding measures against them, and the tests compare tokens with them.

Sources: `generate.py` of LLaDA (https://github.com/ML-GSAI/LLaDA), `diffusion_generate` of Dream
(https://github.com/DreamLM/Dream), `generate` in the checkpoint of Fast-dLLM v2
(https://huggingface.co/Efficient-Large-Model/Fast_dLLM_v2_7B), `generate.py` of SDAR (https://github.com/JetAstra/SDAR) and
`entropy_bounded` of its engine JetEngine, and the cached loops of Fast-dLLM v1 (https://github.com/NVlabs/Fast-dLLM).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trl_diffusion.policies.forward import CACHE


def _seen(model: nn.Module, ids: Tensor, cache: DynamicCache | None, allowed: Tensor, begin: int) -> Tensor:
    """Logits of `ids`, which stand at positions `begin` and following; keys are the cache and `ids`. Shape `(1, N, V)`."""
    positions = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
    return model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=allowed[None, None],
        **{CACHE: cache},
        use_cache=cache is not None,
    ).logits


def _forget(cache: DynamicCache, length: int) -> None:
    """Leaves the first `length` tokens in a cache."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


def _best(probabilities: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """Largest probability and token of each row, of shape `(N,)` each. The mask token keeps its share and is never taken:
    the published loops would go on for ever."""
    return probabilities.index_fill(1, torch.tensor(mask, device=probabilities.device), -1.0).max(-1)


def _all(queries: int, keys: int, device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device)


def _block_causal(length: int, block_size: int, device) -> Tensor:
    blocks = torch.arange(length, device=device) // block_size
    return blocks[:, None] >= blocks[None, :]


@torch.no_grad()
def llada(
    model: nn.Module, prompt: Tensor, gen_length: int, block_length: int, steps_per_block: int, mask: int
) -> Tensor:
    """LLaDA, low-confidence remasking: `(1, P)` to `(1, P + gen_length)`."""
    begin = prompt.shape[1]
    x = torch.cat([prompt, prompt.new_full((1, gen_length), mask)], 1)
    for end in range(begin + block_length, begin + gen_length + 1, block_length):
        masked = int((x[0, end - block_length : end] == mask).sum())
        for step in range(steps_per_block):
            count = masked // steps_per_block + (step < masked % steps_per_block)
            logits = model(input_ids=x).logits[0]
            tokens = logits.argmax(-1)
            sure = logits.softmax(-1).gather(1, tokens[:, None])[:, 0]
            sure[end:] = -torch.inf
            sure[x[0] != mask] = -torch.inf
            best = sure.topk(count).indices
            best = best[sure[best] > -torch.inf]
            x[0, best] = tokens[best]
    return x


@torch.no_grad()
def dream(
    model: nn.Module, prompt: Tensor, gen_length: int, steps: int, mask: int, alg: str, top_k: int | None = None
) -> Tensor:
    """Dream, `alg` of `"maskgit_plus"`, `"entropy"` and `"topk_margin"`: `(1, P)` to `(1, P + gen_length)`."""
    x = torch.cat([prompt, prompt.new_full((1, gen_length), mask)], 1)
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        masked = x[0] == mask
        logits = model(input_ids=x).logits[0]
        logits = torch.cat([logits[:1], logits[:-1]])[masked]
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], torch.finfo(logits.dtype).min)
        probabilities = logits.softmax(-1)
        sure, tokens = probabilities.max(-1)
        if alg == "entropy":
            sure = (probabilities * (probabilities + 1e-10).log()).sum(-1)
        elif alg == "topk_margin":
            best = probabilities.topk(2).values
            sure = best[:, 0] - best[:, 1]
        left = masked.sum()
        count = int(left * (1 - times[step + 1] / times[step])) if step < steps - 1 else int(left)
        if count:
            best = sure.topk(count).indices
            x[0, masked.nonzero()[best, 0]] = tokens[best]
    return x


@torch.no_grad()
def fast_dllm_v2(
    model: nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    mask: int,
    stop: int,
    threshold: float = 1.0,
    block_size: int = 32,
    small_block_size: int = 8,
) -> Tensor:
    """
    Fast-dLLM v2: `(1, P)` to `(1, P + N)`, up to and including the stop token (-1: none).

    The published loop fills its cache only if the prompt is *longer* than a block, so it forgets a prompt of exactly one
    block. Here it does not. It also makes `max_new_tokens // block_size` blocks, of which the first may be partly prompt;
    here there are enough blocks for `max_new_tokens`.
    """
    begin, x, cache = prompt.shape[1], prompt, DynamicCache(config=model.config)

    def commit(until: int) -> Tensor:
        """Runs the clean tokens that are not cached yet; returns the token that follows them."""
        done = cache.get_seq_length()
        allowed = _block_causal(until, block_size, x.device)[done:]
        logits = _seen(model, x[:, done:until], cache, allowed, done)[0, -1:]
        return _best(logits.softmax(-1), mask)[1][None]

    def is_over() -> bool:
        stops = (x[0, begin:] == stop).nonzero()
        return len(stops) > 0 and not (x[0, begin : begin + int(stops[0])] == mask).any()

    if begin >= block_size:
        token = commit(begin // block_size * block_size)
        if begin % block_size == 0:
            x = torch.cat([x, token], 1)
    for _ in range(-(-(begin % block_size + max_new_tokens) // block_size)):
        x = torch.cat([x, x.new_full((1, -x.shape[1] % block_size), mask)], 1)
        start = x.shape[1] - block_size
        for part in range(start, start + block_size, small_block_size):
            here = slice(part, part + small_block_size)
            while (x[0, here] == mask).any() and not is_over():
                allowed = _all(block_size, x.shape[1], x.device)
                logits = _seen(model, x[:, start:], cache, allowed, start)[0]
                _forget(cache, start)
                logits = torch.cat([logits[:1], logits[:-1]])[part - start : part - start + small_block_size]
                sure, tokens = _best(logits.softmax(-1), mask)
                sure = sure.masked_fill(x[0, here] != mask, -torch.inf)
                chosen = sure > threshold
                chosen[sure.argmax()] = True
                x[0, here] = torch.where(chosen, tokens, x[0, here])
        if is_over():
            break
        x = torch.cat([x, commit(x.shape[1])], 1)
    stops = (x[0, begin:] == stop).nonzero()
    return x[:, : begin + int(stops[0]) + 1] if len(stops) else x


@torch.no_grad()
def sdar(
    model: nn.Module,
    prompt: Tensor,
    gen_length: int,
    mask: int,
    block_length: int = 4,
    steps: int = 4,
    strategy: str = "low_confidence_static",
    threshold: float = 0.85,
    stops: tuple[int, ...] = (),
) -> Tensor:
    """SDAR, `strategy` of `"sequential"`, `"low_confidence_static"`, `"low_confidence_dynamic"` and `"entropy_bounded"`:
    `(1, P)` to whole blocks. `threshold` is the confidence of the third and the bound of the fourth, in nats."""
    begin, cache = prompt.shape[1], DynamicCache(config=model.config)
    total = -(-(begin + gen_length) // block_length) * block_length
    x = torch.cat([prompt, prompt.new_full((1, total - begin), mask)], 1)
    prefill = begin // block_length * block_length
    if prefill:
        _seen(model, x[:, :prefill], cache, _block_causal(prefill, block_length, x.device), 0)
    for start in range(prefill, total, block_length):
        here = slice(start, start + block_length)
        allowed = _all(block_length, start + block_length, x.device)
        step = 0
        while True:
            masked = x[0, here] == mask
            logits = _seen(model, x[:, here], cache, allowed, start)[0]
            if not masked.any():  # this pass has stored the clean block
                break
            _forget(cache, start)
            probabilities = logits.softmax(-1)
            sure, tokens = _best(probabilities, mask)
            sure = sure.masked_fill(~masked, -torch.inf)
            count = min(block_length // steps + (step < block_length % steps), int(masked.sum()))
            step += 1
            if strategy == "sequential":
                chosen = masked.nonzero()[:count, 0]
            elif strategy == "entropy_bounded":
                clamped = probabilities.clamp(min=1e-12)
                entropies = -(clamped * clamped.log()).sum(-1).masked_fill(~masked, -torch.inf)
                ordered, order = entropies.sort()
                bound = torch.tensor(threshold, device=x.device)
                chosen = order[: max(1, int(torch.searchsorted(ordered.cumsum(0), bound)))]
            else:
                chosen = sure.topk(count).indices
                if strategy == "low_confidence_dynamic" and (sure > threshold).sum() >= count:
                    chosen = (sure > threshold).nonzero()[:, 0]
            x[0, start + chosen] = tokens[chosen]
        if any(token in stops for token in x[0, begin : start + block_length].tolist()):
            return x[:, : start + block_length]
    return x


@torch.no_grad()
def cached_full_attention(
    model: nn.Module, prompt: Tensor, gen_length: int, block_length: int, mask: int, dual: bool
) -> Tensor:
    """LLaDA with Fast-dLLM's prefix or dual cache, one token a step: `(1, P)` to `(1, P + gen_length)`."""
    begin = prompt.shape[1]
    x = torch.cat([prompt, prompt.new_full((1, gen_length), mask)], 1)
    total = x.shape[1]

    def unmask(logits: Tensor, first: int, start: int) -> None:
        """One token of the block at `start`; `logits` are those of positions `first` and following."""
        sure, tokens = _best(logits[start - first : start - first + block_length].softmax(-1), mask)
        best = sure.masked_fill(x[0, start : start + block_length] != mask, -torch.inf).argmax()
        x[0, start + best] = tokens[best]

    for start in range(begin, total, block_length):
        cache = DynamicCache(config=model.config)
        unmask(_seen(model, x, cache, _all(total, total, x.device), 0)[0], 0, start)
        end = start + block_length
        before = [(layer.keys[:, :, :start], layer.values[:, :, :start]) for layer in cache.layers]
        behind = [(layer.keys[:, :, end:], layer.values[:, :, end:]) for layer in cache.layers]
        while (x[0, start:end] == mask).any():
            cache = DynamicCache(config=model.config)
            for index, (prefix, suffix) in enumerate(zip(before, behind, strict=True)):
                kept = [torch.cat(pair, 2) for pair in zip(prefix, suffix, strict=True)] if dual else prefix
                cache.update(*kept, index)
            until = end if dual else total
            logits = _seen(model, x[:, start:until], cache, _all(until - start, total, x.device), start)
            unmask(logits[0], start, start)
    return x
