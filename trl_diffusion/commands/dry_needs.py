"""What a run needs, for its rehearsal: memory, disk and time, beside what there is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from transformers import PretrainedConfig

from ..plan.cost import Machine, rollout_cost
from ..plan.fit import free_disk, free_memory, gpu_memory, plan_of, saved_bytes
from ..plan.layers import simulate_layers
from ..plan.simulate import Footprint, Workload
from ..plan.strategies import CONTEXT, Plan
from ..policies.spec import DiffusionSpec
from ..rehearsal.findings import Findings
from .lines import duration, in_words


GIB = 2**30
H100 = Machine(400e12, 2.5e12)  # what `trl-diffusion plan` assumes of a GPU
TRAJECTORY = (
    24  # bytes of a token that `collect` stores, before they are compressed: token, step, log-probability, ...
)


@dataclass(frozen=True)
class Target:
    """
    What a run will run on.

    Attributes:
        engine (`str`): as in `recipes/accelerate`.
        processes (`int`): number of processes.
        gpu_gib (`float`, *optional*): GiB of each GPU, if it was given.
        for_gpu (`bool`): whether the options ask for a GPU that is not here.
    """

    engine: str = "ddp"
    processes: int = 1
    gpu_gib: float | None = None
    for_gpu: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether it is a run for GPUs, here or elsewhere."""
        return self.gpu_gib is not None or self.for_gpu or gpu_memory() is not None

    def memory(self) -> tuple[float | None, str]:
        """The bytes that a process may use, if they are known, and what they are."""
        if self.gpu_gib is not None:
            return self.gpu_gib * GIB, "of `--gpu_memory`"
        if gpu_memory() is not None:
            return gpu_memory(), "of the GPU here"
        if self.for_gpu:
            return None, ""
        free = free_memory()
        return (None if free is None else free / self.processes), "of main memory that are free"


def gib(size: float) -> str:
    """Bytes in GiB, as a number."""
    return f"{size / GIB:.1f}" if size >= GIB / 2 else f"{size / GIB:.2g}"


def dtype_of(name: str | None, config: PretrainedConfig) -> torch.dtype:
    """The type that weights are loaded in."""
    found = config.dtype if name == "auto" else getattr(torch, str(name or "float32").removeprefix("torch."))
    return found if isinstance(found, torch.dtype) else torch.float32


def footprint_of(
    config: PretrainedConfig, spec: DiffusionSpec, work: Workload, model_args: Any, autocast: bool
) -> Footprint:
    """What a step of this run needs on one GPU that holds everything. Autocast matters where weights are float32."""
    dtype = dtype_of(model_args.dtype, config)
    return simulate_layers(
        config, spec, work, dtype,
        autocast=autocast and dtype == torch.float32, lora_rank=model_args.lora_r if model_args.use_peft else None,
    )  # fmt: skip


def check_memory(findings: Findings, plan: Plan, footprint: Footprint, target: Target) -> None:
    """Compares what an update and a rollout need with what there is."""
    what = "on each GPU" if target.on_gpu else "of main memory for each process"
    need = plan.peak + (CONTEXT if target.on_gpu else 0)
    findings.say(
        "memory",
        f"about {gib(need)} GiB {what} ({in_words(footprint.parameters)} weights; update {gib(plan.update_peak)}, rollout "
        f"{gib(plan.rollout_peak)}; plan: {plan.name})",
    )
    memory, which = target.memory()
    if memory is None:
        findings.say("memory", "not known: what the GPUs of the run have; give `--gpu_memory GIB`")
    elif need > memory:
        findings.mistake(
            "memory",
            f"The run needs about {gib(need)} GiB, more than the {memory / GIB:.1f} GiB {which}. Lower "
            "`per_device_train_batch_size`, `rollout_batch_size` or `max_completion_length`, set `use_peft` or "
            "`gradient_checkpointing`, or use more GPUs with ZeRO-3; `trl-diffusion plan` compares them.",
        )


def check_disk(findings: Findings, directory: str, size: float, what: str) -> None:
    """Compares what a run writes with the free disk."""
    free = free_disk(directory)
    findings.say("disk", f"{what}: {size / GIB:.2f} GiB; {free / GIB:.1f} GiB are free")
    if size > free:
        findings.mistake(
            "disk",
            f"{what} need {size / GIB:.2f} GiB, but only {free / GIB:.2f} GiB are free where {directory} is. Choose another "
            "`--output_dir`, or lower `save_total_limit`.",
        )


def check_checkpoints(findings: Findings, args: Any, footprint: Footprint, adapter: bool, updates: int) -> None:
    """The disk that checkpoints and the trained policy need."""
    saves = 0
    if args.save_strategy != "no":
        steps = args.save_steps if args.save_steps >= 1 else max(args.save_steps * updates, 1)
        saves = max(int(updates // steps), 1) if args.save_strategy == "steps" else math.ceil(args.num_train_epochs)
    saved = saved_bytes(footprint, adapter, saves, args.save_total_limit, args.save_only_model)
    text = (
        f"{saved.count} checkpoint{'s' * (saved.count > 1)} of {saved.checkpoint / GIB:.2f} GiB and the trained policy"
        if saves
        else "the trained policy"
    )
    check_disk(findings, args.output_dir, saved.total, text)


def check_packages(findings: Findings, model_args: Any, target: Target) -> None:
    """The packages that the options need."""
    needed = {
        "bitsandbytes": (model_args.load_in_4bit or model_args.load_in_8bit, "quantization"),
        "deepspeed": (target.engine.startswith("zero"), "deepspeed"),
    }
    for name, (is_needed, extra) in needed.items():
        if is_needed and find_spec(name) is None:
            findings.mistake(
                "packages", f"{name} is missing, which these options need: pip install 'trl-diffusion[{extra}]'."
            )


def say_time(
    findings: Findings,
    footprint: Footprint,
    target: Target,
    updates: int,
    batches: int,
    beta: float,
    rollouts: float = 0.0,
) -> None:
    """
    The time that a run takes, if arithmetic can say something about it.

    Args:
        findings, footprint, target: as above.
        updates (`int`): optimizer steps.
        batches (`int`): batches of an optimizer step on each process.
        beta (`float`): whether a reference scores, too.
        rollouts (`float`, *optional*): seconds of all rollouts.
    """
    if not target.on_gpu:
        findings.say(
            "time", "not known: nothing was measured here. `trl-diffusion doctor --config FILE` measures a step."
        )
        return
    flops = footprint.update_flops + (footprint.score_flops if beta else 0)
    seconds = flops / H100.flops * batches * updates
    told = (
        f"rollouts {duration(rollouts)}, updates {duration(seconds)}" if rollouts else f"updates {duration(seconds)}"
    )
    findings.say(
        "time",
        f"by arithmetic, at 400 TFLOP/s and 2.5 TB/s (an H100): {told}. Not known: how far small batches, rewards, loading and "
        "communication keep it from that.",
    )


def rollout_seconds(
    config: PretrainedConfig, spec: DiffusionSpec, work: Workload, footprint: Footprint, responses: int
) -> float:
    """Seconds in which an H100 decodes so many responses, by arithmetic."""
    batches = -(-responses // work.rollout_batch_size)
    return rollout_cost(config, spec, work, footprint).seconds(H100) * batches


def plan_for(footprint: Footprint, model_args: Any, target: Target, beta: float) -> Plan:
    """The memory plan of a run."""
    rounded = bool(model_args.load_in_4bit)
    return plan_of(footprint, target.engine, target.processes, beta, cast(bool, model_args.use_peft), rounded)
