"""A reference that `sync_ref_model` moves, in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import is_deepspeed_zero3_enabled


FILE = "reference.pt"


def save_reference(model: nn.Module, checkpoint: str | Path, write: bool) -> None:
    """
    Adds the weights of the reference to a checkpoint. Every process must call it, since they may share the weights.

    Args:
        model (`nn.Module`): the reference, out of its wrappers.
        checkpoint (`str` or `Path`): directory of the checkpoint.
        write (`bool`): whether this process writes.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        with _whole(parameter):
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if write:
                weights[name] = value.detach().cpu().clone()
    if write:
        torch.save(weights, Path(checkpoint) / FILE)


@torch.no_grad()
def load_reference(model: nn.Module, checkpoint: str | Path) -> None:
    """
    Gives the reference the weights that it had at a checkpoint. Every process must call it.

    Args:
        model (`nn.Module`): the reference, out of its wrappers.
        checkpoint (`str` or `Path`): directory of the checkpoint.

    Raises:
        ValueError: if the checkpoint holds no reference, a damaged one, or that of another model.
    """
    path = Path(checkpoint) / FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no {FILE}, the reference that `sync_ref_model=True` had moved: training would go on with "
            "that of the start. Set `sync_ref_model=False`, or start a new run with this checkpoint as `model`."
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}). Go on from another checkpoint.") from error
    shapes = {name: _shape(parameter) for name, parameter in model.named_parameters()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise ValueError(f"{path} holds the weights of another model than the reference, {type(model).__name__}.")
    for name, parameter in model.named_parameters():
        value = weights[name]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        with _whole(parameter, change=True) as mine:
            if mine:
                parameter.copy_(value)


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3, a parameter that is shared is empty


@contextmanager
def _whole(parameter: Tensor, change: bool = False) -> Iterator[bool]:
    """
    Inside, a parameter that ZeRO-3 shares among processes is whole. With `change`, what the first process makes of it holds
    for all. Gives whether it is for this process to change it.
    """
    if not is_deepspeed_zero3_enabled():
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if change else None):
        yield distributed.get_rank() == 0
