"""Configuration of [`DTRPOTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from trl import GRPOConfig

from ..decoding.config import DecodingConfig, RolloutSettings
from ..fields import AtLeast, check_fields, check_one_of
from ..names import knows_names
from ..objectives.pairwise import PairwiseConfig
from ..offline.orders import ORDERS
from ..policies.prompts import read_chat_template_kwargs
from ..scoring.draws import STEP_DISTRIBUTIONS, StepDistribution
from ..scoring.estimators import ESTIMATORS, EstimatorConfig
from .checks import check_looked_at, check_numbers, check_pairwise_losses, check_whole_numbers
from .options import NO_REMOTE_CODE, PolicyOptions, settle


LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo", "dpo")

_NO_ENGINE = "they generate from left to right. This library's own decoder denoises a diffusion policy"
_NO_TRUNCATION = (
    "tokens would be scored under another distribution than they were sampled from: the kept tokens are not recorded"
)
_NO_DROPOUT = "log-probabilities recorded while decoding are compared with those of an update, and both must come from the same network"
# Options of GRPOConfig that do not apply to a diffusion policy, and why. Options that begin with `vllm_` do not apply either.
_REFUSED = {
    "use_vllm": _NO_ENGINE,
    "use_transformers_continuous_batching": _NO_ENGINE,
    "transformers_continuous_batching_config": _NO_ENGINE,
    "use_transformers_paged": _NO_ENGINE,
    "generation_kwargs": _NO_ENGINE,
    "cache_implementation": "finished blocks are kept in a cache of this library's own",
    "top_p": _NO_TRUNCATION,
    "top_k": _NO_TRUNCATION,
    "min_p": _NO_TRUNCATION,
    "repetition_penalty": "the distribution that tokens are sampled from would differ from the distribution that is scored",
    "max_tool_calling_iterations": "responses are denoised in one turn, without tools",
    "trust_remote_code": NO_REMOTE_CODE,
    "disable_dropout": _NO_DROPOUT,
    "use_liger_kernel": "its fused loss, which earlier versions of TRL used, is causal. Its layers are not tested here",
    "router_aux_loss_coef": "the load balance of the experts would also count the noisy copies in a packed row",
    "neftune_noise_alpha": "the policy that is scored would differ from the policy that was sampled from",
    "data_seed": "the order of the prompts is drawn from `seed`",
    "train_sampling_strategy": "TRL's own sampler is needed: it repeats each prompt for its group",
    "label_smoothing_factor": "there are no labels",
    "enable_jit_checkpoint": "it saves in the middle of an update, after which a run cannot be resumed exactly. `save_steps` says how "
    "often a checkpoint is written",
}


def is_refused(name: str) -> bool:
    """Whether an option of GRPOConfig does not apply to a diffusion policy."""
    return name in _REFUSED or name.startswith("vllm_")


_CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


@knows_names
@dataclass
class DTRPOConfig(PolicyOptions, RolloutSettings, GRPOConfig):
    r"""
    Configuration class for the [`DTRPOTrainer`].

    It has every parameter of [`~trl.GRPOConfig`], with the same meaning, and the ones below. Parameters of
    [`~trl.GRPOConfig`] that do not apply to a diffusion policy are refused (see [`DTRPOConfig.refused`]). `bf16` defaults
    to `True` on a GPU that computes in bfloat16, and to `False` elsewhere. `dataloader_pin_memory` is `False` without a GPU.

    Decoding has the settings of [`RolloutSettings`] (`strategy` by its name, `tokens_per_step`, `threshold`, ...), and TRL's
    `max_completion_length` and `temperature`.

    Parameters:
        > Parameters that control the policy

        diffusion_spec (`dict[str, Any]` or `str`, *optional*):
            Fields of [`DiffusionSpec`], as a mapping or a JSON string. They complete or override those in the model's config.
            A model whose config has no such fields becomes a policy with them.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether dropout is switched off, in the model and in an adapter. `False` is refused, because log-probabilities
            recorded while decoding are compared with those of an update.

        > Parameters that control decoding

        rollout_batch_size (`int`, *optional*):
            Number of responses that a process decodes at once. When one ends, the next one starts. `None`: all at once.

        > Parameters that control the estimator

        estimator (`str`, *optional*, defaults to `"dtrpo"`):
            Which states of a response an update scores: `"dtrpo"` (random decoding steps), `"exact"` (all of them),
            `"elbo"` (VRPO), `"mean_field"` (diffu-GRPO) or `"coupled"` (coupled-GRPO). See [`scoring.estimators`].
        num_draws (`int`, *optional*, defaults to `1`):
            Steps drawn per block (`"dtrpo"`; with full attention, per response), or random masks per response
            (`"elbo"`). More draws reduce the variance of the estimate and make the pass longer.
        step_distribution (`str`, *optional*, defaults to `"importance"`):
            How `"dtrpo"` draws the scored step of a block. `"importance"`: with a probability nearly proportional to the
            surprise of its tokens (the sum of `1 - p`, with the recorded probabilities `p`). This makes the estimate far
            less noisy. `"uniform"`: with the same probability for all steps. `"token"`: with a probability proportional to
            the number of tokens that the step unmasked. Without recorded log-probabilities, `"importance"` equals
            `"uniform"`.
        weighting (`str`, *optional*, defaults to `"unbiased"`):
            `"unbiased"`: the weight of a drawn step is one divided by its probability. `"none"`: all weights are equal.
        num_scored_blocks (`int`, *optional*):
            Number of blocks of a response that `"dtrpo"` scores, drawn at random and weighted. All if `None`.
        prompt_mask_probability (`float`, *optional*, defaults to `0.15`):
            Probability with which `"mean_field"` masks a prompt token.
        rescore_old_log_probs (`bool`, *optional*, defaults to `False`):
            Whether the policy scores its fresh responses again for the old log-probabilities, as the update does, instead of
            using those recorded while decoding. If a rollout is used for one optimizer step only, this needs no additional
            forward pass. Otherwise each pass over the rollout needs one more. Use it if `diffusion/recorded_gap/...` is
            too large.
        share_prompts (`bool`, *optional*, defaults to `True`):
            Whether responses to the same prompt share the prompt's part of the pass. The numbers are the same. It needs block
            attention, `attn_implementation="sdpa"` or `"flex_attention"`, and a `per_device_train_batch_size` that is a
            multiple of `num_generations` (groups then stay together when rollouts are shuffled).
        estimator_check_steps (`int`, *optional*):
            Every this many optimizer steps, compute the exact log-ratio of a few trajectories to the reference (with `beta=0`,
            to the policy that decoded them). `diffusion/check/...` logs the bias, the standard deviation and the
            correlation of eight estimates of it. This needs additional forward passes at these steps.
        estimator_check_size (`int`, *optional*, defaults to `8`):
            Largest number of trajectories per process for this check.

        > Parameters that control training on stored responses and preferences

        decoding_order (`str`, *optional*, defaults to `"random"`):
            The order in which tokens are assumed to have been unmasked, `tokens_per_step` at a time: `"random"`,
            `"left_to_right"` or `"confidence"`. It applies to responses of a preference dataset, and to stored responses
            whose order is unknown. With `"confidence"`, the reference unmasks first the tokens that it is most confident
            about. It runs once, before training.
        pair_selection (`str`, *optional*, defaults to `"best_worst"`):
            Pairs that `loss_type="dpo"` forms in a group. `"best_worst"`: the best and the worst response. `"all"`: every
            pair of a better and a worse response. Responses without a reward, and masked ones
            (`mask_truncated_completions`), are in no pair. Two responses with the same tokens do not form a pair.
        dpo_loss_type (`list[str]`, *optional*, defaults to `["sigmoid", "sft"]`):
            Losses whose sum is the loss of a pair with `loss_type="dpo"`, with the names of [`~trl.DPOConfig`]: `"sigmoid"`
            (DPO), `"robust"` (DPO for data in which some pairs are in the wrong order), `"hinge"`, `"ipo"`, and `"sft"`.
            `"sft"` is the negative log-likelihood of the better response per token. It keeps the better response
            from becoming less likely together with the worse one.
        dpo_loss_weights (`list[float]`, *optional*):
            Weights of these losses, one for each. All are 1 if `None`.
        dpo_length_normalization (`bool`, *optional*, defaults to `False`):
            Whether `"sigmoid"`, `"robust"` and `"hinge"` divide the log-ratio of a response by the number of its tokens
            that count (`"ipo"` always does). `"sigmoid"` is then TRL's `"sigmoid_norm"`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            For `"robust"`: the probability that a pair is in the wrong order, below 0.5.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether the reference scores all stored responses before training, in exactly the states that training will draw,
            instead of at every step. The reference is then removed from memory, unless there is an evaluation dataset or
            `estimator_check_steps`. This does not work with a reference that changes (`sync_ref_model`).

        > Parameters that control logging

        log_trajectories (`int`, *optional*, defaults to `0`):
            Number of responses whose denoising is logged as a table: rewards, steps, log-probabilities and the order of their
            tokens. The table is written to `trajectories` in the output directory, and sent to the trackers of `report_to`,
            at every log and at every evaluation. Every evaluation also plots one response, if matplotlib is installed.

    `loss_type="dpo"` is the pairwise loss of dTRPO (docs/method.md, section 5). It needs `beta > 0`, unless `"sft"` is its
    only part.

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
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether dropout is switched off, in the model and in an adapter. False is refused, because "
            "log-probabilities recorded while decoding are compared with those of an update."
        },
    )

    # Parameters that control decoding
    rollout_batch_size: Annotated[int, AtLeast(1)] | None = field(
        default=None,
        metadata={
            "help": "Number of responses that a process decodes at once. When one ends, the next one starts. All at once if "
            "not set."
        },
    )

    # Parameters that control the estimator
    estimator: str = field(
        default="dtrpo",
        metadata={
            "help": "Which states of a response an update scores: 'dtrpo' (random decoding steps), 'exact' (all of "
            "them), 'elbo' (VRPO), 'mean_field' (diffu-GRPO) or 'coupled' (coupled-GRPO).",
            "choices": list(ESTIMATORS),
        },
    )
    num_draws: int = field(
        default=1,
        metadata={
            "help": "Steps drawn per block ('dtrpo'; with full attention, per response), or random masks per response "
            "('elbo'). More draws shrink the variance of the estimate and lengthen the pass."
        },
    )
    step_distribution: str = field(
        default="importance",
        metadata={
            "help": "How 'dtrpo' draws the scored step of a block. 'importance': with a probability nearly proportional to "
            "the surprise of its tokens, which makes the estimate far less noisy. 'uniform': with the same probability for "
            "all steps. 'token': with a probability proportional to the number of tokens that the step unmasked.",
            "choices": list(STEP_DISTRIBUTIONS),
        },
    )
    weighting: str = field(
        default="unbiased",
        metadata={
            "help": "'unbiased': the weight of a drawn step is one divided by its probability. 'none': all weights are "
            "equal.",
            "choices": ["unbiased", "none"],
        },
    )
    num_scored_blocks: int | None = field(
        default=None,
        metadata={"help": "Blocks of a response that 'dtrpo' scores, drawn at random and weighted. All if not set."},
    )
    prompt_mask_probability: float = field(
        default=0.15, metadata={"help": "Probability with which 'mean_field' masks a prompt token."}
    )
    rescore_old_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Whether the policy scores its fresh responses again for the old log-probabilities, instead of using "
            "those recorded while decoding."
        },
    )
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Whether responses to the same prompt share the prompt's part of the pass, where they can. The numbers "
            "are the same."
        },
    )
    estimator_check_steps: Annotated[int, AtLeast(1)] | None = field(
        default=None,
        metadata={
            "help": "Every this many optimizer steps, log how estimates compare with the exact log-ratio of a few "
            "trajectories."
        },
    )
    estimator_check_size: Annotated[int, AtLeast(1)] = field(
        default=8, metadata={"help": "Largest number of trajectories per process for this check."}
    )

    # Parameters that control training on stored responses and preferences
    decoding_order: str = field(
        default="random",
        metadata={
            "help": "The order in which tokens of a preference dataset, or of stored responses whose order is unknown, are "
            "assumed to have been unmasked, `tokens_per_step` at a time: 'random', 'left_to_right' or 'confidence' (the "
            "tokens that the reference is most confident about come first).",
            "choices": list(ORDERS),
        },
    )
    pair_selection: str = field(
        default="best_worst",
        metadata={
            "help": "Pairs that loss_type='dpo' forms in a group. 'best_worst': the best and the worst response. 'all': "
            "every pair of a better and a worse response.",
            "choices": ["best_worst", "all"],
        },
    )
    dpo_loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid", "sft"],
        metadata={
            "help": "Losses of a pair that loss_type='dpo' adds up: 'sigmoid', 'robust', 'hinge', 'ipo', and 'sft', the "
            "negative log-likelihood of the better response per token, which keeps it likely."
        },
    )
    dpo_loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the losses in `dpo_loss_type`, one for each. All 1 if not set."}
    )
    dpo_length_normalization: bool = field(
        default=False,
        metadata={
            "help": "Whether 'sigmoid', 'robust' and 'hinge' divide the log-ratio of a response by the number of its tokens "
            "that count ('ipo' always does)."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "For 'robust': the probability that a pair is in the wrong order, below 0.5."},
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Whether the reference scores all stored responses before training, in exactly the states that "
            "training will draw, instead of at every step."
        },
    )

    # Parameters that control logging
    log_trajectories: Annotated[int, AtLeast(0)] = field(
        default=0,
        metadata={
            "help": "Number of responses whose denoising is logged as a table, at every log and every evaluation. Every "
            "evaluation also plots one of them."
        },
    )

    if TYPE_CHECKING:
        output_dir: str = "trainer_output"  # the directory that transformers uses for `None`

    def __post_init__(self):
        settle(self)
        if self.max_completion_length is None:
            raise ValueError("`max_completion_length` is needed: it is the length of the canvas.")
        check_whole_numbers(self)
        super().__post_init__()
        check_numbers(self)
        self.check_refused(GRPOConfig)
        check_looked_at(self)
        # TRL would notice a wrong value only after the first rollout.
        for name, choices in _CHOICES.items():
            check_one_of(name, getattr(self, name), choices)
        check_fields(self, type(self).__dataclass_fields__.keys() - GRPOConfig.__dataclass_fields__.keys())
        if self.weighting == "none" and self.loss_type in ("dr_grpo", "luspo", "vespo"):
            raise ValueError(
                f"`loss_type={self.loss_type!r}` sums over the tokens of a response, so with `weighting='none'` the size of "
                "the loss would depend on the number of denoising steps. Use `weighting='unbiased'`."
            )
        self.scoring()  # checks the settings of the estimator
        if self.loss_type == "dpo":
            self._check_pairs()
        self._check_reference()
        if self.estimator_check_steps and self.beta == 0.0 and not ESTIMATORS[self.estimator].recorded:
            raise ValueError(
                f"`estimator_check_steps` with `estimator={self.estimator!r}` needs a reference to compare with: set `beta`."
            )
        self.check_rollout_settings()
        self.decoding()  # checks the decoding settings
        read_chat_template_kwargs(cast("dict[str, Any] | None", self.chat_template_kwargs))

    def _check_reference(self) -> None:
        """Checks that the options of the reference can be used together, and that the loss uses them."""
        for name in ("sync_ref_model", "precompute_ref_log_probs"):
            if getattr(self, name) and self.beta == 0.0:
                raise ValueError(f"`{name}=True` needs a reference: set `beta`, which is 0.")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model=True` updates the reference during training, but `precompute_ref_log_probs=True` runs it "
                "only once, before training. Set one of them to False."
            )

    def _check_pairs(self) -> None:
        check_pairwise_losses(self)
        sizes = {
            "per_device_train_batch_size": self.num_generations,
            "per_device_eval_batch_size": self.num_generations_eval or self.num_generations,
        }
        for name, group in sizes.items():
            if name == "per_device_eval_batch_size" and self.eval_strategy == "no":
                continue
            if getattr(self, name) % group:
                raise ValueError(
                    f"`loss_type='dpo'` compares responses of a group, so `{name}` must be a multiple of the group size, "
                    f"{group}, got {getattr(self, name)}."
                )

    def decoding(self, temperature: float | None = None) -> DecodingConfig:
        """Settings of the denoising loop. `temperature` replaces the temperature of the rollouts."""
        assert self.max_completion_length is not None  # as checked above
        return DecodingConfig(
            max_new_tokens=self.max_completion_length,
            temperature=self.temperature if temperature is None else temperature,
            **self.rollout_settings(),
        )

    def scoring(self) -> EstimatorConfig:
        """Settings of the estimator."""
        return EstimatorConfig(
            name=self.estimator,
            num_draws=self.num_draws,
            step_distribution=cast("StepDistribution", self.step_distribution),
            weighting=cast(Literal["unbiased", "none"], self.weighting),
            num_blocks=self.num_scored_blocks,
            prompt_mask_probability=self.prompt_mask_probability,
            selection=self.decoding().selection,
        )

    def pairwise(self) -> PairwiseConfig:
        """Settings of the pairwise loss."""
        weights = self.dpo_loss_weights or [1.0] * len(self.dpo_loss_type)
        return PairwiseConfig(
            losses=dict(zip(self.dpo_loss_type, weights, strict=True)),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            length_normalization=self.dpo_length_normalization,
        )

    def refused(self) -> dict[str, str]:
        """Options that are set although they do not apply to a diffusion policy, each with the reason."""
        engines = {name: _NO_ENGINE for name in type(self).__dataclass_fields__ if name.startswith("vllm_")}
        found = self.set_in_spite_of({**_REFUSED, **engines})
        if self.loss_type not in LOSS_TYPES:
            found["loss_type"] = f"{self.loss_type!r} is not known; there are {list(LOSS_TYPES)}"
        return found
