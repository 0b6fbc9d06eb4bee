"""What a trainer is made of: the arguments, checked before weights are loaded, and the policies, made ready afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..decoding.decode import check_prompts
from ..offline.preferences import is_preference_dataset
from ..policies.attention import enable_plans
from ..policies.forward import check_attention, unwrap
from ..policies.limits import check_layers
from ..policies.loading import load_config, load_tokenizer, resolve_spec
from ..policies.lora import check_adapter, check_adapters, check_targets, empty_model
from ..policies.prompts import check_visible
from ..policies.quantized import keep_trainable
from ..policies.spec import set_spec
from ..policies.training import (
    DROPS,
    check_trainable,
    random_settings,
    switch_off_dropout,
    switch_off_router_loss,
    train_padding_token,
)
from ..trajectories.dataset import is_trajectory_dataset
from .agreement import failing_together
from .checks import (
    check_columns,
    check_form,
    check_number_of_rows,
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
_ONE_TURN = ("tools", "rollout_func", "environment_factory")  # of TRL's trainer: responses of several turns


@dataclass(frozen=True)
class Setup:
    """
    What the arguments of a trainer come to.

    Attributes:
        args ([`DTRPOConfig`]): settings.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        spec ([`DiffusionSpec`]): facts about the policy.
        reward_funcs: what scores responses.
        datasets (`tuple`): those to train and to evaluate on.
        store ([`~trainer.data.OfflineData`], *optional*): where stored responses come from.
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
    def reference_is_recorded(self) -> bool:
        """Whether the reference made the stored responses."""
        return self.store is not None and self.store.reference_is_recorded


def set_up(
    model: Model, reward_funcs: Any, args: DTRPOConfig | None, datasets: tuple[Any, Any], tokenizer: Any, options: dict
) -> Setup:
    """
    Checks the arguments of a [`DTRPOTrainer`] before weights are loaded.

    Args:
        model, reward_funcs, args: as for the trainer.
        datasets (`tuple`): those to train and to evaluate on.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer.
        options (`dict`): the trainer's other arguments, by name.

    Raises:
        TypeError, ValueError: see [`DTRPOTrainer`].
    """
    args = _settings(model, args, options)
    offline = is_trajectory_dataset(datasets[0]) or is_preference_dataset(datasets[0])
    if not reward_funcs and not offline:
        raise ValueError("No reward source provided: pass at least one reward function as `reward_funcs`.")
    for name, dataset in named_datasets(*datasets):
        check_columns(name, dataset)
    check_order_is_asked_for(args, [dataset for _, dataset in named_datasets(*datasets)])
    check_one_gpu(args)
    config = _load_config(model, args)
    processing_class = _load_tokenizer(model) if tokenizer is None else tokenizer
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    spec = resolve_spec(config, args.spec_overrides(), tokenizer)
    _check_model(model, config, args, options.get("peft_config"))

    store = None
    if offline:
        if args.rescore_old_log_probs:
            raise ValueError(
                "`rescore_old_log_probs=True` is for fresh responses: another policy may have made stored ones."
            )
        store = OfflineData(model, config, args, spec, tokenizer, reward_funcs, options.get("quantization_config"))
        datasets = store.prepare(*datasets)
        reward_funcs = reward_funcs or store.reward_funcs
    elif args.precompute_ref_log_probs:
        raise ValueError("`precompute_ref_log_probs=True` is for stored responses; these are generated as it goes.")
    check_number_of_rows(datasets[0], args, 0 if store is None else store.dropped.total())
    named = named_datasets(*datasets)
    kept = stored_columns(dataset for _, dataset in named)
    removed = check_removed_columns(named, reward_funcs, ["prompt", *kept], args)
    setup = Setup(args, processing_class, spec, reward_funcs, datasets, store, kept, removed)
    _check_reference(model, setup, options.get("peft_config"))
    return setup


