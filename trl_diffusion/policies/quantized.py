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


def prepare_rounded(model: nn.Module) -> None:
    """
    Keeps bitsandbytes from packing weights of 4 bits for inference, and checks that it reads them right. Call it on every
    policy that was opened.

    In evaluation mode, on a CPU with `avx512_bf16`, a layer packs its weights on its first call, and they stay packed
    when training goes on. Packed weights have no backward pass: the gradients of the layers below are wrong, and there is
    no error. Their scales are also rounded to bfloat16, and the width of a layer must be a multiple of 64.

    On a CPU with `avx512f`, some versions read a matrix wrongly if its rows do not end with a run of entries that share a
    scale (64 by default), as rows of 96 entries do.

    Args:
        model (`nn.Module`): the policy. One without 4-bit weights is left as it is.

    Raises:
        ValueError: naming a layer that this processor reads wrongly.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")  # whoever quantized the policy has imported it
    if bitsandbytes is None:
        return
    layers = {}  # one of each kind
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            state = module.weight.quant_state
            if module.weight.device.type == "cpu" and state is not None:
                layers[module.in_features, state.blocksize, state.quant_type, state.dtype] = name
    for kind, name in layers.items():
        if not _reads_rows(*kind):
            raise ValueError(
                f"On this processor, bitsandbytes reads weights of 4 bits wrongly where a row has {kind[0]} entries, which is "
                f"no multiple of {kind[1]}: {name}. Open the policy on a GPU, or without `load_in_4bit`."
            )


def _reads_rows(width: int, run: int, kind: str, dtype: torch.dtype) -> bool:
    """Whether a matrix of this width says the same, read row by row and as one row. `run`: entries that share a scale."""
    if width % run == 0:
        return True
    functional = sys.modules["bitsandbytes"].functional
    matrix = torch.linspace(-1, 1, run * width, dtype=dtype).reshape(run, width)
    entries, state = functional.quantize_4bit(matrix, blocksize=run, quant_type=kind)
    rows = functional.dequantize_4bit(entries, state)
    state.shape = torch.Size([matrix.numel()])
    return torch.equal(rows.flatten(), functional.dequantize_4bit(entries, state).flatten())
