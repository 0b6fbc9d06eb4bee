"""A rollout and an update on random weights of the real shapes, with a few of the layers, and what they say about all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..decoding.config import DecodingConfig
from ..decoding.decode import decode
from ..plan.layers import cut, simulate_layers, uniform_from
from ..plan.simulate import Footprint, Workload
from ..policies.spec import DiffusionSpec
from ..scoring.estimators import ESTIMATORS
from ..scoring.layout import pack
from ..scoring.score import score
from ..trajectories.trajectory import TrajectoryBatch
from .weights import keep_layers, random_policy_model


WARM = 5.0  # seconds beside which what happens at a first call does not matter


@dataclass(frozen=True)
class Trial:
    """
    What is tried.

    Attributes:
        config ([`~transformers.PretrainedConfig`]): config of the whole policy.
        spec ([`DiffusionSpec`]): facts about it.
        work ([`~plan.simulate.Workload`]): rows, lengths and estimator of the run.
        decoding ([`DecodingConfig`]): settings of its decoder.
        dtype (`torch.dtype`): type of the weights.
        adapter (`PeftConfig`, *optional*): the adapter that is trained.
        autocast (`bool`): whether updates compute in bfloat16.
        attention (`str`, *optional*): attention implementation.
        device (`str`): where.
        frozen (`bool`): whether embeddings and head are not trained.
    """

    config: PretrainedConfig
    spec: DiffusionSpec
    work: Workload
    decoding: DecodingConfig
    dtype: torch.dtype = torch.float32
    adapter: Any = None
    autocast: bool = False
    attention: str | None = None
    device: str = "cpu"
    frozen: bool = False


def end_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of embeddings and head, each once."""
    ends = (cast(PreTrainedModel, model).get_input_embeddings(), cast(PreTrainedModel, model).get_output_embeddings())
    return list({id(one): one for module in ends if module is not None for one in module.parameters()}.values())


@dataclass(frozen=True)
class Measured:
    """
    What some layers took.

    Attributes:
        layers (`int`): their number.
        rollout, update (`float`): seconds.
        steps, tokens (`int`): denoising steps, and tokens that they wrote.
    """

    layers: int
    rollout: float
    update: float
    steps: int
    tokens: int


@dataclass(frozen=True)
class Result:
    """
    What was measured.

    Attributes:
        few, more ([`Measured`]): with one layer (or the fewest whose last one is like the others), and with those that were asked for.
        work ([`~plan.simulate.Workload`]): rows and lengths, which may be less than those of the run.
        planned (`int`): bytes that the plan gives for these shapes.
        peak (`int`, *optional*): bytes that they took, where the system says.
    """

    few: Measured
    more: Measured
    work: Workload
    planned: int
    peak: int | None

    def whole(self, layers: int, name: str) -> float:
        """Seconds of `rollout` or `update` with this number of layers, on a line through both measurements."""
        before, after = getattr(self.few, name), getattr(self.more, name)
        each = max(after - before, 0.0) / (self.more.layers - self.few.layers)
        return after + each * (layers - self.more.layers)


def try_out(trial: Trial, layers: int, seconds: float) -> Result:
    """
    Measures a rollout and an update.

    Args:
        trial ([`Trial`]): what is tried.
        layers (`int`): layers of the model, at least one more than the fewest.
        seconds (`float`): time for the measurements. Rows, and then lengths, are halved until they fit.
    """
    least = uniform_from(trial.config)
    layers = min(max(layers, least + 1), trial.config.get_text_config().num_hidden_layers)
    config = cut(trial.config, layers)
    memory = _Peak(trial.device)
    model = random_policy_model(config, trial.dtype, trial.device, trial.attention)
    frozen = end_weights(model) if trial.frozen else []
    for one in frozen:
        one.requires_grad_(False)
    left_out = 3 * sum(one.numel() * one.itemsize for one in frozen)  # gradients and AdamW's state
    if trial.adapter is not None:
        model = get_peft_model(cast(PreTrainedModel, model), trial.adapter)
    if trial.work.checkpointing:
        cast(Any, model).gradient_checkpointing_enable({"use_reentrant": False})
        if trial.adapter is not None:
            cast(Any, model).enable_input_require_grads()
    optimizer = _adamw(model)
    smaller = list(_smaller(trial.work, trial.spec))
    first = _measure(trial, model, optimizer, smaller[-1], layers)  # and warms up
    if first.rollout + first.update < WARM:
        first = _measure(trial, model, optimizer, smaller[-1], layers)
    each = (first.rollout + first.update) / _size(smaller[-1], trial.spec)
    work = next((one for one in smaller if 2 * each * _size(one, trial.spec) <= seconds), smaller[-1])
    is_measured = work is smaller[-1] and first.rollout + first.update >= WARM
    more = first if is_measured else _measure(trial, model, optimizer, work, layers)
    peak = memory.bytes()
    keep_layers(model, least)
    del optimizer
    gc.collect()
    optimizer = _adamw(model)
    few = _measure(trial, model, optimizer, work, least)
    return Result(few, more, work, planned_bytes(trial, config, work) - left_out, peak)


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimizer of a run: transformers' default."""
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-6, fused=True)


