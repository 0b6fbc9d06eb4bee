"""How a response is made."""

from __future__ import annotations

from dataclasses import dataclass


STRATEGIES = ("confidence", "threshold")


@dataclass(frozen=True)
class DecodingConfig:
    r"""
    Settings of the denoising loop.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens a response may count. The canvas is filled up to the end of the block that holds the last one.
        temperature (`float`, *optional*, defaults to `0.0`):
            What the logits are divided by before sampling; 0 takes the most likely token.
        strategy (`str`, *optional*, defaults to `"confidence"`):
            Which masked positions of the active block are unmasked at a step. `"confidence"`: the `tokens_per_step`
            positions whose sampled token is most probable (low-confidence remasking). `"threshold"`: every position
            whose sampled token has a probability above `threshold`, and always the most probable one.
        tokens_per_step (`int`, *optional*, defaults to `1`):
            Positions unmasked at a step by `"confidence"`.
        threshold (`float`, *optional*, defaults to `0.9`):
            Probability above which `"threshold"` unmasks a position.

    Raises:
        ValueError: if a setting is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    strategy: str = "confidence"
    tokens_per_step: int = 1
    threshold: float = 0.9

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must not be negative, got {self.temperature}.")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {STRATEGIES}, got {self.strategy!r}.")
        if self.tokens_per_step < 1:
            raise ValueError(f"`tokens_per_step` must be at least 1, got {self.tokens_per_step}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be a probability, got {self.threshold}.")
