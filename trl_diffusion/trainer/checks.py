"""Checks before the weights are loaded: options that are out of range, too few rows, unusable columns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from numbers import Integral
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainingArguments
from trl import LogCompletionsCallback, WeaveCallback

from ..fields import check_within, is_number
from ..objectives.pairwise import LOSSES, NEED_REFERENCE, NORMALIZED, SMOOTHED
from ..offline.preferences import is_preference_dataset
from ..policies.forward import unwrap
from ..trajectories.dataset import has_unordered, is_trajectory_dataset


if TYPE_CHECKING:
    from .config import DTRPOConfig


# Whole numbers, each with its smallest value.
_WHOLE = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "num_generations_eval": 1,
    "generation_batch_size": 1,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "max_completion_length": 1,
    "pad_to_multiple_of": 1,
    "ref_model_sync_steps": 1,
    "seed": 0,
}
# Other numbers, each with its interval. A round bracket excludes the end.
_INTERVALS = {
    "learning_rate": "[0, inf)",
    "weight_decay": "[0, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, inf)",
    "max_grad_norm": "[0, inf]",  # 0 means no clipping
    "warmup_steps": "[0, inf)",
    "warmup_ratio": "[0, 1]",
    "temperature": "(0, inf)",
    "beta": "[0, inf)",
    "epsilon": "[0, inf)",
    "epsilon_high": "[0, inf)",
    "delta": "(1, inf)",  # a ratio starts at 1, so a bound of 1 would leave no gradient
    "sapo_temperature_neg": "(0, inf)",
    "sapo_temperature_pos": "(0, inf)",
    "vespo_k_pos": "[0, inf)",
    "vespo_k_neg": "[0, inf)",
    "vespo_lambda_pos": "[0, inf)",
    "vespo_lambda_neg": "[0, inf)",
    "top_entropy_quantile": "[0, 1]",
    "entropy_coef": "(-inf, inf)",
    "entropy_coef_min": "(-inf, inf)",
    "entropy_coef_max": "(-inf, inf)",
    "entropy_coef_delta": "[0, inf)",
    "entropy_target": "(-inf, inf)",
    "off_policy_mask_threshold": "(0, inf]",
    "ref_model_mixup_alpha": "(0, 1]",
    "label_smoothing": "[0, 0.5)",
}
_CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo")
_ENTROPY = ("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy")
_ADAPTIVE = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
# Options that only some losses use.
_LOOKED_AT_BY = {
    "epsilon": (*_CLIPPED, "cispo"),
    "epsilon_high": (*_CLIPPED, "cispo"),
    "delta": _CLIPPED,
    "sapo_temperature_neg": ("sapo",),
    "sapo_temperature_pos": ("sapo",),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), ("vespo",)),
    "importance_sampling_level": (*_CLIPPED, "cispo", "sapo"),
    "use_bias_correction_kl": (*_CLIPPED, "cispo", "sapo", "vespo"),
    **dict.fromkeys(_ENTROPY, (*_CLIPPED, "cispo", "sapo", "vespo")),
    "off_policy_mask_threshold": (*_CLIPPED, "cispo", "sapo", "vespo"),
    **dict.fromkeys(("pair_selection", "dpo_loss_type", "dpo_loss_weights", "label_smoothing"), ("dpo",)),
    "dpo_length_normalization": ("dpo",),
}


def check_whole_numbers(args: DTRPOConfig) -> None:
    """
    Checks the options that are whole numbers, before anything is divided by them.

    Raises:
        ValueError: with the option, if its value is not a whole number or is too small.
    """
    for name, least in _WHOLE.items():
        value = getattr(args, name)
        if _is_left_open(args, name) or (name == "pad_to_multiple_of" and isinstance(value, str)):
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    if not isinstance(args.max_steps, Integral) or isinstance(args.max_steps, bool) or args.max_steps < -1:
        raise ValueError(f"`max_steps` must be a whole number of at least 1, or -1, got {args.max_steps!r}.")
    if args.max_steps == 0:
        raise ValueError("`max_steps=0` trains nothing. Set it to 1 or more, or to -1 to go by `num_train_epochs`.")


def check_numbers(args: DTRPOConfig) -> None:
    """
    Checks the options that are other numbers, and the weights of the rewards.

    Raises:
        ValueError: with the option, if its value is not a number, is outside its interval, or would not be used.
    """
    intervals = dict(_INTERVALS)
    if args.max_steps == -1:
        intervals["num_train_epochs"] = "(0, inf)"
    if args.loss_type == "cispo":  # upper bound of the ratios
        intervals["epsilon" if args.epsilon_high is None else "epsilon_high"] = "(0, inf)"
    for kind in ("logging", "save"):
        if getattr(args, f"{kind}_strategy") == "steps":
            intervals[f"{kind}_steps"] = "(0, inf)"
    for name, interval in intervals.items():
        if name not in type(args).__dataclass_fields__ or _is_left_open(args, name):
            continue
        check_within(name, getattr(args, name), interval)
    weights = args.reward_weights
    if weights is not None:
        if not isinstance(weights, list | tuple) or not all(is_number(w) and math.isfinite(w) for w in weights):
            raise ValueError(f"`reward_weights` must be a list of finite numbers, got {weights!r}.")
        if not any(weights):
            raise ValueError(f"`reward_weights={weights!r}` leaves nothing of any reward: one of them must not be 0.")


def check_given(options: Mapping[str, Any]) -> None:
    """
    Checks options that are numbers before the config is made. Values may be text, as on a command line.

    Args:
        options (`Mapping[str, Any]`): options by name. `None` is not checked.

    Raises:
        ValueError: if a value is not a number or is out of its range. The message names the option.
    """
    for name in sorted({*_WHOLE, *_INTERVALS} & options.keys()):
        value = options[name]
        if value is None:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if name in _WHOLE and (number != number // 1 or number < _WHOLE[name]) and name != "pad_to_multiple_of":
            raise ValueError(f"`{name}` must be a whole number of at least {_WHOLE[name]}, got {value!r}.")
        if name in _INTERVALS:
            check_within(name, value if isinstance(value, bool) else number, _INTERVALS[name])


def check_looked_at(args: DTRPOConfig) -> None:
    """
    Checks that the loss uses the options that were set.

    Raises:
        ValueError: with the option that the loss does not use.
    """
    for name, losses in _LOOKED_AT_BY.items():
        default = _default(args, name)
        if args.loss_type not in losses and getattr(args, name) != default:
            raise ValueError(
                f"`{name}` is for `loss_type` {' or '.join(map(repr, losses))}, not for {args.loss_type!r}; leave it at "
                f"{default!r}."
            )
    for name in _ADAPTIVE:
        default = type(args).__dataclass_fields__[name].default
        if not args.use_adaptive_entropy and getattr(args, name) != default:
            raise ValueError(f"`{name}` is for `use_adaptive_entropy=True`; leave it at {default!r}.")


def check_pairwise_losses(args: DTRPOConfig) -> None:
    """
    Checks the losses of `loss_type="dpo"`, their weights, and that they use the options that were set.

    Raises:
        ValueError: with the option.
    """
    names, weights = args.dpo_loss_type, args.dpo_loss_weights
    if not isinstance(names, list) or not names or not set(map(str, names)) <= set(LOSSES):
        raise ValueError(f"`dpo_loss_type` must be a list of names among {list(LOSSES)}, got {names!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"`dpo_loss_type={names!r}` names a loss twice; set its weight with `dpo_loss_weights`.")
    if weights is not None:
        good = isinstance(weights, list) and all(is_number(w) and 0 <= w < math.inf for w in weights)
        if not good or len(weights) != len(names) or not any(weights):
            raise ValueError(
                f"`dpo_loss_weights` must be a list of {len(names)} numbers of at least 0, not all of them 0, one for each of "
                f"{names}, got {weights!r}."
            )
    for name, losses in (("label_smoothing", SMOOTHED), ("dpo_length_normalization", NORMALIZED)):
        default = _default(args, name)
        if not set(names) & set(losses) and getattr(args, name) != default:
            raise ValueError(
                f"`{name}` is for the losses {' and '.join(map(repr, losses))}, not for `dpo_loss_type={names!r}`; leave it at "
                f"{default!r}."
            )
    needs_reference = bool(set(names) & set(NEED_REFERENCE))
    if needs_reference and args.beta <= 0.0:
        raise ValueError(f"`loss_type='dpo'` needs a reference: set `beta` (0.1 is usual), got {args.beta}.")
    if not needs_reference and args.beta != 0.0:
        raise ValueError(f"`dpo_loss_type={names!r}` looks at no reference; leave `beta` at 0.0, got {args.beta}.")


def _default(args: DTRPOConfig, name: str) -> Any:
    option = type(args).__dataclass_fields__[name]
    return option.default if option.default_factory is MISSING else option.default_factory()


def _is_left_open(args: DTRPOConfig, name: str) -> bool:
    return getattr(args, name) is None and type(args).__dataclass_fields__[name].default is None


def prompts_per_rollout(args: DTRPOConfig) -> int:
    """Number of prompts of a rollout, on all processes together."""
    assert args.generation_batch_size is not None and args.num_generations is not None  # TRL has computed the first
    return args.generation_batch_size // args.num_generations


def named_datasets(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    """The datasets that were passed, each with its name for messages."""
    named = [("train_dataset", train_dataset)]
    if isinstance(eval_dataset, dict):
        named += [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    elif eval_dataset is not None:
        named.append(("eval_dataset", eval_dataset))
    return named


def check_columns(name: str, dataset: Any) -> None:
    """
    Checks that a dataset can be used as a dataset of prompts.

    Raises:
        TypeError: if it is not a dataset.
        ValueError: if it is missing, empty or without prompts, or has columns that cannot be passed to a reward function.
    """
    if dataset is None:
        raise ValueError(f"`{name}` is required.")
    if not isinstance(dataset, Dataset | IterableDataset):
        hint = " Make one with `datasets.Dataset.from_list`." if isinstance(dataset, list) else ""
        raise TypeError(f"`{name}` must be a Dataset or an IterableDataset, got {type(dataset).__name__}.{hint}")
    columns = dataset.column_names
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    if columns is None:  # a stream whose columns are not known
        return
    if is_preference_dataset(dataset):
        return
    if "prompt" not in columns:
        raise ValueError(f"`{name}` has no `prompt` column; it has {sorted(columns)}.")
    images = sorted({"image", "images"} & set(columns))
    if images:
        raise ValueError(f"`{name}` has {images}: diffusion policies here take text only. Remove these columns.")
    taken = sorted({"prompts", "completions", "trainer_state", "log_extra", "log_metric"} & set(columns))
    if taken:
        raise ValueError(
            f"`{name}` has {taken}: reward functions get something else under these names. Rename the columns."
        )


def check_answered(name: str, dataset: Any) -> None:
    """
    Checks that an evaluation dataset holds prompts that the policy can answer, where training does not use stored responses.

    Raises:
        ValueError: if it holds stored responses, or pairs without a column of prompts.
    """
    if is_trajectory_dataset(dataset):
        raise ValueError(
            f"{name} holds stored responses, whose rewards stay as they are while the policy learns, and train_dataset holds prompts. "
            "Evaluate on prompts, too."
        )
    columns = dataset.column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"{name} has no `prompt` column, as train_dataset has; it has {sorted(columns)}.")


def check_number_of_rows(dataset: Dataset | IterableDataset, args: DTRPOConfig, dropped: int = 0) -> None:
    """
    Checks that there are enough training rows for one rollout. The number of rows of a stream is not known.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): the rows.
        args ([`DTRPOConfig`]): settings of the trainer.
        dropped (`int`, *optional*, defaults to `0`): number of groups that were already dropped, for the message.

    Raises:
        ValueError: if there are too few rows, so that training would make no optimizer step.
    """
    wanted = prompts_per_rollout(args)
    if isinstance(dataset, Dataset) and len(dataset) < wanted:
        left = f" left ({dropped} have no pair)" if dropped else ""
        raise ValueError(f"train_dataset has {len(dataset)} rows{left}, but {_what_a_rollout_takes(args)}")


def _what_a_rollout_takes(args: DTRPOConfig) -> str:
    return (
        f"a rollout takes {prompts_per_rollout(args)} prompts (`per_device_train_batch_size` "
        f"{args.per_device_train_batch_size} x {args.world_size} processes x {args.steps_per_generation} batches / "
        f"`num_generations` {args.num_generations}): no step would be made. Lower the batch size, "
        "`gradient_accumulation_steps` or `steps_per_generation`, raise `num_generations`, or give more rows."
    )


def check_steps_made(steps: int, dataset: Dataset | IterableDataset, args: DTRPOConfig) -> None:
    """
    Checks that training made at least one step.

    Raises:
        ValueError: if a stream ended before its first rollout.
    """
    if steps == 0 and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"No step was made: the stream of train_dataset ended early, for {_what_a_rollout_takes(args)}"
        )


def check_callback(callback: Any) -> None:
    """
    Checks that a callback does not generate from left to right.

    Args:
        callback ([`~transformers.TrainerCallback`] or its class): the callback.

    Raises:
        ValueError: if it is a callback of TRL that calls the model's own `generate`.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    if issubclass(kind, LogCompletionsCallback | WeaveCallback):
        raise ValueError(
            f"{kind.__name__} calls the model's own `generate`, which writes from left to right: a diffusion policy gives "
            "nonsense then. Set `log_completions=True` for the responses of rollouts and evaluations, or add a `MetricCallback`."
        )


