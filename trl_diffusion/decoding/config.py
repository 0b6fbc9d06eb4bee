"""How a response is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .strategies import SCHEDULED, STRATEGIES, Strategy


SCHEDULES = ("even", "linear")
STOP_RULES = ("block", "token")
APPROXIMATE_CACHES = ("prefix", "dual", "sub_block")


@dataclass(frozen=True)
class DecodingConfig:
    r"""
    Settings of the denoising loop.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens a response may count. The canvas is filled up to the end of the block that holds the last one.
        temperature (`float`, *optional*, defaults to `0.0`):
            What the logits are divided by before sampling; 0 takes the most likely token.
        strategy (`str` or callable, *optional*, defaults to `"confidence"`):
            Which masked positions of the active block are unmasked at a step. As many as `tokens_per_step` or
            `steps_per_block` say: `"confidence"` (those whose likeliest token is most probable), `"entropy"` (lowest
            entropy), `"margin"` (best token furthest ahead of the second), `"random"`, `"left_to_right"`. As many as the
            distributions allow: `"threshold"` (every position whose likeliest token has a probability above `threshold`,
            at least as many as the schedule says), `"entropy_bound"` (lowest entropy, as long as they add up to less than
            `entropy_bound`, at least one). `"sampled_confidence"` (low-confidence remasking) and `"sampled_threshold"`
            look at the token that was sampled, as the published loops of LLaDA, Fast-dLLM and SDAR do; at temperature 0
            there is no difference. Or a
            function of your own, see [`decoding.strategies`]. Which distributions they look at, `tempered_confidence`
            says.
        tokens_per_step (`int`, *optional*, defaults to `1`):
            Positions unmasked at a step, unless `steps_per_block` is set.
        threshold (`float`, *optional*, defaults to `0.9`):
            Probability above which `"threshold"` unmasks a position.
        steps_per_block (`int`, *optional*):
            Number of steps over which a block is spread. With `sub_block_size`, a step ends with its part, so there may
            be more.
        schedule (`str`, *optional*, defaults to `"even"`):
            How it is spread. `"even"`: the same number at each step, one more at the first ones if it does not
            divide (LLaDA's generation). `"linear"`: each step unmasks the share `1 - t[i + 1] / t[i]` of what is left,
            rounded down, for times `t` that fall linearly from 1 to 0.001; the last step unmasks the rest (Dream's
            generation). Steps that would unmask nothing are left out.
        sub_block_size (`int`, *optional*):
            Unmask the parts of a block of this many positions one after another, from left to right (Fast-dLLM v2).
        top_k (`int`, *optional*):
            Keep the `top_k` most likely tokens of each distribution only, before confidence and sampling. (Dream's
            published generation runs with 50 under transformers 4, whose configs say so.)
        top_p (`float`, *optional*):
            Keep only the most likely tokens whose probabilities add up to `top_p` (nucleus sampling).
        suppress_tokens (`tuple[int, ...]`, *optional*, defaults to `()`):
            Tokens that are never proposed; the others share their probability.
        entropy_bound (`float`, *optional*, defaults to `0.1`):
            Bound of `"entropy_bound"`, in nats.
        stop_token_ids (`tuple[int, ...]`, *optional*):
            Tokens that end a response, instead of those of the policy's spec; `()` for none.
        stop_rule (`str`, *optional*, defaults to `"block"`):
            When a response ends: `"block"`, with the block that holds its stop token, or `"token"`, as soon as no
            position before the stop token (or the end of `max_new_tokens`) is masked (Fast-dLLM v2's generation). What is
            left of the block then stays masked. The responses are the same.
        approximate_cache (`str`, *optional*):
            Reuse keys and values that are out of date. Faster, and **not** exact: tokens and log-probabilities are others,
            and the recorded log-probabilities are not those of the policy's states. `"prefix"`: what is before the
            active block, with full attention; `"dual"`: what is behind it, too (both Fast-dLLM; refreshed at the first
            step of each block); `"sub_block"`: what is outside the active part of the block, with block attention and
            `sub_block_size` (Fast-dLLM v2; refreshed at the first step of each part).
        allow_mask_token (`bool`, *optional*, defaults to `False`):
            Whether the mask token may be proposed, with full attention and temperature 0. A position for which it is
            chosen stays masked and competes with those of later blocks for their steps; what is left in the end stays
            masked. This is LLaDA's published loop, token for token; its trajectories are no use for training.
        tempered_confidence (`bool`, *optional*, defaults to `False`):
            Which distribution `strategy` reads probabilities, entropies and margins from. `False`: the policy's own, at
            temperature 1 and without `suppress_tokens`, `top_k` and `top_p`, so that a threshold means the same at
            every temperature (LLaDA, Fast-dLLM). `True`: the one that tokens are sampled from, after all of these
            (Dream, SDAR, Fast-dLLM v2). With a low temperature every token then looks sure. The two are the same at
            temperatures 0 and 1 without `suppress_tokens`, `top_k` and `top_p`.

    Log-probabilities are recorded under the distribution that was sampled from: after temperature, `suppress_tokens`,
    `top_k` and `top_p`. Scoring knows the temperature only, so training refuses the other three.

    Raises:
        ValueError: if a setting is out of its range, or contradicts another.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    strategy: str | Strategy = "confidence"
    tokens_per_step: int = 1
    threshold: float = 0.9
    steps_per_block: int | None = None
    schedule: str = "even"
    sub_block_size: int | None = None
    top_k: int | None = None
    allow_mask_token: bool = False
    top_p: float | None = None
    suppress_tokens: tuple[int, ...] = ()
    entropy_bound: float = 0.1
    stop_token_ids: tuple[int, ...] | None = None
    stop_rule: str = "block"
    approximate_cache: str | None = None
    tempered_confidence: bool = False

    def __post_init__(self):
        for name in ("max_new_tokens", "tokens_per_step", "steps_per_block", "sub_block_size", "top_k"):
            value = getattr(self, name)
            optional = name not in ("max_new_tokens", "tokens_per_step")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a whole number, at least 1, got {value!r}.")
        for name in ("suppress_tokens", "stop_token_ids"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, list | tuple) or any(type(token) is not int or token < 0 for token in value):
                    raise ValueError(f"`{name}` must be a list of token ids, got {value!r}.")
                object.__setattr__(self, name, tuple(value))
        for name in ("allow_mask_token", "tempered_confidence"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be finite and not negative, got {self.temperature}.")
        if not callable(self.strategy) and self.strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be a function or one of {tuple(STRATEGIES)}, got {self.strategy!r}.")
        if self.steps_per_block is not None and self.strategy == "entropy_bound":
            raise ValueError("`steps_per_block` says how many positions a step unmasks; 'entropy_bound' ignores it.")
        if self.allow_mask_token and (
            self.steps_per_block is None or self.temperature > 0 or self.strategy not in SCHEDULED
        ):
            raise ValueError(
                f"`allow_mask_token=True` needs `steps_per_block`, or a block might never end, a strategy of {SCHEDULED}, "
                "and no temperature."
            )
        for name, choices in (("schedule", SCHEDULES), ("stop_rule", STOP_RULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if self.approximate_cache not in (None, *APPROXIMATE_CACHES):
            raise ValueError(
                f"`approximate_cache` must be one of {APPROXIMATE_CACHES} or None, got {self.approximate_cache!r}."
            )
        if self.approximate_cache == "sub_block" and self.sub_block_size is None:
            raise ValueError("`approximate_cache='sub_block'` needs `sub_block_size`.")
        if self.approximate_cache is not None and self.allow_mask_token:
            raise ValueError("`approximate_cache` and `allow_mask_token` do not go together.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be a probability, got {self.threshold}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if not 0 < self.entropy_bound < float("inf"):
            raise ValueError(f"`entropy_bound` must be positive and finite, got {self.entropy_bound}.")

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are never sampled although the policy gives them a share."""
        return bool(self.suppress_tokens) or self.top_k is not None or self.top_p is not None

    @property
    def is_random(self) -> bool:
        """Whether a response depends on its seed."""
        return self.temperature > 0 or self.strategy == "random"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types; a function of your own by its name."""
        values = asdict(self)
        if callable(self.strategy):
            values["strategy"] = getattr(self.strategy, "__qualname__", repr(self.strategy))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
