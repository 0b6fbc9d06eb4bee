"""
transformers' own `generate` writes from left to right. A policy that denoises its responses would give text that looks right
and is nonsense, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import GenerationMixin, PretrainedConfig

from .spec import spec_fields, writes_left_to_right


# `generate_batch` and continuous batching begin with the second one.
METHODS = ("generate", "init_continuous_batching")


def check_left_to_right(config: PretrainedConfig) -> None:
    """
    Checks that a model may write from left to right.

    Raises:
        ValueError: if its config has a diffusion spec, unless its blocks are of one token and it writes them one after another.
    """
    fields = spec_fields(config)
    if fields and not writes_left_to_right(fields):
        raise ValueError(
            f"This `{config.model_type}` model is a diffusion policy: it denoises its responses, but `model.generate` of "
            "transformers, and all that calls it (pipelines, TRL's GRPOTrainer), writes from left to right, which would give "
            "nonsense. Answer with `trl_diffusion.generate(model, tokenizer, prompts)`, and train with "
            "`trl_diffusion.DTRPOTrainer`."
        )


def refuse_policies() -> None:
    """Makes `generate` of all models of transformers refuse diffusion policies. Doing it again changes nothing."""
    for name in METHODS:
        method = getattr(GenerationMixin, name, None)
        if method is not None and not hasattr(method, "refuses_policies"):
            setattr(GenerationMixin, name, _refusing(method))


def _refusing(method: Callable) -> Callable:
    @wraps(method)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is None:  # somebody else's loop, which may denoise
            check_left_to_right(model.config)
        return method(model, *args, **kwargs)

    call.refuses_policies = True  # type: ignore[attr-defined]
    return call
