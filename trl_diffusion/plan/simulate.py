"""A training step without memory: every tensor has its shape and no content, and what would be alive is counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PretrainedConfig

from ..policies.attention import PackedMask, enable_plans
from ..policies.forward import layer_lists, log_distribution, policy_logits
from ..policies.lora import empty_model
from ..policies.spec import DiffusionSpec
from ..scoring.estimators import ESTIMATORS, EstimatorConfig
from ..scoring.layout import PackedLayout, pack
from ..scoring.score import score
from ..trajectories.trajectory import NEVER, TrajectoryBatch


if TYPE_CHECKING:
    from transformers import PreTrainedModel


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Workload:
    """
    What a process does in a step.

    Attributes:
        batch_size (`int`): responses in a forward pass of an update.
        num_generations (`int`): responses to a prompt; neighbours in the batch.
        prompt_length, completion_length (`int`): tokens.
        estimator ([`EstimatorConfig`]): which states are scored.
        tokens_per_step (`int`): tokens that a decoding step unmasks.
        rollout_batch_size (`int`): responses decoded at once.
        checkpointing (`bool`): whether activations are computed again in the backward pass.
        accumulation (`int`): batches in an optimizer step.
        share_prompts (`bool`): whether responses to a prompt share its part of the pass.
    """

    batch_size: int = 4
    num_generations: int = 4
    prompt_length: int = 256
    completion_length: int = 256
    estimator: EstimatorConfig = EstimatorConfig()
    tokens_per_step: int = 1
    rollout_batch_size: int = 32
    checkpointing: bool = True
    accumulation: int = 1
    share_prompts: bool = True


@dataclass(frozen=True)
class Footprint:
    """
    What a step needs on one GPU that holds everything, in bytes unless it says otherwise.

    Attributes:
        parameters, trainable (`int`): number of weights, and of those that are trained.
        linear (`int`): number of weights in the linear layers that quantization applies to.
        experts, used_experts (`int`): number of weights in the experts, and of those that one token uses.
        weights, gradients, optimizer (`int`): what they take.
        activations (`int`): the most that an update needs beside weights and gradients.
        rollout (`int`): the most that a forward pass of a rollout needs beside weights and cache.
        cache (`int`): keys and values of finished blocks.
        packed_tokens, scored_tokens (`int`): tokens in the packed pass, and logits computed there.
        logits (`int`): those logits, in float32.
        largest_layer (`int`): weights of the largest part that is gathered at once where they are shared.
        score_flops, update_flops (`int`): floating-point operations of a packed forward pass, and of one with its
            backward pass.
    """

    parameters: int
    trainable: int
    linear: int
    experts: int
    used_experts: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    rollout: int
    cache: int
    packed_tokens: int
    scored_tokens: int
    logits: int
    largest_layer: int
    score_flops: int
    update_flops: int

    @property
    def used(self) -> int:
        """Number of weights that one token uses."""
        return self.parameters - self.experts + self.used_experts


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it: those alive now, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return tree_map_only(Tensor, self.see, func(*args, **(kwargs or {})))

    def see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class Flops(TorchDispatchMode):
    """
    Counts floating-point operations, by PyTorch's formulas. Its own `FlopCounterMode` also follows the modules, and
    thereby keeps alive what checkpointing computes again.
    """

    formulas: ClassVar[dict[Any, Callable[..., int]]] = {
        **flop_registry,
        # The attention kernels of a CPU, which PyTorch has no formula for.
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *args, out_val=None, **kwargs: sdpa_flop_count(q.shape, k.shape, v.shape)
        ),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *args, out_val=None, **kwargs: sdpa_backward_flop_count(
                grad.shape, q.shape, k.shape, v.shape
            )
        ),
    }

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._overloadpacket in self.formulas:
            self.total += self.formulas[func._overloadpacket](*args, **kwargs, out_val=result)
        return result


def simulate(
    config: PretrainedConfig,
    spec: DiffusionSpec,
    work: Workload,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    lora_rank: int | None = None,
) -> Footprint:
    """
    Runs a rollout's and an update's forward pass, and the backward pass, on tensors without content.

    Args:
        config ([`~transformers.PretrainedConfig`]): config of the policy.
        spec ([`DiffusionSpec`]): facts about the policy.
        work ([`Workload`]): what a process does in a step.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the weights.
        autocast (`bool`, *optional*, defaults to `False`): whether `bf16=True` computes in bfloat16.
        lora_rank (`int`, *optional*): train an adapter of this rank, in float32, on all linear layers but the head.
    """
    batch = _batch(spec, work)
    states = ESTIMATORS[work.estimator.name].states(batch, spec, list(range(len(batch))), work.estimator)
    share = work.share_prompts and spec.attention == "block" and work.batch_size % work.num_generations == 0
    layout = pack(batch, spec, states, ESTIMATORS[work.estimator.name].one_row, share)
    live, fake = LiveBytes(), FakeTensorMode(allow_non_fake_inputs=True)
    model = _model(config, dtype, lora_rank, work.checkpointing)
    with fake, live:
        model = _with_shapes(model)
        layout = _without_content(layout, fake, live)
        precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        weights, start = _bytes(model.parameters()), live.now
        cache = _cache_bytes(config, spec, work, torch.bfloat16 if autocast else dtype)
        with torch.no_grad(), precision:
            live.peak = live.now
            _rollout_pass(model.eval(), spec, work)
        rollout = live.peak - start
        model.train()
        for _ in range(2 if work.accumulation > 1 else 1):
            live.peak = live.now
            with Flops() as flops:
                with precision:
                    logps, _ = score(model, layout, spec, compute_entropy=True)
                    loss = (logps * layout.weights).sum()
                score_flops = flops.total
                loss.backward()
            del logps, loss
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = _bytes(trained)
        return Footprint(
            parameters=sum(p.numel() for p in model.parameters()),
            trainable=sum(p.numel() for p in trained),
            linear=sum(m.weight.numel() for n, m in model.named_modules() if n.split(".")[-1] in LAYERS and hasattr(m, "weight")),
            experts=sum(module.gate_up_proj.numel() + module.down_proj.numel() for module in _experts(model)),
            used_experts=sum(
                (module.gate_up_proj[0].numel() + module.down_proj[0].numel()) * _chosen(config) for module in _experts(model)
            ),
            weights=weights,
            gradients=gradients,
            optimizer=2 * gradients,
            activations=max(live.peak - start - gradients, 0),
            rollout=rollout,
            cache=cache,
            packed_tokens=layout.input_ids.numel(),
            scored_tokens=len(layout.targets),
            logits=len(layout.targets) * config.get_text_config().vocab_size * 4,
            largest_layer=max(
                _bytes(part.parameters()) for part in (model.get_input_embeddings(), *chain(*layer_lists(model)))
            ),
            score_flops=score_flops,
            update_flops=flops.total,
        )  # fmt: skip


def _model(
    config: PretrainedConfig, dtype: torch.dtype, lora_rank: int | None, checkpointing: bool
) -> PreTrainedModel:
    model = empty_model(config).to(dtype)  # type: ignore[arg-type]  # transformers' `to` loses its `self`
    enable_plans(model)
    for module in _experts(model):
        module.forward = partial(_evenly, module)
    if lora_rank is not None:
        adapted = get_peft_model(model, LoraConfig(r=lora_rank, target_modules=list(LAYERS)))
        model = cast("PreTrainedModel", adapted)  # it passes everything on
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora_rank is not None:
            model.enable_input_require_grads()
    return model


def _experts(model: nn.Module) -> list[Any]:
    """The modules that hold the weights of all experts of a layer, as transformers fuses them."""
    return [module for module in model.modules() if {"gate_up_proj", "down_proj"} <= module._parameters.keys()]


def _chosen(config: PretrainedConfig) -> int:
    """Number of experts that a token uses in a layer."""
    return getattr(config.get_text_config(), "num_experts_per_tok", None) or 1


def _evenly(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """
    What experts compute if all of them get equally many tokens: shapes do not depend on what the router says, and time and
    memory are those of a grouped product, for which tokens are sorted by experts and back.
    """
    tokens, chosen = top_k_index.shape
    experts, width = len(module.gate_up_proj), hidden_states.shape[-1]
    rows = -(-tokens * chosen // experts)
    order = top_k_index.reshape(-1).sort().indices
    sent = nn.functional.pad(hidden_states[order // chosen], (0, 0, 0, experts * rows - tokens * chosen))
    first, second = module.gate_up_proj, module.down_proj
    first = first.transpose(1, 2) if first.shape[-1] == width else first  # some backbones store it the other way round
    second = second.transpose(1, 2) if second.shape[1] == width else second
    gate, up = torch.bmm(sent.view(experts, rows, width).to(first.dtype), first).chunk(2, -1)
    made = torch.bmm(nn.functional.silu(gate) * up, second).view(-1, width)[: tokens * chosen]
    weighted = (made * top_k_weights.reshape(-1)[order, None])[order.argsort()]
    return weighted.view(tokens, chosen, width).sum(1).to(hidden_states.dtype)


def _with_shapes(model: PreTrainedModel) -> PreTrainedModel:
    """Tensors without content, but with a device, in place of those of the meta device; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in cast(tuple[dict[str, Tensor | None], ...], (module._parameters, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                tensors[name] = made[id(tensor)]
    return model


def _batch(spec: DiffusionSpec, work: Workload) -> TrajectoryBatch:
    """Responses of full length, unmasked from left to right."""
    rows, tail = work.batch_size, spec.prompt_tail(work.prompt_length)
    length = spec.canvas_end(work.prompt_length, work.completion_length) - work.prompt_length
    positions = work.prompt_length + torch.arange(length)
    places = spec.place_of(positions, work.prompt_length)
    places = places - tail * (spec.block_of(positions, work.prompt_length) == 0)
    steps = places // work.tokens_per_step
    if spec.first_token == "autoregressive":  # a step of its own, of blocks that begin with a token of the response
        alone = (spec.block_of(positions, work.prompt_length) > 0) | (tail == 0)
        steps = torch.where(alone & (places > 0), 1 + (places - 1) // work.tokens_per_step, steps)
    steps = steps.where(positions < spec.writing_end(work.prompt_length, work.completion_length), NEVER)
    token = 0 if spec.mask_token_id else 1
    prompts = torch.full((rows, work.prompt_length), token)
    if not (work.share_prompts and spec.attention == "block"):
        work = replace(work, num_generations=1)
    prompts[:, 0] = token + (torch.arange(rows) // work.num_generations) % 2 * 2  # neighbours of another group differ
    return TrajectoryBatch(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts),
        canvas_ids=torch.full((rows, length), token),
        steps=steps.expand(rows, -1).contiguous(),
        logps=torch.zeros(rows, length),
        canvas_lengths=torch.full((rows,), length),
        completion_lengths=torch.full((rows,), work.completion_length),
    )


def _without_content(layout: PackedLayout, fake: FakeTensorMode, live: LiveBytes) -> PackedLayout:
    def convert(value):
        if isinstance(value, Tensor):
            return live.see(fake.from_tensor(value))
        if isinstance(value, PackedMask):
            return replace(value, **{name: convert(getattr(value, name)) for name in ("ranks", "copies", "valid")})
        return value

    return PackedLayout(**{field.name: convert(getattr(layout, field.name)) for field in fields(layout)})


def _rollout_pass(model: nn.Module, spec: DiffusionSpec, work: Workload) -> None:
    """The largest pass of a rollout: prompt and first block of every response at once (with full attention, prompt and
    canvas), and a token sampled for each position of the block. Prompts are counted as if all were different, as in an evaluation."""
    rows, block = work.rollout_batch_size, spec.block_size
    length = work.prompt_length + (block if spec.attention == "block" else work.completion_length)
    ids = torch.zeros(rows, length, dtype=torch.long)
    places = torch.arange(rows).repeat_interleave(block)
    columns = torch.arange(block).repeat(rows)
    allowed = torch.ones(rows, 1, 1, length, dtype=torch.bool)
    logits = policy_logits(model, ids, ids, allowed, places, columns)
    log_distribution(logits, spec).exp().cumsum(-1)


def _cache_bytes(config: PretrainedConfig, spec: DiffusionSpec, work: Workload, dtype: torch.dtype) -> int:
    if spec.attention == "full":
        return 0
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    width = work.prompt_length + work.completion_length + spec.block_size
    heads = getattr(text, "num_key_value_heads", None) or heads
    return 2 * text.num_hidden_layers * work.rollout_batch_size * width * heads * size * dtype.itemsize


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
