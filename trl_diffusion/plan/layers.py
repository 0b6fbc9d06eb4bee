"""A model cut to its first layers, and what it says about all of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

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
    config: PretrainedConfig, spec: DiffusionSpec, work: Workload, *args: Any, **options: Any
) -> Footprint:
    """
    As [`~plan.simulate.simulate`], in seconds for a model of any depth: two and three layers are simulated, and what one more layer needs
    is added for each that was left out. It never takes less than three layers need.
    """
    layers = config.get_text_config().num_hidden_layers
    least = uniform_from(config) + 1
    if layers <= max(FEW, least + 1):
        return simulate(config, spec, work, *args, **options)
    low, high = (simulate(cut(config, count), spec, work, *args, **options) for count in (least, least + 1))
    values = {}
    for one in fields(Footprint):
        before, after = getattr(low, one.name), getattr(high, one.name)
        values[one.name] = after + max(after - before, 0) * (layers - least - 1)
    return Footprint(**values)
