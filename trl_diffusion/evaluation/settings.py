"""Settings that arrive on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..decoding.config import DecodingConfig


DECODING_SETTINGS = tuple(field.name for field in fields(DecodingConfig))


def read_mapping(value: str | Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """
    A mapping that was given on the command line: as `name:value+name:value`, as JSON, or as the path of a `.json` or
    `.yaml` file.

    Raises:
        ValueError: if it is none of these.
    """
    if value is None or isinstance(value, Mapping):
        return dict(value or {})
    text = str(value).strip()
    if text.endswith((".json", ".yaml", ".yml")):
        if not Path(text).is_file():
            raise ValueError(f"`{name}`: there is no file {text}.")
        text = Path(text).read_text(encoding="utf-8")
    elif not text.startswith("{"):
        text = "\n".join(part.replace(":", ": ", 1) for part in text.split("+"))
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"`{name}` must be like name:value+name:value, a JSON object, or the path of a JSON or YAML file; "
            f"got {value!r}."
        )
    return found


def check_settings(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """
    Settings of [`DecodingConfig`], checked.

    Raises:
        ValueError: if there is no such setting, or it is out of range.
    """
    unknown = sorted(set(decoding) - set(DECODING_SETTINGS))
    if unknown:
        raise ValueError(f"Unknown decoding settings {unknown}; there are {sorted(DECODING_SETTINGS)}.")
    DecodingConfig(**decoding)
    return dict(decoding)
