"""Defaults that depend on the machine, and options that may be given as text, for every config of a trainer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

from ..utils import no_repeated_keys


if TYPE_CHECKING:
    from ..sft.config import DiffusionSFTConfig
    from .config import DTRPOConfig


def settle(args: DTRPOConfig | DiffusionSFTConfig) -> None:
    """
    Reads `diffusion_spec`, and sets the options that were left open and that transformers would set to something that this
    machine cannot do, or would ask about.

    Raises:
        ValueError: if `diffusion_spec` is no mapping and no JSON object.
    """
    args.diffusion_spec = _mapping(args.diffusion_spec)
    if args.bf16 is None and (args.use_cpu or not is_torch_bf16_gpu_available()):
        args.bf16 = False
    if not torch.accelerator.is_available():  # torch warns that it cannot be done
        args.dataloader_pin_memory = False
    if args.trust_remote_code is None:  # with `None`, transformers asks on the terminal
        args.trust_remote_code = False


def _mapping(value: Any) -> dict[str, Any] | None:
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value, object_pairs_hook=no_repeated_keys)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`diffusion_spec` must be a mapping or a JSON object, got {value!r} ({error})."
            ) from error
    if not isinstance(found, dict | None):
        raise ValueError(f"`diffusion_spec` must be a mapping or a JSON object, got {value!r}.")
    return found
