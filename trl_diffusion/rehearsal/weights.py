"""Random weights of real shapes, made fast."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..policies.attention import enable_plans
from ..policies.forward import layer_lists
from ..utils import seeded


PERIOD = 1_000_003  # numbers that are drawn; a prime, so that no two rows of a matrix are the same
_RANDOM = (Tensor.normal_, Tensor.uniform_)


class _Repeated(TorchFunctionMode):
    """Fills large tensors with random numbers that repeat, which takes as long as writing them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _RANDOM or args[0].numel() <= PERIOD or not args[0].is_contiguous():
            return func(*args, **kwargs)
        flat = args[0].detach().view(-1)
        drawn = func(torch.empty(PERIOD, dtype=flat.dtype, device=flat.device), *args[1:], **kwargs)
        whole = len(flat) // PERIOD * PERIOD
        flat[:whole].view(-1, PERIOD).copy_(drawn)
        flat[whole:].copy_(drawn[: len(flat) - whole])
        return args[0]


def random_policy_model(
    config: PretrainedConfig, dtype: torch.dtype, device: str | torch.device, attention: str | None = None
) -> nn.Module:
    """
    A model of this config with random weights. The global random state of the CPU is afterwards what it was before.

    Args:
        config ([`~transformers.PretrainedConfig`]): its config.
        dtype (`torch.dtype`): type of the weights.
        device (`str` or `torch.device`): where to make it.
        attention (`str`, *optional*): attention implementation.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    with seeded(0), torch.device(device), _Repeated():
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype, trust_remote_code=False, **options)
    enable_plans(model)
    return model.eval()


def keep_layers(model: nn.Module, count: int) -> None:
    """Removes all layers of a model but the first ones."""
    del layer_lists(model)[0][count:]
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            config.get_text_config().num_hidden_layers = count