def _settings(model: Model, args: DTRPOConfig | None, options: dict[str, Any]) -> DTRPOConfig:
    """The settings, by default those of a directory that is called after the model."""
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a path, a hub id or a model, got {type(model).__name__}.")
    for name in _ONE_TURN:
        if options.get(name):
            raise ValueError(f"`{name}` is not supported: responses of a diffusion policy are denoised in one turn.")
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        args = DTRPOConfig(f"{name.rstrip('/').split('/')[-1]}-DTRPO")
    if not isinstance(args, DTRPOConfig):
        raise TypeError(f"`args` must be a DTRPOConfig, got {type(args).__name__}.")
    return args


def _check_model(model: Model, config: PretrainedConfig, args: DTRPOConfig, adapter: Any) -> None:
    """Checks the kinds of layers and of adapters."""
    check_reference_can_move(args, has_adapter=isinstance(model, PeftModel) or adapter is not None)
    if adapter is not None:
        check_adapter(adapter)
        check_targets(empty_model(config) if isinstance(model, str) else model, adapter)
    if not isinstance(model, str):
        check_adapters(model)
    check_layers(config)


def _check_reference(model: Model, setup: Setup, adapter: Any) -> None:
    """Checks that there is a reference, if one is needed."""
    if setup.args.beta == 0.0 or setup.reference_is_recorded or adapter is not None:
        return
    if isinstance(model, PreTrainedModel) and not model.config._name_or_path:
        raise ValueError(
            "`beta` is not 0, so a reference is needed, which is loaded from where the policy was; but this model "
            "was not loaded from anywhere. Save it and pass the path as `model`, or set `beta=0`."
        )


def _load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    path = model if isinstance(model, str) else model.config._name_or_path
    if not path:
        raise ValueError(
            "The model was not loaded from anywhere, so its tokenizer is unknown: pass `processing_class`."
        )
    return load_tokenizer(path)


def _load_config(model: Model, args: DTRPOConfig) -> PretrainedConfig:
    if not isinstance(model, str):
        return model.config
    known = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
    return load_config(model, **{key: value for key, value in args.model_options().items() if key in known})


# ----------------------------------------------------------------------------------------- after weights are loaded


def make_ready(trainer: DTRPOTrainer, setup: Setup, optimizer: Optimizer | None) -> None:
    """
    Makes policy and reference of a trainer ready to be trained and scored, and checks the prompts.

    Args:
        trainer ([`DTRPOTrainer`]): the trainer, after TRL's constructor.
        setup ([`Setup`]): what its arguments came to.
        optimizer (`torch.optim.Optimizer`, *optional*): the optimizer that was passed, if one was.

    Raises:
        ValueError: if the policy cannot be trained, computes something else in packed rows, or a prompt cannot be taken.
    """
    _check_placement(trainer)
    _share_failures(trainer)
    policies = [policy for policy in (trainer.model, trainer.ref_model) if policy is not None]
    for policy in policies:
        keep_trainable(policy)
    _check_policies(trainer, optimizer)
    planned = [enable_plans(unwrap(policy)) for policy in policies]
    trainer._share_prompts = setup.args.share_prompts and setup.spec.attention == "block" and all(planned)
    for policy in policies:  # an engine of DeepSpeed has a config of its own
        set_spec(unwrap(policy).config, setup.spec)
    # What ends a response here is what TRL calls terminated (before TRL 1.16 it knew the tokenizer's token only).
    trainer.eos_token_ids = list(setup.spec.stop_token_ids)
    if trainer._tokenizer.eos_token_id not in setup.spec.stop_token_ids:
        logger.warning(
            f"The policy stops at {list(setup.spec.stop_token_ids)}, the tokenizer's end-of-text token is "
            f"{trainer._tokenizer.eos_token_id}. `clipped_ratio` and `mask_truncated_completions` may take finished "
            "responses for truncated ones."
        )
    logger.info(f"Diffusion policy: {setup.spec}")
    for name, dataset in named_datasets(*setup.datasets):
        _check_prompts(trainer, name, dataset)
    if setup.removed_columns:
        logger.warning(
            f"`remove_unused_columns=True` removes the columns {setup.removed_columns}: a reward function that looks for "
            "them gets nothing."
        )
    if setup.store is not None:
        setup.store.report()


