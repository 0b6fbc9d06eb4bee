"""Sets up a trainer: checks its arguments before weights are loaded, and prepares the policies afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..decoding.decode import check_prompts, check_settings
from ..fields import check_kind
from ..offline.preferences import is_preference_dataset
from ..policies.attention import enable_plans
from ..policies.files import check_one_policy, check_weights
from ..policies.forward import check_attention, unwrap
from ..policies.limits import check_layers
from ..policies.loading import config_of, resolve_spec, tokenizer_of
from ..policies.lora import check_adapter, check_adapters, check_targets, empty_model
from ..policies.prompts import TemplateRefusal, check_form, check_visible, tokenize_prompts
from ..policies.quantized import prepare_rounded
from ..policies.spec import set_spec
from ..policies.training import (
    DROPS,
    check_trainable,
    gather_experts_at_once,
    random_settings,
    switch_off_dropout,
    switch_off_router_loss,
    train_padding_token,
)
from ..rewards.call import check_reward_model, failing_together
from ..scoring.estimators import check_estimator
from ..trajectories.dataset import is_trajectory_dataset
from .callbacks import RewardProgressCallback, replace_bar
from .checkpoints import checkpoints_in
from .checks import (
    check_answered,
    check_callback,
    check_columns,
    check_number_of_rows,
    check_one_device,
    check_one_gpu,
    check_order_is_asked_for,
    check_reference_can_move,
    check_removed_columns,
    named_datasets,
)
from .config import DTRPOConfig
from .data import OfflineData, stored_columns


if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..policies.spec import DiffusionSpec
    from .trainer import DTRPOTrainer


logger = get_logger(__name__)

Model = str | PreTrainedModel | PeftModel
# Arguments of TRL's trainer that serve responses of several turns. Responses here have one turn.
_ONE_TURN = ("tools", "rollout_func", "environment_factory")


@dataclass(frozen=True)
class Setup:
    """
    The arguments of a trainer, checked and completed.

    Attributes:
        args ([`DTRPOConfig`]): settings.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        spec ([`DiffusionSpec`]): facts about the policy.
        reward_funcs: the reward functions or models that score responses.
        datasets (`tuple`): the training dataset and the evaluation dataset(s).
        store ([`~trainer.data.OfflineData`], *optional*): the source of stored responses, if training uses them.
        kept_columns (`list[str]`): columns of stored responses that training reads.
        removed_columns (`list[str]`): columns that `remove_unused_columns=True` removes.
    """

    args: DTRPOConfig
    processing_class: PreTrainedTokenizerBase
    spec: DiffusionSpec
    reward_funcs: Any
    datasets: tuple[Any, Any]
    store: OfflineData | None
    kept_columns: list[str]
    removed_columns: list[str]

    @property
    def maker(self) -> str | None:
        """Fingerprint of the reference, if it generated the stored responses."""
        return None if self.store is None or not self.store.reference_is_recorded else self.store.fingerprint


def set_up(
    model: Model, reward_funcs: Any, args: DTRPOConfig | None, datasets: tuple[Any, Any], tokenizer: Any, options: dict
) -> Setup:
    """
    Checks the arguments of a [`DTRPOTrainer`] before weights are loaded.

    Args:
        model, reward_funcs, args: as for the trainer.
        datasets (`tuple`): the training dataset and the evaluation dataset(s).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer.
        options (`dict`): the trainer's other arguments, by name.

    Raises:
        TypeError, ValueError: see [`DTRPOTrainer`].
    """
    args = _settings(model, args, options)
    _check_kinds(reward_funcs, tokenizer)
    offline = is_trajectory_dataset(datasets[0]) or is_preference_dataset(datasets[0])
    if not reward_funcs and not offline:
        raise ValueError("No reward source provided: pass at least one reward function as `reward_funcs`.")
    for name, dataset in named_datasets(*datasets):
        check_columns(name, dataset)
        if not offline:
            check_answered(name, dataset)
    check_order_is_asked_for(args, [dataset for _, dataset in named_datasets(*datasets)])
    check_one_gpu(args)
    for callback in options.get("callbacks") or ():
        check_callback(callback)
    config = config_of(model, args.model_options())
    if isinstance(model, str):
        check_weights(model)
    processing_class = tokenizer_of(model, args.model_options()) if tokenizer is None else tokenizer
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    spec = resolve_spec(config, args.spec_overrides(), tokenizer)
    check_settings(args.decoding(), spec, config.get_text_config().vocab_size)
    check_estimator(args.scoring(), spec)
    _check_model(model, config, args, options.get("peft_config"))
    for directory in (args.output_dir, *checkpoints_in(str(args.output_dir))):  # it saves its own to the same places
        check_one_policy(str(directory), isinstance(model, PeftModel) or options.get("peft_config") is not None)

    store = None
    if offline:
        if args.rescore_old_log_probs:
            raise ValueError(
                "`rescore_old_log_probs=True` needs fresh responses, but train_dataset holds stored ones, which "
                "another policy may have generated. Set `rescore_old_log_probs=False`."
            )
        store = OfflineData(model, config, args, spec, tokenizer, reward_funcs, options.get("quantization_config"))
        datasets = store.prepare(*datasets)
        reward_funcs = reward_funcs or store.reward_funcs
    elif args.precompute_ref_log_probs:
        raise ValueError(
            "`precompute_ref_log_probs=True` needs stored responses, but these are generated during training. "
            "Set `precompute_ref_log_probs=False`."
        )
    check_number_of_rows(datasets[0], args, 0 if store is None else store.dropped.total())
    named = named_datasets(*datasets)
    kept = stored_columns(dataset for _, dataset in named)
    removed = check_removed_columns(named, reward_funcs, ["prompt", *kept], args)
    setup = Setup(args, processing_class, spec, reward_funcs, datasets, store, kept, removed)
    _check_reference(model, setup, options.get("peft_config"))
    return setup


def _settings(model: Model, args: DTRPOConfig | None, options: dict[str, Any]) -> DTRPOConfig:
    """Checks the settings. Without settings, makes default ones, with an output directory named after the model."""
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a path, a hub id or a model, got {type(model).__name__}.")
    for name in _ONE_TURN:
        if options.get(name):
            raise ValueError(
                f"`{name}` is not supported: a diffusion policy denoises its response in one turn. Leave it out."
            )
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        args = DTRPOConfig(f"{name.rstrip('/').split('/')[-1]}-DTRPO")
    if not isinstance(args, DTRPOConfig):
        raise TypeError(f"`args` must be a DTRPOConfig, got {type(args).__name__}.")
    return args


def _check_kinds(reward_funcs: Any, tokenizer: Any) -> None:
    """Checks that reward functions and tokenizer are such, and that there are reward models where paths lead."""
    for reward in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        if isinstance(reward, str):
            check_reward_model(reward)
        elif reward is not None and not callable(reward):
            what = "a function, a reward model, its path, or a list of these"
            raise TypeError(f"`reward_funcs` must be {what}, got {reward!r:.80} ({type(reward).__name__}).")
    if tokenizer is not None:
        check_kind("processing_class", tokenizer, PreTrainedTokenizerBase | ProcessorMixin, "a tokenizer")


def _check_model(model: Model, config: PretrainedConfig, args: DTRPOConfig, adapter: Any) -> None:
    """Checks that the layers and the adapters of the model are supported, and that its reference can move if asked."""
    check_reference_can_move(args, has_adapter=isinstance(model, PeftModel) or adapter is not None)
    if adapter is not None:
        check_adapter(adapter)
        check_targets(empty_model(config) if isinstance(model, str) else model, adapter)
    if not isinstance(model, str):
        check_adapters(model)
    check_layers(config)


def _check_reference(model: Model, setup: Setup, adapter: Any) -> None:
    """Checks that a reference exists if the settings need one."""
    if setup.args.beta == 0.0 or setup.maker is not None or adapter is not None:
        return
    if isinstance(model, PreTrainedModel) and not model.config._name_or_path:
        raise ValueError(
            f"`beta={setup.args.beta}` needs a reference, which is loaded from the policy's path, but this model was "
            "not loaded from anywhere. Save it and pass the path as `model`, or set `beta=0`."
        )


# ----------------------------------------------------------------------------------------- after weights are loaded


def make_ready(trainer: DTRPOTrainer, setup: Setup, optimizer: Optimizer | None) -> None:
    """
    Prepares the policy of a trainer for training, prepares policy and reference for scoring, and checks the prompts.

    Args:
        trainer ([`DTRPOTrainer`]): the trainer, after TRL's constructor has run.
        setup ([`Setup`]): the trainer's arguments, checked and completed.
        optimizer (`torch.optim.Optimizer`, *optional*): the optimizer, if the caller passed one.

    Raises:
        ValueError: if the policy cannot be trained, if it gives other results in packed rows than in plain rows, or if
            the policy cannot take a prompt.
    """
    _check_placement(trainer)
    _share_failures(trainer)
    replace_bar(trainer, RewardProgressCallback)
    policies = [policy for policy in (trainer.model, trainer.ref_model) if policy is not None]
    for policy in policies:
        prepare_rounded(policy)
    _check_policies(trainer, optimizer)
    planned = [enable_plans(unwrap(policy)) for policy in policies]
    trainer._share_prompts = setup.args.share_prompts and setup.spec.attention == "block" and all(planned)
    for policy in policies:  # unwrapped, because a DeepSpeed engine has another `config`
        set_spec(unwrap(policy).config, setup.spec)
    # TRL counts a response as terminated if it ends in one of these tokens. Before TRL 1.16 it knew only the
    # end-of-text token of the tokenizer.
    trainer.eos_token_ids = list(setup.spec.stop_token_ids)
    if trainer._tokenizer.eos_token_id not in setup.spec.stop_token_ids:
        logger.warning(
            f"The policy's stop tokens are {list(setup.spec.stop_token_ids)}, but the tokenizer's end-of-text token "
            f"is {trainer._tokenizer.eos_token_id}. `clipped_ratio` and `mask_truncated_completions` may count "
            "finished responses as truncated."
        )
    logger.info(f"Diffusion policy: {setup.spec}")
    for name, dataset in named_datasets(*setup.datasets):
        _check_prompts(trainer, name, dataset)
    if setup.removed_columns:
        logger.warning(
            f"`remove_unused_columns=True` removes the columns {setup.removed_columns}. A reward function that takes "
            "`**kwargs` does not get them. Set `remove_unused_columns=False` to keep them."
        )
    if setup.store is not None:
        setup.store.report()


def _check_placement(trainer: DTRPOTrainer) -> None:
    """Checks that the policy can decode where it is: whole on one device, or sharded by an engine that can decode."""
    check_attention(trainer.model)
    if trainer._tokenizer.pad_token_id is None:
        raise ValueError(
            "The tokenizer has neither a padding token nor an end-of-text token. Set `tokenizer.pad_token` to any "
            "token. The policy never sees padding."
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "FSDP version 1 cannot decode on sharded parameters. Set `fsdp_version: 2` in the config of accelerate "
            "(`trl-diffusion train --accelerate_config fsdp2`), or use DDP or DeepSpeed."
        )
    check_one_device(trainer.model)


def _share_failures(trainer: DTRPOTrainer) -> None:
    """Makes every process stop if a reward function fails on one process."""
    if trainer.accelerator.num_processes == 1:
        return
    trainer.reward_funcs = [
        func if isinstance(func, nn.Module) else failing_together(cast(Callable, func), name, trainer.accelerator)
        for func, name in zip(trainer.reward_funcs, trainer.reward_func_names, strict=True)
    ]


def _check_policies(trainer: DTRPOTrainer, optimizer: Optimizer | None) -> None:
    """
    Prepares policy and reference for scoring, and tries them on a few tokens.

    With FSDP and DeepSpeed the policies cannot run yet. They are then tried at the first forward pass.
    """
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    # Updates compare recorded log-probabilities with re-scored ones. Dropout would make them differ.
    dropout = random_settings(trainer.model, DROPS)
    if dropout:
        logger.warning(
            f"Dropout is switched off ({', '.join(f'{name}={value}' for name, value in dropout.items())}), because an "
            "update compares its log-probabilities with the ones that were recorded while decoding."
        )
    balance = switch_off_router_loss(trainer.model)
    trainer.aux_loss_enabled = False
    if balance:
        logger.warning(
            f"The load-balancing loss of the experts is off (the model's config has router_aux_loss_coef={balance}), "
            "because it would also count the noisy copies in a packed row. In a long run, check how evenly the "
            "experts are used."
        )
    for policy in (trainer.model, trainer.ref_model):
        if policy is not None:
            switch_off_dropout(policy)
            switch_off_router_loss(policy)
    train_padding_token(trainer.model)
    gather_experts_at_once(trainer.model)
    check_trainable(trainer.model, optimizer, run=whole)
    if whole:
        trainer.try_policy(trainer.model, training=True)
        if trainer.ref_model is not None:
            trainer.try_policy(trainer.ref_model)


def _check_prompts(trainer: DTRPOTrainer, name: str, dataset: Dataset | IterableDataset) -> None:
    """Checks before training that the policy can take all prompts. A stream is not checked here, but as it is read."""
    if not isinstance(dataset, IterableDataset):
        check_prompt_rows(
            name,
            dataset,
            trainer._tokenizer,
            trainer.spec,
            trainer.model.config,
            trainer.max_completion_length,
            cast(dict, trainer.chat_template_kwargs),
            lambda prompts: trainer._tokenize_prompts(prompts)[0],
        )


def check_prompt_rows(
    name: str,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec,
    config: PretrainedConfig,
    new_tokens: int,
    template: dict[str, Any],
    tokenize: Callable[[list], list[list[int]]] | None = None,
) -> list[int]:
    """
    Checks that a policy can take all prompts of a dataset.

    Args:
        name (`str`): what the dataset is called, for messages.
        dataset ([`~datasets.Dataset`]): rows with a `prompt`.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`~transformers.PretrainedConfig`]): its config.
        new_tokens (`int`): most tokens of a response.
        template (`dict`): variables of the chat template.
        tokenize (`Callable`, *optional*): makes token ids of prompts. Defaults to [`~policies.prompts.tokenize_prompts`].

    Returns:
        `list[int]`: the number of tokens of each prompt.

    Raises:
        ValueError: naming the dataset and the row, if the policy cannot take a prompt.
    """
    tokenize = tokenize or (lambda prompts: tokenize_prompts(tokenizer, prompts, **template))
    forms: set = set()
    lengths: list[int] = []
    for begin in range(0, len(dataset), 1000):
        prompts = dataset[begin : begin + 1000]["prompt"]
        for row, prompt in enumerate(prompts, start=begin):
            check_form(f"{name}: row {row}", prompt)
        try:
            prompt_ids = tokenize(prompts)
        except TemplateRefusal as error:
            raise ValueError(
                f"{name}: Prompt {begin + error.row}: {error.reason}. Use another chat template."
            ) from error
        if prompts and not any(prompt_ids):
            raise ValueError(
                f"{name}: the tokenizer turns every prompt into no tokens at all. transformers makes an empty "
                "tokenizer if the model's directory has none. Pass the right tokenizer as `processing_class`."
            )
        try:
            check_prompts(prompt_ids, spec, config, new_tokens, begin)
            check_visible(tokenizer, prompts, prompt_ids, begin, forms, **template)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        lengths += map(len, prompt_ids)
    return lengths
