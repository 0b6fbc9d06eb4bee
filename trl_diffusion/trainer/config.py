"""Configuration of [`DTRPOTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..decoding.config import SCHEDULES, STRATEGIES, DecodingConfig


@dataclass
class DTRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`DTRPOTrainer`].

    It has every parameter of [`~trl.GRPOConfig`], with the same meaning, and the ones below. Parameters of
    [`~trl.GRPOConfig`] that mean nothing for a diffusion policy are refused (see [`DTRPOConfig.refused`]).

    Parameters:
        > Parameters that control the policy

        diffusion_spec (`dict[str, Any]` or `str`, *optional*):
            Fields of [`DiffusionSpec`] that complete or override the ones stored in the model's config, as a mapping or
            a JSON string. This is how a model that says nothing about diffusion becomes a policy.

        > Parameters that control decoding

        decoding_strategy (`str`, *optional*, defaults to `"confidence"`):
            Which masked positions of a block are unmasked at a step: `"confidence"` (the `tokens_per_step` most
            probable ones) or `"threshold"` (all above `confidence_threshold`, at least one).
        tokens_per_step (`int`, *optional*, defaults to `1`):
            Positions unmasked at a step by `"confidence"`.
        confidence_threshold (`float`, *optional*, defaults to `0.9`):
            Probability above which `"threshold"` unmasks a position.
        steps_per_block (`int`, *optional*):
            Number of steps over which `"confidence"` spreads a block, instead of `tokens_per_step`.
        step_schedule (`str`, *optional*, defaults to `"even"`):
            How `steps_per_block` spreads it: `"even"` (LLaDA) or `"linear"` (Dream).
        sub_block_size (`int`, *optional*):
            Unmask the parts of a block of this many positions one after another, from left to right (Fast-dLLM v2).
        rollout_batch_size (`int`, *optional*):
            Responses that a process decodes at once. All of them if `None`.

        > Parameters that control the estimator

        step_distribution (`str`, *optional*, defaults to `"uniform"`):
            How the scored step of a block is drawn: `"uniform"` over its steps, or `"token"` for proportional to the
            number of tokens a step unmasked.
        num_step_draws (`int`, *optional*, defaults to `1`):
            Steps drawn per block. More draws shrink the variance of the estimate and lengthen the packed sequence.
        weighting (`str`, *optional*, defaults to `"unbiased"`):
            `"unbiased"` weighs a drawn step by the inverse of its probability; `"none"` gives all the same weight.

    > [!NOTE]
    > All other defaults are those of the installed [`~trl.GRPOConfig`].
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["diffusion_spec"]

    # Parameters that control the policy
    diffusion_spec: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of `DiffusionSpec` (mask_token_id, attention, block_size, ...) that complete or override "
            "the ones stored in the model's config, as a mapping or a JSON string."
        },
    )

    # Parameters that control decoding
    decoding_strategy: str = field(
        default="confidence",
        metadata={
            "help": "Which masked positions of a block are unmasked at a step: 'confidence' (the `tokens_per_step` "
            "most probable ones) or 'threshold' (all above `confidence_threshold`, at least one).",
            "choices": list(STRATEGIES),
        },
    )
    tokens_per_step: int = field(
        default=1, metadata={"help": "Positions unmasked at a step by decoding_strategy='confidence'."}
    )
    confidence_threshold: float = field(
        default=0.9, metadata={"help": "Probability above which decoding_strategy='threshold' unmasks a position."}
    )
    steps_per_block: int | None = field(
        default=None,
        metadata={
            "help": "Number of steps over which decoding_strategy='confidence' spreads a block, instead of "
            "`tokens_per_step`."
        },
    )
    step_schedule: str = field(
        default="even",
        metadata={
            "help": "How `steps_per_block` spreads a block: 'even' (LLaDA) or 'linear' (Dream).",
            "choices": list(SCHEDULES),
        },
    )
    sub_block_size: int | None = field(
        default=None,
        metadata={
            "help": "Unmask the parts of a block of this many positions one after another, from left to right "
            "(Fast-dLLM v2)."
        },
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Responses that a process decodes at once. All of them if not set."}
    )

    # Parameters that control the estimator
    step_distribution: str = field(
        default="uniform",
        metadata={
            "help": "How the scored step of a block is drawn: 'uniform' over its steps, or 'token' for proportional to "
            "the number of tokens a step unmasked.",
            "choices": ["uniform", "token"],
        },
    )
    num_step_draws: int = field(
        default=1,
        metadata={
            "help": "Steps drawn per block. More draws shrink the variance of the estimate and lengthen the packed "
            "sequence."
        },
    )
    weighting: str = field(
        default="unbiased",
        metadata={
            "help": "'unbiased' weighs a drawn step by the inverse of its probability; 'none' gives all the same "
            "weight.",
            "choices": ["unbiased", "none"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        refused = self.refused()
        if refused:
            reasons = "\n".join(f"- `{name}`: {why}" for name, why in refused.items())
            raise ValueError(f"These options of GRPOConfig cannot be used with a diffusion policy:\n{reasons}")
        if self.max_completion_length is None:
            raise ValueError("`max_completion_length` is needed: it is the length of the canvas.")
        if not isinstance(self.diffusion_spec, dict | None):
            raise ValueError(f"`diffusion_spec` must be a mapping or a JSON object, got {self.diffusion_spec!r}.")
        if self.weighting == "none" and self.loss_type in ("dr_grpo", "luspo"):
            raise ValueError(
                f"`loss_type={self.loss_type!r}` divides by a constant, so with `weighting='none'` its size would depend "
                "on the number of steps. Use `weighting='unbiased'`."
            )
        if self.num_step_draws < 1:
            raise ValueError(f"`num_step_draws` must be at least 1, got {self.num_step_draws}.")
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise ValueError(f"`rollout_batch_size` must be at least 1, got {self.rollout_batch_size}.")
        for name in ("step_distribution", "weighting"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        self.decoding()  # checks the decoding settings

    def decoding(self, temperature: float | None = None) -> DecodingConfig:
        """Settings of the denoising loop; `temperature` replaces the one that rollouts are sampled with."""
        return DecodingConfig(
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature if temperature is None else temperature,
            strategy=self.decoding_strategy,
            tokens_per_step=self.tokens_per_step,
            threshold=self.confidence_threshold,
            steps_per_block=self.steps_per_block,
            schedule=self.step_schedule,
            sub_block_size=self.sub_block_size,
        )

    def refused(self) -> dict[str, str]:
        """Options that are set although they mean nothing for a diffusion policy, each with the reason."""
        no_engine = "it generates from left to right; a diffusion policy is denoised by this library's own decoder"
        no_transform = "the distribution that is sampled from would not be the one that is scored"
        no_entropy = "entropies are a metric of the scored tokens here, without a gradient"
        reasons = {
            "use_vllm": (False, no_engine),
            "use_transformers_continuous_batching": (False, no_engine),
            "use_transformers_paged": (False, no_engine),
            "cache_implementation": (None, "finished blocks are kept in a cache of this library's own"),
            "generation_kwargs": (None, no_engine),
            "top_p": (1.0, no_transform),
            "top_k": (0, no_transform),
            "min_p": (None, no_transform),
            "repetition_penalty": (1.0, no_transform),
            "cast_lm_head_to_fp32": (False, "log-probabilities are computed in float32 already"),
            "use_liger_kernel": (False, "its fused loss is causal"),
            "top_entropy_quantile": (1.0, no_entropy),
            "entropy_coef": (0.0, no_entropy),
            "use_adaptive_entropy": (False, no_entropy),
            "off_policy_mask_threshold": (
                None,
                "it averages over all tokens, of which only the scored ones are known",
            ),
        }
        found = {}
        for name, (neutral, why) in reasons.items():
            if name in type(self).__dataclass_fields__ and getattr(self, name) not in (neutral, None):
                found[name] = f"{why} (got {getattr(self, name)!r}, leave it at {neutral!r})"
        if self.temperature <= 0:
            found["temperature"] = f"rollouts are sampled, so it must be positive (got {self.temperature!r})"
        if self.loss_type == "vespo":
            found["loss_type"] = "'vespo' needs the ratio of whole sequences, of which one step per block is scored"
        return found
