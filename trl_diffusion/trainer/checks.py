"""What can be known to be wrong before the weights are loaded: options out of their range, and too few rows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from numbers import Integral
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from torch import nn
from trl import LogCompletionsCallback, WeaveCallback

from ..fields import check_within, is_number
from ..objectives.pairwise import LOSSES, NEED_REFERENCE, NORMALIZED, SMOOTHED
from ..offline.preferences import is_preference_dataset


if TYPE_CHECKING:
    from .config import DTRPOConfig


# Whole numbers, each with the least that it may be.
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
# Other numbers, each with its interval; a round bracket leaves the end out.
_INTERVALS = {
    "learning_rate": "[0, inf)",
    "weight_decay": "[0, inf)",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "[0, inf)",
    "max_grad_norm": "[0, inf]",  # 0 does not clip
    "warmup_steps": "[0, inf)",
    "warmup_ratio": "[0, 1]",
    "temperature": "(0, inf)",
    "beta": "[0, inf)",
    "epsilon": "[0, inf)",
    "epsilon_high": "[0, inf)",
    "delta": "(1, inf)",  # a ratio starts at 1: clipped from there on, it has no gradient
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
# Options that only some losses look at.
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
    Checks the options that count something, before anything is divided by them.

    Raises:
        ValueError: naming the option, if it is no whole number or too small.
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
    Checks the options that are numbers but count nothing, and how the rewards are weighed.

    Raises:
        ValueError: naming the option, if its value is no number, is outside its interval, or would not be looked at.
    """
    intervals = dict(_INTERVALS)
    if args.max_steps == -1:
        intervals["num_train_epochs"] = "(0, inf)"
    if args.loss_type == "cispo":  # ratios are cut off at this one
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
    Checks those of some options of a run that are numbers, without making its config. They may be text, as on a command line.

    Args:
        options (`Mapping[str, Any]`): options by name; `None` is left open.

    Raises:
        ValueError: naming the option, if its value is no number, or out of its range.
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
    Checks that the loss looks at the options that were set.

    Raises:
        ValueError: naming the option, if it does not.
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
    Checks the losses of `loss_type="dpo"`, their weights, and that they look at the options that were set.

    Raises:
        ValueError: naming the option.
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
    """Prompts that a rollout takes, on all processes together."""
    assert args.generation_batch_size is not None and args.num_generations is not None  # TRL has computed the first
    return args.generation_batch_size // args.num_generations


def named_datasets(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    """The datasets that there are, each with what messages call it."""
    named = [("train_dataset", train_dataset)]
    if isinstance(eval_dataset, dict):
        named += [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    elif eval_dataset is not None:
        named.append(("eval_dataset", eval_dataset))
    return named


def check_columns(name: str, dataset: Any) -> None:
    """
    Checks that a dataset can be one of prompts.

    Raises:
        TypeError: if it is no dataset.
        ValueError: if it is not there, empty, without prompts, or has columns that a reward function cannot get.
    """
    if dataset is None:
        raise ValueError(f"`{name}` is required.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a Dataset or an IterableDataset, got {type(dataset).__name__}.")
    columns = dataset.column_names
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    if columns is None:  # a stream that does not know its columns
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


def check_number_of_rows(dataset: Dataset | IterableDataset, args: DTRPOConfig, dropped: int = 0) -> None:
    """
    Checks that the rows to train on are enough for one rollout. A stream does not know how many it has.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): the rows.
        args ([`DTRPOConfig`]): settings of the trainer.
        dropped (`int`, *optional*, defaults to `0`): groups that were dropped before, for the message.

    Raises:
        ValueError: if they are fewer; no optimizer step would be made.
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
    Checks that training made a step.

    Raises:
        ValueError: if a stream ended before its first rollout.
    """
    if steps == 0 and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"No step was made: the stream of train_dataset ended early, for {_what_a_rollout_takes(args)}"
        )


def check_callback(callback: Any) -> None:
    """
    Checks that a callback does not let the policy write from left to right.

    Args:
        callback ([`~transformers.TrainerCallback`] or its class): the callback.

    Raises:
        ValueError: for one of TRL's that calls the model's own `generate`.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    if issubclass(kind, LogCompletionsCallback | WeaveCallback):
        raise ValueError(
            f"{kind.__name__} calls the model's own `generate`, which writes from left to right: a diffusion policy gives "
            "nonsense then. Set `log_completions=True` for the responses of rollouts and evaluations, or add a `MetricCallback`."
        )


def check_one_gpu(args: DTRPOConfig) -> None:
    """
    Checks that this process has one GPU at most.

    Raises:
        ValueError: if it sees several, among which transformers would split the rows of each batch, whatever is in them.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, and transformers would split each batch among them (`nn.DataParallel`), "
            "which packed rows and their attention do not survive. Start with `accelerate launch`, which gives each process "
            "one GPU, or set CUDA_VISIBLE_DEVICES=0 for one of them."
        )


def check_reference_can_move(args: DTRPOConfig, has_adapter: bool) -> None:
    """
    Checks that there is a reference that `sync_ref_model` can move.

    Raises:
        ValueError: if an adapter is trained; its reference is the model below it, which stays.
    """
    if args.sync_ref_model and has_adapter:
        raise ValueError(
            "`sync_ref_model=True` moves a reference that is a model of its own; that of an adapter is the model below it. "
            "Set `sync_ref_model=False`."
        )


def check_order_is_asked_for(args: DTRPOConfig, datasets: list[Any]) -> None:
    """
    Checks that `decoding_order`, if it is set, is looked at.

    Raises:
        ValueError: if no dataset holds preference pairs.
    """
    if args.decoding_order != "random" and not any(map(is_preference_dataset, datasets)):
        raise ValueError(
            f"`decoding_order={args.decoding_order!r}` is for datasets of preference pairs (`chosen`, `rejected`), of which "
            "there is none here; leave it at 'random'."
        )


def check_removed_columns(
    datasets: list[tuple[str, Any]], reward_funcs: Any, kept: list[str], args: DTRPOConfig
) -> list[str]:
    """
    With `remove_unused_columns=True`, checks that no reward function asks for a column that is removed.

    Args:
        datasets (`list[tuple[str, Dataset]]`): the datasets, each with what it is called.
        reward_funcs: one reward function or several.
        kept (`list[str]`): columns that are not removed.
        args ([`DTRPOConfig`]): settings of the trainer.

    Returns:
        `list[str]`: columns that are removed; a reward function that takes them as `**kwargs` does not get them.

    Raises:
        ValueError: naming the function and its columns.
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
    except (TypeError, ValueError):  # of a built-in
        return []
