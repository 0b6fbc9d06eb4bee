"""How a response is made."""

from __future__ import annotations

from dataclasses import dataclass


STRATEGIES = ("confidence", "threshold")
SCHEDULES = ("even", "linear")


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
            Which masked positions of the active block are unmasked at a step. `"confidence"`: those whose sampled token
            is most probable (low-confidence remasking), as many as `tokens_per_step` or `steps_per_block` say.
            `"threshold"`: every position whose sampled token has a probability above `threshold`, and always the most
            probable one.
        tokens_per_step (`int`, *optional*, defaults to `1`):
            Positions unmasked at a step by `"confidence"`, unless `steps_per_block` is set.
        threshold (`float`, *optional*, defaults to `0.9`):
            Probability above which `"threshold"` unmasks a position.
        steps_per_block (`int`, *optional*):
            Number of steps over which `"confidence"` spreads a block. With `sub_block_size`, a step ends with its part,
            so there may be more.
        schedule (`str`, *optional*, defaults to `"even"`):
            How it spreads them. `"even"`: the same number at each step, one more at the first ones if it does not
            divide (LLaDA's generation). `"linear"`: each step unmasks the share `1 - t[i + 1] / t[i]` of what is left,
            rounded down, for times `t` that fall linearly from 1 to 0.001; the last step unmasks the rest (Dream's
            generation). Steps that would unmask nothing are left out.
        sub_block_size (`int`, *optional*):
            Unmask the parts of a block of this many positions one after another, from left to right (Fast-dLLM v2).
        top_k (`int`, *optional*):
            Keep the `top_k` most likely tokens of each distribution only, before confidence and sampling. Recorded
            log-probabilities are those of what is left; they cannot be compared with scored ones, so training
            refuses it. (Dream's published generation runs with 50 under transformers 4, whose configs say so.)
        allow_mask_token (`bool`, *optional*, defaults to `False`):
            Whether the mask token may be proposed, with full attention and temperature 0. A position for which it is
            chosen stays masked and competes with those of later blocks for their steps; what is left in the end stays
            masked. This is LLaDA's published loop, token for token; its trajectories are no use for training.

    Raises:
        ValueError: if a setting is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    strategy: str = "confidence"
    tokens_per_step: int = 1
    threshold: float = 0.9
    steps_per_block: int | None = None
    schedule: str = "even"
    sub_block_size: int | None = None
    top_k: int | None = None
    allow_mask_token: bool = False

    def __post_init__(self):
        for name in ("max_new_tokens", "tokens_per_step", "steps_per_block", "sub_block_size", "top_k"):
            value = getattr(self, name)
            optional = name not in ("max_new_tokens", "tokens_per_step")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a whole number, at least 1, got {value!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be finite and not negative, got {self.temperature}.")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {STRATEGIES}, got {self.strategy!r}.")
        if self.steps_per_block is not None and self.strategy == "threshold":
            raise ValueError("`steps_per_block` says how many positions 'confidence' unmasks; 'threshold' ignores it.")
        if self.allow_mask_token and (self.steps_per_block is None or self.temperature > 0):
            raise ValueError(
                "`allow_mask_token=True` needs `steps_per_block`, or a block might never end, and no temperature."
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {SCHEDULES}, got {self.schedule!r}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be a probability, got {self.threshold}.")
