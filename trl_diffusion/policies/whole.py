"""
A policy has all of its weights, and they have all of the checkpoint's. transformers gives weights that a checkpoint lacks
random values, leaves those that the model has no place for, and logs a table. Here both are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationMixin, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..links import link
from .training import gather_experts_at_once


SHOWN = 8  # names in a message
_ADVICE = (
    "Is the checkpoint complete, and is its `config.json` its own? A model with other names of weights needs a family of its "
    f"own ({link('docs/howto/family.md')})."
)


def open_whole(load: Callable[..., Any], cls: type[PreTrainedModel], path: Any, *args: Any, **options: Any) -> Any:
    """
    `cls.from_pretrained`, for which `load` stands, with an error if the weights of the checkpoint are not those of the model.

    Args:
        load (`Callable`): the method without its class.
        cls (`type`): class of the model.
        path (`str` or `Path`): directory or hub id.
        args, options: the other arguments of `from_pretrained`.

    Raises:
        ValueError: naming the weights that are missing, left over, or of another shape.
    """
    wants_report = options.pop("output_loading_info", False)
    checks_shapes = not options.get("ignore_mismatched_sizes", False)
    options["ignore_mismatched_sizes"] = True  # the message below names them
    try:
        model, report = load(cls, path, *args, output_loading_info=True, **options)
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        missing = _missing_parts(cls, path, options.get("config"))
        what = _named("missing", missing) if missing else " ".join(str(error).split()).rstrip(".!")
        raise ValueError(f"The weights of {path} do not make up those of {cls.__name__}: {what}. {_ADVICE}") from error
    shapes = (
        f"{name} ({tuple(found)} instead of {tuple(wanted)})" for name, found, wanted in report["mismatched_keys"]
    )
    left_over = report["unexpected_keys"]
    if model.get_output_embeddings() is None:  # a backbone by itself
        left_over = [name for name in left_over if not name.startswith("lm_head.")]
    check_report(path, type(model), report["missing_keys"], left_over, shapes if checks_shapes else ())
    gather_experts_at_once(model)
    return (model, report) if wants_report else model


def check_report(
    path: Any, cls: type, missing: Iterable[str], left_over: Iterable[str], reshaped: Iterable[str] = ()
) -> None:
    """
    Checks what was found when weights were loaded.

    Args:
        path (`str` or `Path`): where they came from.
        cls (`type`): class of the model.
        missing (`Iterable[str]`): names of weights that the model has and the checkpoint has not.
        left_over (`Iterable[str]`): names of weights that the checkpoint has and the model has not.
        reshaped (`Iterable[str]`): names of weights that have another shape, with the shapes.

    Raises:
        ValueError: if there are any.
    """
    found = {"missing": list(missing), "left over": list(left_over), "of another shape": list(reshaped)}
    problems = [_named(what, names) for what, names in found.items() if names]
    if problems:
        raise ValueError(f"The weights of {path} are not those of {cls.__name__}: {'; '.join(problems)}. {_ADVICE}")


@contextmanager
def only_whole_models() -> Iterator[None]:
    """Inside, causal language models of transformers open as with [`open_whole`], whoever opens them."""
    inherited = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls, path, *args, **options):
        if not issubclass(cls, GenerationMixin):  # a reward model, whose head may be new
            return inherited.__func__(cls, path, *args, **options)
        return open_whole(inherited.__func__, cls, path, *args, **options)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = inherited  # type: ignore[method-assign]


def _named(what: str, names: Iterable[str]) -> str:
    """How many weights there are of a kind, and their first names."""
    names = sorted(names)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})"


def _missing_parts(cls: type[PreTrainedModel], path: Any, config: Any) -> list[str]:
    """Names in the checkpoint's own format that a directory lacks; empty if it has no files of safetensors, or is a hub id."""
    saved: set[str] = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            saved.update(content.keys())
    if not saved:
        return []
    assert cls.config_class is not None
    with torch.device("meta"):
        model = cls(config or cls.config_class.from_pretrained(path, trust_remote_code=False))
    wanted: Mapping[str, Any] = revert_weight_conversion(model, model.state_dict())
    return [name for name in wanted if name not in saved]
