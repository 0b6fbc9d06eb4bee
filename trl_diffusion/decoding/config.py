"""All settings of the denoising loop, each with its help text and its range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any

from ..fields import AtLeast, Within, check_fields, check_names, explained
from ..names import knows_names
from ..trajectories.selection import Selection
from .revising import REVISIONS, Revising
from .strategies import SCHEDULED, SELECT_BY_SAMPLE, STRATEGIES, Strategy


if TYPE_CHECKING:
    StrategyOption = str | Strategy
    RevisionOption = str | Revising | None
else:  # as given on a command line
    StrategyOption = str
    RevisionOption = str | None

# These settings change the distribution that tokens are sampled from. Training scores the policy's own distribution.
OTHER_DISTRIBUTION = ("top_k", "top_p", "suppress_tokens", "approximate_cache")
# Settings that only some strategies look at.
_OF_REVISION = (
    "revision_threshold", "edit_threshold", "revision_rate", "revision_max", "revision_limit", "revision_steps", "fill_share",
)  # fmt: skip
_LOOKED_AT_BY = {"threshold": ("threshold", "sampled_threshold"), "entropy_bound": ("entropy_bound",)}


@dataclass(kw_only=True)
@explained
class RolloutSettings:
    r"""
    Settings of the denoising loop that training and collecting share. [`DecodingConfig`], [`DTRPOConfig`] and the commands
    inherit them, under the same names.

    Args:
        strategy (`str` or callable, *optional*, defaults to `"confidence"`):
            Which masked positions of the active block a step unmasks. These strategies unmask as many positions as
            `tokens_per_step` or `steps_per_block` say: `"confidence"` (the likeliest token has the highest probability),
            `"entropy"` (the lowest entropy), `"margin"` (the largest difference between the two highest probabilities),
            `"random"`, `"left_to_right"`. With the next two, this number depends on the distributions: `"threshold"`
            (every position whose likeliest token has a probability above `threshold`, but at least the number in the
            schedule), `"entropy_bound"` (the lowest entropies, as long as their sum is below `entropy_bound`, and at least
            one). `"sampled_confidence"` (low-confidence remasking) and `"sampled_threshold"` look at the token that was
            sampled, as the published loops of LLaDA, Fast-dLLM and SDAR do. At temperature 0 there is no difference. At a
            higher temperature, their policy gradient has a bias. [`DecodingConfig`] also takes a function of your own, see
            [`decoding.strategies`]. `tempered_confidence` decides which distributions a strategy looks at.
        tokens_per_step (`int`, *optional*, defaults to `1`):
            Number of positions that a step unmasks. It cannot be set together with `steps_per_block`.
        threshold (`float`, *optional*, defaults to `0.9`):
            Probability above which `"threshold"` unmasks a position.
        entropy_bound (`float`, *optional*, defaults to `0.1`):
            Bound of `"entropy_bound"`, in nats.
        steps_per_block (`int`, *optional*):
            Number of steps that unmask a block, in place of `tokens_per_step`. With `sub_block_size` there may be more
            steps, because each step unmasks positions of one part only.
        schedule (`str`, *optional*, defaults to `"even"`):
            How `steps_per_block` divides a block into steps. `"even"`: each step unmasks the same number of positions, and the
            first steps one more if the division has a remainder (LLaDA's generation). `"linear"`: each step unmasks the
            share `1 - t[i + 1] / t[i]` of the masked positions, rounded down, for times `t` that fall linearly from 1 to
            0.001, and the last step unmasks the rest (Dream's generation). Steps that would unmask nothing are left out.
        sub_block_size (`int`, *optional*):
            Divide a block into parts of this many positions, and unmask one part after another, from left to right
            (Fast-dLLM v2).
        stop_rule (`str`, *optional*, defaults to `"token"`):
            When a response ends. `"token"`: as soon as no position before its stop token (or the end of `max_new_tokens`) is
            masked (Fast-dLLM v2's generation). `"block"`: at the end of the block that holds the stop token. Responses and
            scores are the same. `"token"` saves steps and leaves the rest of the block masked.
        approximate_cache (`str`, *optional*):
            Reuse keys and values that are out of date. This is faster, but **not** exact: tokens and log-probabilities change,
            and the recorded log-probabilities are not those of the policy in the recorded states. `"prefix"`: reuses what
            is before the active block, with full attention. `"dual"`: also what is after it (both Fast-dLLM; refreshed at
            the first step of each block). `"sub_block"`: reuses what is outside the active part of the block, with block
            attention and `sub_block_size` (Fast-dLLM v2; refreshed at the first step of each part). In training,
            `diffusion/recorded_gap` shows the difference between the recorded log-probabilities and those of the policy,
            and `rescore_old_log_probs=True` computes them again.
        tempered_confidence (`bool`, *optional*, defaults to `False`):
            Whether `strategy` reads probabilities, entropies and margins from the distribution that tokens are sampled from.
            `False`: from the policy's own, at temperature 1 and without `suppress_tokens`, `top_k` and `top_p`, so that a
            threshold means the same at every temperature (LLaDA, Fast-dLLM). `True`: from the distribution after temperature
            and these settings (Dream, SDAR, Fast-dLLM v2). A low temperature then brings every probability close to 1. The two
            are the same at temperatures 0 and 1 without `suppress_tokens`, `top_k` and `top_p`. Recorded log-probabilities
            are those at `temperature` in both cases.
        score_selection (`bool`, *optional*, defaults to `False`):
            For `"sampled_confidence"` and `"sampled_threshold"` above temperature 0: whether log-probabilities are those of the
            tokens *and* of their selection. This makes the policy gradient of these strategies exact (docs/method.md,
            section 1). Each token that a step unmasks gets an equal share of the selection's log-probability. An update
            then runs the LM head at every masked position of the scored blocks.
        revision (`str` or [`Revising`], *optional*):
            Whether a step may take visible tokens back, and which. `None`: a token stays as it is. `"confidence"`: erases
            tokens whose probability is below `revision_threshold` (WINO). `"edit"`: writes over tokens that are not the
            likeliest at their position, if the likeliest has a probability above `edit_threshold`. Published rules:
            `"self_planning"` (P2), `"random"` (ReMDM) and `"sampled_edit"` (LLaDA 2.1, with a bias). The choice is made
            inside the active block. With full attention, it is made in the whole response up to the end of the active
            block. A block is over as soon as a step after the one that filled it takes nothing back, or when
            `steps_per_block` or `revision_steps` are used up. A block is always filled, with both values of `stop_rule`.
            Until it is filled, `tokens_per_step` or the schedule says how many more tokens are visible after each step.
            After that, every step writes all positions that were erased.
        revision_threshold (`float`, *optional*, defaults to `0.8`):
            Probability below which `revision="confidence"` erases a token.
        edit_threshold (`float`, *optional*, defaults to `0.5`):
            Probability above which `revision="edit"` and `"sampled_edit"` write another token.
        revision_rate (`float`, *optional*, defaults to `0.1`):
            Largest probability with which `revision="random"` erases a token.
        revision_max (`int`, *optional*):
            Largest number of tokens that `revision="confidence"` and `"edit"` take back at a step. `None`: a fifth of the
            positions of the block (with full attention, of the response up to the end of the active block), rounded up.
        revision_limit (`int`, *optional*, defaults to `2`):
            How often the token of one position may be taken back.
        revision_steps (`int`, *optional*):
            Largest number of steps of a block after it was filled for the first time. The last one erases nothing.
        fill_share (`float`, *optional*, defaults to `0.5`):
            With `revision` and `steps_per_block`: share of the steps in which the block is filled. The other steps write
            erased positions again. The last one erases nothing.
    """

    strategy: StrategyOption = field(default="confidence", metadata={"choices": STRATEGIES})
    tokens_per_step: Annotated[int, AtLeast(1)] = 1
    threshold: Annotated[float, Within("[0, 1]")] = 0.9
    entropy_bound: Annotated[float, Within("(0, inf)")] = 0.1
    steps_per_block: Annotated[int, AtLeast(1)] | None = None
    schedule: str = field(default="even", metadata={"choices": ("even", "linear")})
    sub_block_size: Annotated[int, AtLeast(1)] | None = None
    stop_rule: str = field(default="token", metadata={"choices": ("block", "token")})
    approximate_cache: str | None = field(default=None, metadata={"choices": ("prefix", "dual", "sub_block")})
    tempered_confidence: bool = False
    score_selection: bool = False
    revision: RevisionOption = field(default=None, metadata={"choices": REVISIONS})
    revision_threshold: Annotated[float, Within("[0, 1]")] = 0.8
    edit_threshold: Annotated[float, Within("[0, 1]")] = 0.5
    revision_rate: Annotated[float, Within("[0, 1]")] = 0.1
    revision_max: Annotated[int, AtLeast(1)] | None = None
    revision_limit: Annotated[int, AtLeast(1)] = 2
    revision_steps: Annotated[int, AtLeast(1)] | None = None
    fill_share: Annotated[float, Within("(0, 1]")] = 0.5

    def rollout_settings(self) -> dict[str, Any]:
        """The settings of this class alone, by name."""
        return {one.name: getattr(self, one.name) for one in fields(RolloutSettings)}

    def check_rollout_settings(self) -> None:
        """Raises a `ValueError` for a setting that differs from its default but has no effect."""
        defaults = type(self).__dataclass_fields__
        own = self.rollout_settings()
        DecodingConfig.check_given({name: value for name, value in own.items() if value != defaults[name].default})


@knows_names
@dataclass(unsafe_hash=True)  # it cannot be changed, see `__setattr__`
@explained
class DecodingConfig(RolloutSettings):
    r"""
    Settings of the denoising loop: those below, and those of [`RolloutSettings`]. They cannot be changed afterwards. Use
    `dataclasses.replace` to make a changed copy.

    Args:
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Largest number of tokens of a response. The canvas has whole blocks, so it may have more positions, which are not
            part of the response. If `max_new_tokens` is less than a block, they stay masked.
        temperature (`float`, *optional*, defaults to `0.0`):
            The logits are divided by this number before sampling. 0 takes the most likely token.
        top_k (`int`, *optional*):
            Keep only the `top_k` most likely tokens of each distribution, before sampling. (Dream's published generation
            uses 50 under transformers 4, where this is the default.)
        top_p (`float`, *optional*):
            Keep only the most likely tokens whose probabilities add up to `top_p` (nucleus sampling).
        suppress_tokens (`tuple[int, ...]`, *optional*, defaults to `()`):
            Tokens that are never proposed. Their probability goes to the other tokens.
        stop_token_ids (`tuple[int, ...]`, *optional*):
            Tokens that end a response, instead of those of the policy's spec; `()` for none.
        allow_mask_token (`bool`, *optional*, defaults to `False`):
            Whether the mask token may be proposed, with full attention and temperature 0. A position for which it is chosen
            stays masked, and competes with positions of later blocks for their steps. Positions that are left at the end
            stay masked. This equals LLaDA's published loop, token for token. Its trajectories cannot be used for training.

    Recorded log-probabilities are those of the distribution from which tokens were sampled: after temperature,
    `suppress_tokens`, `top_k` and `top_p`. Scoring takes into account only the temperature, so training refuses the other
    three.

    Raises:
        ValueError: if a setting is out of its range, or contradicts another.
    """

    max_new_tokens: Annotated[int, AtLeast(1)] = 256
    temperature: Annotated[float, Within("[0, inf)")] = 0.0
    top_k: Annotated[int, AtLeast(1)] | None = field(default=None, kw_only=True)
    top_p: Annotated[float, Within("(0, 1]")] | None = field(default=None, kw_only=True)
    suppress_tokens: tuple[int, ...] = field(default=(), kw_only=True)
    stop_token_ids: tuple[int, ...] | None = field(default=None, kw_only=True)
    allow_mask_token: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        own = {"strategy"} if callable(self.strategy) else set()
        own |= {"revision"} if isinstance(self.revision, Revising) else set()
        check_fields(self, {one.name for one in fields(self)} - own)
        for name in ("suppress_tokens", "stop_token_ids"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, list | tuple) or any(type(token) is not int or token < 0 for token in value):
                    raise ValueError(f"`{name}` must be a list of token ids, got {value!r}.")
                setattr(self, name, tuple(value))
        if self.steps_per_block is not None and self.tokens_per_step != RolloutSettings.tokens_per_step:
            self.check_given(vars(self))
        if self.steps_per_block is not None and self.strategy == "entropy_bound":
            raise ValueError("`steps_per_block` says how many positions a step unmasks; 'entropy_bound' ignores it.")
        if self.allow_mask_token and (
            self.steps_per_block is None or self.temperature > 0 or self.strategy not in SCHEDULED
        ):
            raise ValueError(
                f"`allow_mask_token=True` needs `steps_per_block` (without it a block might never end), one of the strategies "
                f"{SCHEDULED}, and temperature 0."
            )
        if self.score_selection and self.strategy not in SELECT_BY_SAMPLE:
            raise ValueError(
                f"`score_selection=True` is for the strategies {SELECT_BY_SAMPLE}, where sampled tokens decide which positions "
                f"are unmasked. {self.strategy!r} needs no such score. Leave it at False."
            )
        if self.approximate_cache == "sub_block" and self.sub_block_size is None:
            raise ValueError("`approximate_cache='sub_block'` needs `sub_block_size`.")
        if self.approximate_cache is not None and self.allow_mask_token:
            raise ValueError("`approximate_cache` and `allow_mask_token` do not go together.")
        self._check_revision()
        vars(self)["_is_checked"] = True

    def _check_revision(self) -> None:
        if self.revising is None:
            return
        for name in ("approximate_cache", "allow_mask_token"):
            if getattr(self, name):
                raise ValueError(f"`revision` and `{name}` do not go together: set one of the two to None or False.")
        if self.score_selection and self.sub_block_size is not None:
            raise ValueError("`revision` with `score_selection=True` needs `sub_block_size=None`.")

    def __setattr__(self, name: str, value: Any) -> None:
        # A dataclass that inherits from one that can be changed cannot be `frozen`.
        if "_is_checked" in vars(self):
            raise FrozenInstanceError(f"`{name}` cannot be changed: make another DecodingConfig.")
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecodingConfig:
        """Makes a config from settings by name. Raises a `ValueError` for unknown names."""
        check_names("decoding settings", values, cls)
        cls.check_given(values)
        return cls(**values)

    @staticmethod
    def check_given(settings: Mapping[str, Any]) -> None:
        """
        Checks that every setting that was given has an effect, together with the others.

        Args:
            settings (`Mapping[str, Any]`): settings by name, without those that were left at their defaults.

        Raises:
            ValueError: naming a setting that has no effect.
        """
        steps, tokens = settings.get("steps_per_block"), settings.get("tokens_per_step")
        if steps is not None and tokens is not None:
            raise ValueError(
                f"`tokens_per_step={tokens}` and `steps_per_block={steps}` both say how many positions a step unmasks. Give one "
                "of them (a `tokens_per_step` of 1 in a recipe or a config counts as not given)."
            )
        strategy = settings.get("strategy", RolloutSettings.strategy)
        for name, strategies in _LOOKED_AT_BY.items():
            if name in settings and strategy not in strategies and not callable(strategy):
                raise ValueError(
                    f"`{name}={settings[name]}` is for the strategy {' or '.join(map(repr, strategies))}, not for {strategy!r}. "
                    f"Set `strategy`, or leave `{name}` out."
                )
        revising = sorted(set(settings) & set(_OF_REVISION))
        if revising and not settings.get("revision"):
            raise ValueError(
                f"`{revising[0]}={settings[revising[0]]}` is for a decoder that takes tokens back, and `revision` is not set. Set "
                "it, too."
            )
        if "schedule" in settings and steps is None:
            schedule = settings["schedule"]
            raise ValueError(f"`schedule={schedule!r}` divides `steps_per_block`, which is not set. Set it, too.")

    def check_responses(self, number: int) -> None:
        """Raises a `ValueError` if `number` responses to a prompt would all be the same."""
        sampled = self.temperature > 0 and self.top_k != 1
        own = callable(self.strategy) or isinstance(self.revision, Revising)
        if number > 1 and not (sampled or own or "random" in (self.strategy, self.revision)):
            why = "with `top_k=1`" if self.temperature else "at temperature 0"
            raise ValueError(
                f"{number} responses to a prompt are all the same {why}. Set `temperature` to 1.0, without a `top_k` of 1, or "
                "`num_responses` to 1."
            )

    @property
    def revising(self) -> Revising | None:
        """How visible tokens are taken back. `None` if they stay."""
        return REVISIONS[self.revision] if isinstance(self.revision, str) else self.revision

    @property
    def selection(self) -> Selection | None:
        """How the selection of positions is scored. `None` if it is not scored."""
        return stored_selection(vars(self))

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are never sampled although the policy gives them a probability."""
        return bool(self.suppress_tokens) or self.top_k is not None or self.top_p is not None

    @property
    def is_random(self) -> bool:
        """Whether a response depends on its seed."""
        return self.temperature > 0 or self.strategy == "random" or self.revision == "random"

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types. A strategy that is a function is given by its name."""
        values = asdict(self)
        if callable(self.strategy):
            values["strategy"] = getattr(self.strategy, "__qualname__", repr(self.strategy))
        if isinstance(self.revision, Revising):
            values["revision"] = self.revision.name
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def stored_selection(settings: Mapping[str, Any]) -> Selection | None:
    """How the selection of positions is scored, from stored decoding settings. `None` if it was not scored."""
    if not settings.get("score_selection") or not settings["temperature"]:
        return None
    threshold = settings["threshold"] if settings["strategy"] == "sampled_threshold" else None
    return Selection(
        threshold, settings["sub_block_size"], settings["tempered_confidence"], settings["max_new_tokens"]
    )