def _check_placement(trainer: DTRPOTrainer) -> None:
    """Checks where the policy is: on one device, or shared among processes in a way in which it can decode."""
    check_attention(trainer.model)
    if trainer._tokenizer.pad_token_id is None:
        raise ValueError(
            "The tokenizer has neither a padding token nor an end-of-text token. Set `tokenizer.pad_token`; which "
            "one does not matter, padding is never looked at."
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "FSDP version 1 cannot decode on sharded parameters. Set `fsdp_version: 2` in the config of accelerate "
            "(recipes/accelerate/fsdp2.yaml), or use DDP or DeepSpeed."
        )
    devices = set(getattr(unwrap(trainer.model), "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"The policy is spread over {len(devices)} devices ({', '.join(sorted(map(str, devices)))}): its attention "
            "masks are on one of them. Start with `accelerate launch`, which gives each process one GPU, or load the "
            "model with device_map=None. A policy that does not fit on one GPU trains with ZeRO-3 or FSDP."
        )


def _share_failures(trainer: DTRPOTrainer) -> None:
    """Lets every process stop if a reward function fails on one."""
    if trainer.accelerator.num_processes == 1:
        return
    trainer.reward_funcs = [
        func if isinstance(func, nn.Module) else failing_together(cast(Callable, func), name, trainer.accelerator)
        for func, name in zip(trainer.reward_funcs, trainer.reward_func_names, strict=True)
    ]


def _check_policies(trainer: DTRPOTrainer, optimizer: Optimizer | None) -> None:
    """
    Makes policy and reference ready to be scored, and tries them on a few tokens. Where parameters will be shared among
    processes, they cannot be used yet, and are tried at the first pass.
    """
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    # Recorded and re-scored log-probabilities are compared: no dropout between them.
    dropout = random_settings(trainer.model, DROPS)
    if dropout:
        logger.warning(
            f"Dropout is switched off ({', '.join(f'{name}={value}' for name, value in dropout.items())}): the log-"
            "probabilities that decoding records are compared with those that an update computes."
        )
    balance = switch_off_router_loss(trainer.model)
    trainer.aux_loss_enabled = False
    if balance:
        logger.warning(
            f"The load-balancing loss of the experts is off (the model's config has router_aux_loss_coef={balance}): it "
            "would count the copies of a packed row. In a long run, look at how evenly the experts are used."
        )
    for policy in (trainer.model, trainer.ref_model):
        if policy is not None:
            switch_off_dropout(policy)
            switch_off_router_loss(policy)
    train_padding_token(trainer.model)
    check_trainable(trainer.model, optimizer, run=whole)
    if whole:
        trainer.try_policy(trainer.model, training=True)
        if trainer.ref_model is not None:
            trainer.try_policy(trainer.ref_model)


def _check_prompts(trainer: DTRPOTrainer, name: str, dataset: Dataset | IterableDataset) -> None:
    """Finds prompts that the policy cannot take before anything is trained. A stream is checked as it comes."""
    if isinstance(dataset, IterableDataset):
        return
    forms: set = set()
    options = cast(dict, trainer.chat_template_kwargs)
    for begin in range(0, len(dataset), 1000):
        prompts = dataset[begin : begin + 1000]["prompt"]
        for row, prompt in enumerate(prompts, start=begin):
            check_form(f"{name}: row {row}", prompt)
        prompt_ids = trainer._tokenize_prompts(prompts)[0]
        if prompts and not any(prompt_ids):
            raise ValueError(
                f"{name}: the tokenizer turns every prompt into no tokens at all. If there is none beside the "
                "model, transformers makes an empty one: pass the right one as `processing_class`."
            )
        try:
            check_prompts(prompt_ids, trainer.spec, trainer.model.config, trainer.max_completion_length)
        except ValueError as error:
            raise ValueError(f"{name}, rows {begin} to {begin + len(prompts) - 1}: {error}") from error
        try:
            check_visible(trainer._tokenizer, prompts, prompt_ids, begin, forms, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
