"""Sections of `gpu.py` about time and memory: updates, attention, checkpointing, layers, rollouts."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import published  # beside this file, like the next two
import torch
import training_cost
from gpu_shapes import (
    BLOCK,
    DEVICE,
    Row,
    Size,
    clear,
    cuda_only,
    make_batches,
    make_policy,
    make_prompts,
    peak,
    prepared,
    reset_peak,
    spec_of,
    timed,
    use,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_diffusion import DecodingConfig, DiffusionSpec, decode


def same(ours: list[list[int]], theirs: list[list[int]]) -> dict:
    """How many answers are the same, token by token, and how long they are so on average."""
    lengths = [
        next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        for one, other in zip(ours, theirs, strict=True)
    ]
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
    return {"answers": len(ours), "same": equal, "same_tokens_in_front": statistics.mean(lengths)}


def published_answer(model, prompt: list[int], spec: DiffusionSpec, length: int) -> list[int]:
    """By the loop that Fast-dLLM v2 published."""
    ids = torch.tensor([prompt], device=DEVICE)
    return published.fast_dllm_v2(model, ids, length, mask=spec.mask_token_id, stop=-1)[0, len(prompt) :].tolist()[
        :length
    ]


def one_step(kind: str, model, optimizer, batches, spec, lora: bool, seed: int) -> dict:
    """An update of `training_cost.py`, with its time and memory."""
    reset_peak()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=lora):
        seconds = training_cost.run_step(kind, model, optimizer, batches, spec, seed)
    return {"seconds": seconds, **peak()}


def training(size: Size) -> Iterator[Row]:
    rounds = {"exact": 1, "elbo8": 2}
    yield from steps_in_turn(size, list(training_cost.KINDS), rounds, lora=True)


def full(size: Size) -> Iterator[Row]:
    kinds = ["ar_sft", "ar_sft_lean", "block_sft", "dtrpo"]
    yield from steps_in_turn(size, kinds, {}, lora=False)


def steps_in_turn(size: Size, kinds: list[str], rounds: dict[str, int], lora: bool) -> Iterator[Row]:
    model, optimizer = prepared(size.large, lora)
    spec, batches = spec_of(size.large), make_batches(size, size.prompt, size.response, size.batch)
    for seed in range(6):  # the first round warms up
        for kind in kinds:
            if seed == 0 and kind in rounds:
                continue
            if seed <= rounds.get(kind, 5):
                name = kind if seed else f"{kind}, first call"
                yield name, partial(one_step, kind, model, optimizer, batches, spec, lora, seed)


def attention(size: Size) -> Iterator[Row]:
    model, optimizer = prepared(size.large, lora=True)
    spec = spec_of(size.large)

    def step(implementation: str, prompt: int, response: int, batch: int, seed: int) -> dict:
        use(model, implementation)
        batches = make_batches(size, prompt, response, batch)
        return one_step("dtrpo", model, optimizer, batches, spec, True, seed)

    for prompt, response, batch in size.long:
        for seed in range(4):
            for implementation in ("sdpa", "flex_attention"):
                call = "" if seed else ", first call"
                name = f"{implementation}, {batch} of {prompt} + {response}{call}"
                run = partial(step, implementation, prompt, response, batch, seed)
                yield name, run if implementation == "sdpa" else cuda_only(run)
    # Batches of a run have a shape each: rows of other lengths, in the same bucket of FlexAttention.
    for shorter in range(1, 5):
        for implementation in ("sdpa", "flex_attention"):
            for call in ("first call", "second call"):
                run = partial(step, implementation, size.prompt - 4 * shorter, size.response, size.batch, 0)
                name = f"{implementation}, a shape of its own, {call}"
                yield name, run if implementation == "sdpa" else cuda_only(run)


def checkpointing(size: Size) -> Iterator[Row]:
    """dTRPO's step with and without gradient checkpointing, with LoRA and with every weight trained."""
    spec, batches = spec_of(size.large), make_batches(size, size.prompt, size.response, size.batch)
    for lora in (True, False):
        for is_on in (True, False):
            name = f"{'LoRA' if lora else 'every weight'}, checkpointing {'on' if is_on else 'off'}"
            made: list = []  # by its first step, so that a lack of memory is a row

            def step(seed: int, lora=lora, is_on=is_on, made=made) -> dict:
                if not made:
                    made.extend(prepared(size.large, lora, is_on))
                return one_step("dtrpo", *made, batches, spec, lora, seed)

            for seed in range(4):
                yield f"{name}{'' if seed else ', first call'}", partial(step, seed)
            made.clear()
            clear()


