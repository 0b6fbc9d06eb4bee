"""Adapters: which of them a policy can have, and whether they fit it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel


if TYPE_CHECKING:
    from peft import PeftConfig

ALL_LINEAR = "all-linear"  # PEFT's word for all linear layers but the head


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of a model's linear layers, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config without memory for its weights. Under ZeRO-3, too, which `from_config` would shard it for."""
    with torch.device("meta"):
        return cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config)


def check_adapter(peft_config: PeftConfig) -> None:
    """
    Raises a `ValueError` for an adapter that puts tokens of its own before the prompt, or keys and values into the cache:
    positions, masks and the cache are this library's own.
    """
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} cannot be used with a diffusion policy: {peft_config.peft_type} puts virtual tokens "
            "before the prompt, for which its positions and attention masks have no place. Use LoRA, or another adapter of "
            "the weights."
        )


def adapters(model: nn.Module) -> dict[str, PeftConfig]:
    """The adapters that a model was opened with, by their names."""
    if isinstance(model, PreTrainedModel):
        return {}
    from peft import PeftModel  # here: decoding without an adapter does not need it

    return model.peft_config if isinstance(model, PeftModel) else {}


def check_adapters(model: nn.Module) -> None:
    """As [`check_adapter`], for all that a model has."""
    for peft_config in adapters(model).values():
        check_adapter(peft_config)


def expert_names(model: nn.Module) -> list[str]:
    """Last parts of the names of the parameters that hold the weights of all experts of a layer, sorted."""
    parameters = {name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in name}
    return sorted({".".join(name.split(".")[-3:]) for name in parameters})


def check_targets(model: nn.Module, peft_config: PeftConfig) -> None:
    """
    Checks that each name in `target_modules` matches a module, and each in `target_parameters` a parameter. PEFT itself is
    content if one of them does.

    Raises:
        ValueError: naming the targets that were not found, and the linear layers and weights of experts that there are.
    """
    experts = expert_names(model)
    targets = getattr(peft_config, "target_modules", None)
    if targets is not None and targets != ALL_LINEAR:  # None: PEFT's own defaults
        missing = _unmatched(targets, [name for name, _ in model.named_modules()])
        if missing:
            pattern = " A text is a pattern for whole names: give a list of names." if isinstance(targets, str) else ""
            raise ValueError(
                f"LoRA `target_modules` {missing} match nothing in {type(model).__name__}.{pattern} Its linear layers are "
                f"{linear_names(model)}; '{ALL_LINEAR}' takes all of them but the LM head."
                + (f" Its experts are no modules: `target_parameters={experts}` takes them." if experts else "")
            )
    missing = _unmatched(
        getattr(peft_config, "target_parameters", None) or (), [name for name, _ in model.named_parameters()]
    )
    if missing:
        raise ValueError(
            f"LoRA `target_parameters` {missing} match nothing in {type(model).__name__}. The weights of its experts are "
            f"{experts or 'linear layers, if it has any'}."
        )


def _unmatched(targets: str | Iterable[str], names: list[str]) -> list[str]:
    """The targets that are neither a name nor its last parts. A text is a pattern for whole names, as in PEFT."""
    if isinstance(targets, str):
        return [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    return sorted(
        target for target in targets if not any(name == target or name.endswith(f".{target}") for name in names)
    )
