"""Settings that have several names, here and in TRL: a place that has one of the names answers the others with its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, TypeVar, cast


T = TypeVar("T")

# Of several names that a place has, the first one is meant.
SAME = (
    ("max_new_tokens", "max_completion_length", "completion_length"),
    ("num_generations", "num_responses"),
    ("strategy", "decoding_strategy"),
    ("threshold", "confidence_threshold"),
    ("schedule", "step_schedule"),
    ("model_name_or_path", "model"),
    ("adapter_name_or_path", "adapter"),
    ("tokenizer_name_or_path", "tokenizer"),
    ("per_device_train_batch_size", "batch_size", "rollout_batch_size"),
    ("gradient_accumulation_steps", "accumulation"),
    ("lora_r", "lora_rank"),
    ("task", "tasks"),
    ("seed", "seeds"),
    ("learning_rate", "lr"),
    ("num_train_epochs", "epochs", "num_epochs"),
    ("dataset_name", "train_file", "dataset"),
    ("reward_funcs", "reward_func", "rewards"),
    ("output_dir", "output"),
)


def other_names(name: str, known: Collection[str]) -> list[str]:
    """
    How a setting is called at a place that does not have its name.

    Args:
        name (`str`): what it was called.
        known (`Collection[str]`): the names that the place has.

    Returns:
        `list[str]`: the one name, or none if it is there under no other.
    """
    same = (other for group in SAME if name in group for other in group)
    return [] if name in known else [other for other in same if other in known][:1]


def knows_names(kind: T) -> T:
    """
    Decorator of a function or a dataclass: an argument under another name of the same setting is answered with the right
    one.

    Raises:
        TypeError: when called with such a name.
    """
    function = cast(Callable, kind.__init__ if isinstance(kind, type) else kind)  # type: ignore[misc]
    known = list(inspect.signature(function).parameters)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            for here in other_names(name, known):
                raise TypeError(f"`{name}` is called `{here}` here ({getattr(kind, '__name__', kind)}).")
        return function(*args, **kwargs)

    if isinstance(kind, type):
        kind.__init__ = call  # type: ignore[misc]
        return kind
    return cast(T, call)
