"""How much of a step's memory each way of spreading it leaves on one GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

from .simulate import Footprint


# Settings of DeepSpeed that nobody changes: elements that are reduced at once, and that stay gathered.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
# Bytes of a weight in 4 bits with a nested scale for each block of 64 (QLoRA).
FOUR_BIT = 0.5 + 0.127 / 8
# What a CUDA context and libraries take that no framework counts.
CONTEXT = 2**30


@dataclass
class Plan:
    """
    Memory on each GPU, in bytes.

    Attributes:
        name (`str`): `engine, what is trained`.
        recipe (`str`): the file under `recipes/accelerate` that does it.
        weights, gradients, optimizer, reference, activations (`float`): as they are spread.
        buffers (`float`): weights gathered for a pass, buckets that are reduced.
        rollout (`float`): the most that a rollout needs beside weights, optimizer and reference, its cache included.
        host (`float`): main memory of all processes together.
    """

    name: str
    recipe: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float = 0.0
    reference: float = 0.0
    rollout: float = 0.0
    host: float = 0.0
    parts: tuple[str, ...] = field(default=("weights", "gradients", "optimizer", "reference", "buffers"), repr=False)

    @property
    def update_peak(self) -> float:
        return sum(getattr(self, part) for part in self.parts) + self.activations

    @property
    def rollout_peak(self) -> float:
        return self.weights + self.optimizer + self.reference + self.rollout

    @property
    def peak(self) -> float:
        return max(self.update_peak, self.rollout_peak)

    def fits(self, memory: float) -> bool:
        """Whether it fits on a GPU of `memory` bytes, of which a CUDA context takes its share."""
        return self.peak + CONTEXT <= memory


def make_plans(
    mixed: Footprint, half: Footprint, adapter: Footprint, gpus: int, beta: float, gather: bool = True
) -> list[Plan]:
    """
    Every strategy, the simplest first.

    Args:
        mixed ([`Footprint`]): full training with float32 weights, computing in bfloat16.
        half ([`Footprint`]): full training on bfloat16 weights.
        adapter ([`Footprint`]): LoRA on bfloat16 weights.
        gpus (`int`): number of GPUs.
        beta (`float`): a reference is kept if it is not 0; with an adapter it is the policy without it.
        gather (`bool`, *optional*, defaults to `True`): whether rollouts gather the weights that ZeRO-3 shares.
    """
    count, trained = half.parameters, half.trainable
    whole = 2.0 * count  # bfloat16
    bucket = 2.0 * min(REDUCE_BUCKET, trained)
    live = 2.0 * min(MAX_LIVE_PARAMETERS, count)
    reference = 1.0 if beta else 0.0
    inference, quantized = half.rollout + half.cache, adapter.linear * (2 - FOUR_BIT)
    several = gpus > 1
    plans = [
        Plan(
            "DDP, full" if several else "one GPU, full", "ddp", mixed.weights, mixed.gradients, mixed.optimizer,
            mixed.activations, mixed.gradients * several, reference * mixed.weights, mixed.rollout + mixed.cache,
        ),
        Plan(
            "ZeRO-2, full", "zero2", whole, 2.0 * trained / gpus, 12.0 * trained / gpus, half.activations, bucket,
            reference * whole, inference,
        ),
        Plan(
            "ZeRO-3, full", "zero3", whole / gpus, 2.0 * trained / gpus, 12.0 * trained / gpus, half.activations,
            bucket + live, reference * whole / gpus, inference + (whole if gather else live),
        ),
        Plan(
            "FSDP2, full", "fsdp2", mixed.weights / gpus, mixed.gradients / gpus, mixed.optimizer / gpus,
            half.activations, 3.0 * half.largest_layer, reference * mixed.weights / gpus,
            inference + 2.0 * half.largest_layer,
        ),
        Plan(
            "ZeRO-3 offload, full", "zero3_offload", 0.0, 0.0, 0.0, half.activations, bucket + live, 0.0,
            inference + (whole if gather else live), host=whole * (1 + reference) + 14.0 * trained,
        ),
        Plan(
            "DDP, LoRA" if several else "one GPU, LoRA", "ddp", adapter.weights, adapter.gradients, adapter.optimizer,
            adapter.activations, adapter.gradients * several, 0.0, adapter.rollout + adapter.cache,
        ),
        Plan(
            "ZeRO-3, LoRA", "zero3", adapter.weights / gpus, adapter.gradients / gpus, 3 * adapter.gradients / gpus,
            adapter.activations, live, 0.0, adapter.rollout + adapter.cache + (whole if gather else live),
        ),
        Plan(
            "DDP, QLoRA" if several else "one GPU, QLoRA", "ddp", adapter.weights - quantized, adapter.gradients / 2,
            adapter.optimizer / 2, adapter.activations, adapter.gradients / 2 * several, 0.0,
            adapter.rollout + adapter.cache,
        ),
    ]  # fmt: skip
    return [plan for plan in plans if several or plan.recipe == "ddp" or plan.recipe == "zero3_offload"]
