"""Decoding settings among the options of a config or of a command."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from .config import DecodingConfig, RolloutSettings


# Earlier names of settings in `DTRPOConfig` and in `trl-diffusion collect`.
OLD_NAMES = {"decoding_strategy": "strategy", "confidence_threshold": "threshold", "step_schedule": "schedule"}


@dataclass(kw_only=True)
class RolloutOptions(RolloutSettings):
    """
    [`RolloutSettings`], which can also be given under their old names. Version 0.2 will remove the old names.

    Args:
        decoding_strategy, confidence_threshold, step_schedule:
            Old names of `strategy`, `threshold` and `schedule`.
    """

    decoding_strategy: str | None = field(default=None, metadata={"help": "Old name of strategy."})
    confidence_threshold: float | None = field(default=None, metadata={"help": "Old name of threshold."})
    step_schedule: str | None = field(default=None, metadata={"help": "Old name of schedule."})

    def take_old_names(self) -> None:
        """
        Copies values that were given under old names to the new names, with a `FutureWarning`.

        Raises:
            ValueError: if a setting was given under both names.
        """
        for old, name in OLD_NAMES.items():
            value = getattr(self, old)
            if value is None:
                continue
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"`{old}` is the old name of `{name}`: give `{name}` alone, got both.")
            warnings.warn(
                f"`{old}` is called `{name}` now; version 0.2 will not know the old name.", FutureWarning, stacklevel=4
            )
            setattr(self, name, value)
            setattr(self, old, None)


def add_decoding_options(parser: argparse._ArgumentGroup) -> None:
    """Adds an option for every setting of [`DecodingConfig`] to a parser. An option that is not given is `None`."""
    for one in fields(DecodingConfig):
        text = f"{one.metadata['help']} (default: {one.default})"
        parser.add_argument(f"--{one.name}", help=text, default=None, **_kind(one))


def given_decoding(options: argparse.Namespace) -> DecodingConfig:
    """The settings that were given on the command line of such a parser."""
    given = {one.name: getattr(options, one.name) for one in fields(DecodingConfig)}
    return DecodingConfig.from_dict({name: value for name, value in given.items() if value is not None})


def _kind(one: Field) -> dict[str, Any]:
    """How argparse reads a setting."""
    if "choices" in one.metadata:
        return {"choices": one.metadata["choices"]}
    kind = get_type_hints(DecodingConfig)[one.name]
    kinds = {kind, *get_args(kind)} - {type(None)}
    if bool in kinds:
        return {"action": "store_true"}
    if tuple[int, ...] in kinds:
        return {"type": int, "nargs": "*", "metavar": "ID"}
    return {"type": float, "metavar": "X"} if float in kinds else {"type": int, "metavar": "N"}
