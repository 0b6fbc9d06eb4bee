"""Settings that have several names, here and in TRL: a place that has one of the names answers the others with its own."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
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
)


def name_here(name: str, known: Collection[str]) -> str | None:
    """
    How a setting is called at a place that does not have its name.

    Args:
        name (`str`): what it was called.
        known (`Collection[str]`): the names that the place has.

    Returns:
        `str`, or `None` if it is not there under another name.
    """
    same = (other for group in SAME if name in group for other in group)
    return None if name in known else next((other for other in same if other in known), None)


def say_names(names: Iterable[str], known: Collection[str], prefix: str = "") -> str:
    """A sentence for each unknown name that says which one is meant, if that can be told; `prefix` is put before names."""
    sentences = []
    for name in map(str, names):
        here = name_here(name, known)
        near = get_close_matches(name, known, 1)
        if here is not None:
            sentences.append(f" {prefix}{name} is called {prefix}{here} here.")
        elif near:
            sentences.append(f" Is {prefix}{name} meant to be {prefix}{near[0]}?")
    return "".join(sentences)


def check_words(words: Iterable[str], known: Collection[str]) -> None:
    """
    Checks the words of a command line.

    Args:
        words (`Iterable[str]`): the words.
        known (`Collection[str]`): names of the command's options.

    Raises:
        ValueError: if an option has another name here.
    """
    for name in _options(words):
        here = name_here(name, known)
        if here is not None:
            raise ValueError(f"--{name} is called --{here} here.")


def parse_words(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """As `parser.parse_args`; the line about an unknown option also says which one is meant, if that can be told."""
    options, rest = parser.parse_known_args(words)
    if rest:
        known = [name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")]
        parser.error(f"unrecognized arguments: {' '.join(rest)}.{say_names(_options(rest), known, '--')}")
    return options


def _options(words: Iterable[str]) -> list[str]:
    """The names of the options among the words of a command line."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]


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
            here = name_here(name, known)
            if here is not None:
                raise TypeError(f"`{name}` is called `{here}` here ({getattr(kind, '__name__', kind)}).")
        return function(*args, **kwargs)

    if isinstance(kind, type):
        kind.__init__ = call  # type: ignore[misc]
        return kind
    return cast(T, call)