def planned_bytes(trial: Trial, config: PretrainedConfig, work: Workload) -> int:
    """What the plan says about these shapes: the larger of a rollout and an update."""
    rank = getattr(trial.adapter, "r", None)
    found: Footprint = simulate_layers(config, trial.spec, work, trial.dtype, autocast=trial.autocast, lora_rank=rank)
    update = found.weights + found.gradients + found.optimizer + found.activations
    return max(update, found.weights + found.optimizer + found.rollout + found.cache)


def _smaller(work: Workload, spec: DiffusionSpec) -> Iterator[Workload]:
    """The work, and less and less of it: first fewer rows, then shorter prompts, then shorter responses."""
    work = replace(work, num_generations=1, share_prompts=False, accumulation=1)
    yield work
    while work.batch_size > 1 or work.rollout_batch_size > 1:
        work = replace(work, batch_size=-(-work.batch_size // 2), rollout_batch_size=-(-work.rollout_batch_size // 2))
        yield work
    while work.prompt_length > 16:
        work = replace(work, prompt_length=-(-work.prompt_length // 2))
        yield work
    least = min(spec.block_size, 4 * work.tokens_per_step)  # a few steps
    while work.completion_length > least:
        work = replace(work, completion_length=max(work.completion_length // 2, least))
        yield work


def _size(work: Workload, spec: DiffusionSpec) -> float:
    """About how many tokens go through the layers; a backward pass counts as two."""
    steps = -(-work.completion_length // work.tokens_per_step)
    length = work.prompt_length + work.completion_length
    decoded = steps * length if spec.attention == "full" else work.prompt_length + 2 * steps * spec.block_size
    scored = length + work.completion_length * work.estimator.num_draws
    return work.rollout_batch_size * decoded + 3 * work.batch_size * scored


def _measure(
    trial: Trial, model: nn.Module, optimizer: torch.optim.Optimizer, work: Workload, layers: int
) -> Measured:
    """A rollout, and an update on its first responses."""
    spec = trial.spec.replace(stop_token_ids=())  # of random weights no response should end early
    prompts = _prompts(spec, trial.config, work)
    decoding = replace(trial.decoding, max_new_tokens=work.completion_length, stop_token_ids=None)
    seeds, steps = list(range(len(prompts))), 0

    def count(_: Any) -> None:
        nonlocal steps
        steps += 1

    model.eval()
    begun = _now(trial.device)
    batch = decode(model, prompts, decoding, spec, seeds, on_step=count)
    middle = _now(trial.device)
    model.train()
    _update(trial, model, optimizer, batch.select(slice(work.batch_size)), spec)
    end = _now(trial.device)
    return Measured(layers, middle - begun, end - middle, steps, int(batch.completion_lengths.sum()))


def _update(
    trial: Trial, model: nn.Module, optimizer: torch.optim.Optimizer, batch: TrajectoryBatch, spec: DiffusionSpec
) -> None:
    """Draws, packs, scores, and takes a step."""
    estimator = ESTIMATORS[trial.work.estimator.name]
    states = estimator.states(batch, spec, list(range(len(batch))), trial.work.estimator)
    layout = pack(batch, spec, states, estimator.one_row, False)
    with torch.autocast(trial.device, torch.bfloat16, enabled=trial.autocast):
        logps, _ = score(model, layout, spec, compute_entropy=True)
    (-(logps * layout.weights).sum() / batch.completion_lengths.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def _prompts(spec: DiffusionSpec, config: PretrainedConfig, work: Workload) -> list[list[int]]:
    """Random tokens that may be in a prompt."""
    rows, size = max(work.rollout_batch_size, work.batch_size), config.get_text_config().vocab_size
    ids = torch.randint(0, size, (rows, work.prompt_length), generator=torch.Generator().manual_seed(1))
    allowed = next(token for token in range(size) if token != spec.mask_token_id and not spec.is_absent(token))
    wrong = (ids == spec.mask_token_id) | spec.is_absent(ids)
    return ids.masked_fill(wrong, allowed).tolist()


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Peak:
    """The most memory since it was made: of the allocator on a GPU, of the process on Linux."""

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
            self.before: int | None = self._status("VmRSS")
        except (OSError, StopIteration, ValueError):
            self.before = None

    def bytes(self) -> int | None:
        """Bytes, or `None` where the system does not say."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return None if self.before is None else self._status("VmHWM") - self.before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
