"""Settings that arrive on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..decoding.config import DecodingConfig


DECODING_SETTINGS = tuple(field.name for field in fields(DecodingConfig))


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