def layers(size: Size) -> Iterator[Row]:
    """An update with LoRA and decoding, by the number of layers of the large shape."""
    batches = make_batches(size, size.prompt, size.response, size.batch)
    for count in size.layers:
        shape = replace(size.large, layers=count)
        spec, prompts = spec_of(shape), make_prompts(1, shape, size.prompt)
        model, optimizer = prepared(shape, lora=True)
        settings = DecodingConfig(size.answer, temperature=0.0, tokens_per_step=4)

        def answer(model=model, prompts=prompts, spec=spec, settings=settings) -> dict:
            model.eval()
            reset_peak()
            seconds, batch = timed(lambda: decode(model, prompts, settings, spec, [0]))
            return {"tokens_per_second": int(batch.completion_lengths.sum()) / seconds, **peak()}

        def step(seed: int, model=model, optimizer=optimizer, spec=spec) -> dict:
            return one_step("dtrpo", model.train(), optimizer, batches, spec, True, seed)

        for seed in range(3):
            call = "" if seed else ", first call"
            yield f"{count} layers, update{call}", partial(step, seed)
            yield f"{count} layers, decoding a response{call}", answer
        del model, optimizer, answer, step
        clear()


def rollouts(size: Size) -> Iterator[Row]:
    shape, spec = size.large, spec_of(size.large)
    model = make_policy(shape, sharp=True)
    answer = size.answer

    def ours(count: int, per_step: int, temperature: float = 0.0, cudnn: bool = True) -> dict:
        prompts, steps = make_prompts(count, shape, size.prompt), []
        config = DecodingConfig(
            answer,
            temperature=temperature,
            strategy="threshold",
            threshold=1.0,
            tokens_per_step=per_step,
            sub_block_size=8,
        )
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        reset_peak()
        with contextlib.nullcontext() if cudnn else sdpa_kernel(backends):
            seconds, batch = timed(
                lambda: decode(model, prompts, config, spec, list(range(count)), on_step=lambda _: steps.append(0))
            )
        if per_step == 1:
            kept[count] = batch.completions()
        tokens = int(batch.completion_lengths.sum())
        return {
            "tokens_per_second": tokens / seconds,
            "ms_per_step": 1000 * seconds / len(steps),
            "steps": len(steps),
            **peak(),
        }

    def theirs(count: int) -> dict:
        prompts = make_prompts(count, shape, size.prompt)

        reset_peak()
        seconds, found = timed(lambda: [published_answer(model, prompt, spec, answer) for prompt in prompts])
        return {"tokens_per_second": sum(map(len, found)) / seconds, **same(kept[count], found), **peak()}

    @torch.no_grad()
    def bare(count: int) -> dict:
        ids = torch.zeros(count, BLOCK, dtype=torch.long, device=DEVICE)
        seconds, _ = timed(lambda: model.model(input_ids=ids, use_cache=False))
        return {"ms": 1000 * seconds}

    kept: dict[int, list[list[int]]] = {}
    for seed in range(3):
        call = "" if seed else ", first call"
        for count in size.batches:
            yield f"bare forward pass of {count} blocks{call}", partial(bare, count)
            yield f"batch {count}, 4 tokens a step{call}", partial(ours, count, 4)
            if seed < 2:
                yield f"batch {count}, a token a step{call}", partial(ours, count, 1)
        yield f"published loop, batch 1{call}", partial(theirs, 1)
    largest = size.batches[-1]
    for seed in range(2):
        call = "" if seed else ", first call"
        yield f"batch {largest}, 4 tokens a step, sampled{call}", partial(ours, largest, 4, 1.0)
        yield (
            f"batch {largest}, 4 tokens a step, without cuDNN{call}",
            cuda_only(partial(ours, largest, 4, 0.0, False)),
        )
