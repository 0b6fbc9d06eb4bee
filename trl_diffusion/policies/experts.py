"""Which experts the tokens of a pass are sent to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn


def expert_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold all experts of a layer, in order. Transformers gives them the same arguments in every backbone."""
    return [module for module in model.modules() if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)]


@contextmanager
def counted_tokens(model: nn.Module, places: Tensor) -> Iterator[list[Tensor]]:
    """
    Counts the tokens that each expert gets in a pass inside this context.

    Args:
        model (`nn.Module`): the policy.
        places (`Tensor` of shape `(M,)`): the tokens that count. Token `n` of row `q` of an input of shape `(Q, N)` is `q N + n`.

    Returns:
        `list[Tensor]`: for each layer with experts a `Tensor` of shape `(E,)`, the tokens of each of its `E` experts. Filled by the
        pass. Empty without experts.
    """
    found: list[Tensor] = []

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        chosen = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]  # (Q N, experts of a token)
        found.append(torch.bincount(chosen[places].flatten(), minlength=cast(int, module.num_experts)))

    with ExitStack() as stack:
        for module in expert_layers(model):
            stack.callback(module.register_forward_pre_hook(count, with_kwargs=True).remove)
        yield found
