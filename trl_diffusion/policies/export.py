"""Saving a policy as the stock backbone that it is built on."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from .families import FAMILIES
from .files import check_one_policy
from .spec import get_spec, set_spec


def save_backbone(model: PreTrainedModel, directory: str | Path) -> Path:
    """
    Saves a family's model as the plain backbone it is built on (Llama, Qwen2, Qwen3, Qwen3-MoE or GLM-4-MoE), with the backbone's config and
    weight names, for tools that know backbones but not diffusion families. The diffusion spec goes along. Tools that
    ignore it will run the model from left to right, which is not what it was trained for.

    Args:
        model ([`~transformers.PreTrainedModel`]): a model of a family, adapters merged.
        directory (`str` or `Path`): where to save it.

    Returns:
        `Path` of the directory.

    Raises:
        ValueError: if the model is not of a family; it is a plain backbone already then, and `save_pretrained` does. Or if
            the directory holds an adapter or a collection.
    """
    if not any(isinstance(model.config, config) for config, *_ in FAMILIES.values()):
        raise ValueError(f"{type(model).__name__} is not of a diffusion family: save it with `save_pretrained`.")
    check_one_policy(directory, adapter=False)
    stock = next(
        base
        for base in type(model).__mro__
        if issubclass(base, PreTrainedModel) and base.__module__.startswith("transformers.models.")
    )
    assert stock.config_class is not None
    own = set(stock.config_class().to_dict()) - {"architectures", "model_type", "transformers_version"} | {"head_dim"}
    config = stock.config_class(**{name: value for name, value in vars(model.config).items() if name in own})
    set_spec(config, get_spec(model.config))
    backbone = stock(config).to(model.dtype)  # type: ignore[arg-type]  # transformers' `to` loses its `self`
    backbone.load_state_dict(model.state_dict())
    backbone.save_pretrained(directory)
    return Path(directory)
