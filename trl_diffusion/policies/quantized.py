"""Policies with weights of 8 or 4 bits (bitsandbytes)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def rounding(load_in_4bit: bool, load_in_8bit: bool, dtype: str | torch.dtype) -> BitsAndBytesConfig | None:
    """
    How weights are rounded when a policy is opened: with 4 bits as TRL's `load_in_4bit` does it, in NF4.

    Args:
        load_in_4bit, load_in_8bit (`bool`): whether they are rounded, and to what.
        dtype (`str` or `torch.dtype`): type that weights of 4 bits are computed in; float32 for `"auto"`.

    Raises:
        ValueError: if both are asked for.
    """
    if not load_in_4bit and not load_in_8bit:
        return None
    from trl import ModelConfig, get_quantization_config  # here, since it takes a while

    dtype = "float32" if dtype == "auto" else str(dtype).removeprefix("torch.")
    return get_quantization_config(ModelConfig(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, dtype=dtype))


def keep_trainable(model: nn.Module) -> None:
    """
    Keeps bitsandbytes from packing 4-bit weights for inference. Call it on a policy that will be trained.

    In evaluation mode, on a CPU with `avx512_bf16`, a layer packs its weights on its first call, and they stay packed
    when training goes on. Packed weights have no backward pass: the gradients of the layers below are wrong, and there is
    no error. Their scales are also rounded to bfloat16, and the width of a layer must be a multiple of 64.

    Args:
        model (`nn.Module`): the policy. One without 4-bit weights is left as it is.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")  # whoever quantized the policy has imported it
    if bitsandbytes is None:
        return
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
