"""Decoding settings among the options of a config or of a command."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any, get_args, get_type_hints

from .config import DecodingConfig


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
