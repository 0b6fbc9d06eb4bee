"""Opening a checkpoint."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig


def load_config(path: str, **options) -> PretrainedConfig:
    """
    The config of a checkpoint.

    Args:
        path (`str`): directory or hub id.
        options (`dict`): passed on to `AutoConfig.from_pretrained`.
    """
    return AutoConfig.from_pretrained(path, **options)
