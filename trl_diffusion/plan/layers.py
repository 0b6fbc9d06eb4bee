"""A model cut to its first layers, and what it says about all of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields

import torch
from transformers import PretrainedConfig

from ..policies.spec import DiffusionSpec
from .simulate import Footprint, Workload, simulate


FEW = 8  # layers that are simulated one by one


def cut(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of the same model with its first layers only; embeddings and head stay whole."""
    config = deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def uniform_from(config: PretrainedConfig) -> int:
    """Number of layers from which on each further layer is like the one before it."""
    text = config.get_text_config()
    dense = [number for number in getattr(text, "mlp_only_layers", None) or () if number < text.num_hidden_layers]
    return max(getattr(text, "first_k_dense_replace", 0) or 0, max(dense, default=-1) + 1) + 1


def simulate_layers(
    config: PretrainedConfig,
    spec: DiffusionSpec,
    work: Workload,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    lora_rank: int | None = None,
) -> Footprint:
    """
    As [`~plan.simulate.simulate`], in seconds for a deep model: two and three layers are simulated, and what one more layer needs is
    added for each that was left out. It never takes less than three layers need. Where every weight is trained under autocast,
    copies of the weights overtake the activations of the first layers, so all layers are simulated.

    Args:
        config, spec, work, dtype, autocast, lora_rank: as for [`~plan.simulate.simulate`].
    """
    layers = config.get_text_config().num_hidden_layers
    least = uniform_from(config) + 1
    if layers <= max(FEW, least + 1) or (autocast and lora_rank is None):
        return simulate(config, spec, work, dtype, autocast, lora_rank)
    low, high = (simulate(cut(config, count), spec, work, dtype, autocast, lora_rank) for count in (least, least + 1))
    values = {}
    for one in fields(Footprint):
        before, after = getattr(low, one.name), getattr(high, one.name)
        values[one.name] = after + max(after - before, 0) * (layers - least - 1)
    return Footprint(**values)
