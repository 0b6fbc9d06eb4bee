"""Whether one run fits: the memory of a GPU under the engine that it uses, and the disk that its checkpoints take."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from .simulate import Footprint
from .strategies import Plan, make_plans


def plan_of(
    footprint: Footprint,
    engine: str = "ddp",
    gpus: int = 1,
    beta: float = 0.0,
    adapter: bool = False,
    rounded: bool = False,
) -> Plan:
    """
    The memory plan of one way to train. An adapter under an engine that has no plan of its own is planned as under DDP, which needs the
    most.

    Args:
        footprint ([`~plan.simulate.Footprint`]): of a step of this policy, trained like this.
        engine (`str`, *optional*, defaults to `"ddp"`): `ddp`, `zero2`, `zero3`, `zero3_offload` or `fsdp2`.
        gpus (`int`, *optional*, defaults to `1`): number of GPUs.
        beta (`float`, *optional*, defaults to `0.0`): weight of the reference, which is kept unless this is 0.
        adapter, rounded (`bool`, *optional*, defaults to `False`): whether an adapter is trained, and on weights in 4 bits.
    """
    kind = "QLoRA" if adapter and rounded else "LoRA" if adapter else "full"
    plans = make_plans(footprint, footprint, footprint, gpus, beta)
    found = {(plan.recipe, plan.name.split(", ")[-1]): plan for plan in plans}
    return found.get((engine, kind)) or found["ddp", kind]


@dataclass(frozen=True)
class Saved:
    """
    Bytes that a run leaves on the disk.

    Attributes:
        checkpoint (`int`): a checkpoint, with the state of the optimizer unless only the model is saved.
        policy (`int`): the trained policy at the end.
        count (`int`): checkpoints that are there at once; while one is written, the one that it replaces is still there.
    """

    checkpoint: int
    policy: int
    count: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.count + self.policy


def saved_bytes(
    footprint: Footprint, adapter: bool, saves: int, limit: int | None = None, only_model: bool = False
) -> Saved:
    """
    What a run saves.

    Args:
        footprint ([`~plan.simulate.Footprint`]): of a step of this policy.
        adapter (`bool`): whether an adapter is trained, so that the model below it is not saved.
        saves (`int`): checkpoints that the run makes.
        limit (`int`, *optional*): most checkpoints that are kept.
        only_model (`bool`, *optional*, defaults to `False`): whether checkpoints leave out the state of the optimizer.
    """
    policy = (
        footprint.gradients if adapter else footprint.weights
    )  # gradients have the type and the number of what is trained
    count = saves if limit is None else min(saves, limit + 1)
    return Saved(policy + (0 if only_model else footprint.optimizer), policy, count)


def free_disk(directory: str | Path) -> int:
    """Free bytes where a directory is, or will be."""
    there = Path(directory).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return shutil.disk_usage(there).free


def free_memory() -> int | None:
    """Free bytes of the main memory. `None` where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def gpu_memory() -> int | None:
    """Bytes of the first GPU. `None` without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