def check_one_gpu(args: TrainingArguments) -> None:
    """
    Checks that this process has at most one GPU.

    Raises:
        ValueError: if it sees several. transformers would split the rows of each batch among them.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, and transformers would split each batch among them (`nn.DataParallel`), "
            "which packed rows and their attention do not survive. Start with `accelerate launch`, which gives each process "
            "one GPU, or set CUDA_VISIBLE_DEVICES=0 for one of them."
        )


def check_one_device(model: nn.Module) -> None:
    """
    Checks that a model is not spread over several devices.

    Raises:
        ValueError: if it is. Its attention masks are on one device.
    """
    devices = set(getattr(unwrap(model), "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"The policy is spread over {len(devices)} devices ({', '.join(sorted(map(str, devices)))}), but its "
            "attention masks are on one device. Start with `accelerate launch`, which gives each process one GPU, or "
            "load the model with `device_map=None`. If the policy does not fit on one GPU, use ZeRO-3 or FSDP."
        )


def check_reference_can_move(args: DTRPOConfig, has_adapter: bool) -> None:
    """
    Checks that there is a reference that `sync_ref_model` can update.

    Raises:
        ValueError: if an adapter is trained. Its reference is the model below it, which does not change.
    """
    if args.sync_ref_model and has_adapter:
        raise ValueError(
            "`sync_ref_model=True` moves a reference that is a model of its own; that of an adapter is the model below it. "
            "Set `sync_ref_model=False`."
        )


def check_order_is_asked_for(args: DTRPOConfig, datasets: list[Any]) -> None:
    """
    Checks that `decoding_order`, if it is set, is used.

    Raises:
        ValueError: if no dataset holds preference pairs, or stored responses whose order is unknown.
    """
    if args.decoding_order != "random" and not any(
        is_preference_dataset(one) or has_unordered(one) for one in datasets
    ):
        raise ValueError(
            f"`decoding_order={args.decoding_order!r}` is for datasets of preference pairs (`chosen`, `rejected`), and for "
            "stored responses whose order is unknown, of which there is none here; leave it at 'random'."
        )


def check_removed_columns(
    datasets: list[tuple[str, Any]], reward_funcs: Any, kept: list[str], args: DTRPOConfig
) -> list[str]:
    """
    With `remove_unused_columns=True`, checks that no reward function needs a column that is removed.

    Args:
        datasets (`list[tuple[str, Dataset]]`): the datasets, each with its name.
        reward_funcs: one reward function or several.
        kept (`list[str]`): columns that are not removed.
        args ([`DTRPOConfig`]): settings of the trainer.

    Returns:
        `list[str]`: columns that are removed. A reward function with `**kwargs` does not get them.

    Raises:
        ValueError: with the function and its columns.
    """
    if not args.remove_unused_columns:
        return []
    functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    every: set[str] = set()
    for name, dataset in datasets:
        removed = set(dataset.column_names or ()) - set(kept)
        every |= removed
        for function in functions:
            if not callable(function) or isinstance(function, nn.Module):
                continue
            wanted = sorted(removed & set(_parameters(function)))
            if wanted:
                raise ValueError(
                    f"`remove_unused_columns=True` removes the columns {wanted} of {name}, which the reward function "
                    f"{getattr(function, '__name__', type(function).__name__)!r} asks for. Set it to False."
                )
    return sorted(every)


def _parameters(function: Callable) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a built-in function
        return []
