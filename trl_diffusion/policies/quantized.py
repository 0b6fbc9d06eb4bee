"""Policies with weights of 4 bits (bitsandbytes)."""

from __future__ import annotations

import sys

from torch import nn


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
