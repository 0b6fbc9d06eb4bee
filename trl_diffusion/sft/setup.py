"""Checks the arguments of a [`DiffusionSFTTrainer`], prepares its policy, and checks its documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow.compute as pc
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..fields import check_kind
from ..policies.attention import enable_plans
from ..policies.files import check_one_policy, check_weights
from ..policies.forward import check_attention, check_implementation, unwrap
from ..policies.limits import check_layers, context_length
from ..policies.loading import config_of, resolve_spec, tokenizer_of, with_absent_tokens
from ..policies.lora import check_adapter, check_adapters, check_targets, empty_model
from ..policies.quantized import prepare_rounded
from ..policies.spec import DiffusionSpec, set_spec
from ..policies.training import (
    check_trainable,
    gather_experts_at_once,
    switch_off_router_loss,
    train_padding_token,
)
from ..policies.trial import try_policy
from ..trainer.checks import check_one_device, check_one_gpu, named_datasets
from .config import DiffusionSFTConfig
from .documents import IGNORED, DocumentCollator, documents_of


if TYPE_CHECKING:
    from .trainer import DiffusionSFTTrainer


logger = get_logger(__name__)

Model = str | PreTrainedModel | PeftModel
# Arguments of SFTTrainer that read logits of every position, or make rows of another kind.
_REFUSED = {
    "compute_loss_func": "the loss is that of masked tokens (`weighting`)",
    "compute_metrics": "only the logits of masked tokens are computed",
    "preprocess_logits_for_metrics": "only the logits of masked tokens are computed",
    "data_collator": "rows are cut into prompt and canvas by a collator of this library",
}


def set_up(
    model: Model,
    args: DiffusionSFTConfig | None,
    tokenizer: Any,
    datasets: list[tuple[str, Any]],
    options: dict[str, Any],
) -> tuple[DiffusionSFTConfig, DiffusionSpec, PreTrainedTokenizerBase]:
    """
    Checks the arguments of a trainer before weights are loaded, and completes them.

    Args:
        model, args: as for the trainer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer.
        datasets (`list[tuple[str, Dataset]]`): the datasets, each with its name.
        options (`dict`): the trainer's other arguments, by name.

    Raises:
        TypeError, ValueError: see [`DiffusionSFTTrainer`].
    """
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a path, a hub id or a model, got {type(model).__name__}.")
    for name, why in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"`{name}` cannot be used with a diffusion policy: {why}. Leave it out.")
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path or model.config.model_type
        args = DiffusionSFTConfig(f"{name.rstrip('/').split('/')[-1]}-SFT")
    if not isinstance(args, DiffusionSFTConfig):
        raise TypeError(f"`args` must be a DiffusionSFTConfig, got {type(args).__name__}.")
    check_one_gpu(args)
    check_rows(datasets, args, options.get("formatting_func"))
    adapter = options.get("peft_config")
    check_one_policy(str(args.output_dir), isinstance(model, PeftModel) or adapter is not None)
    config = config_of(model, args.model_options())
    if isinstance(model, str):
        implementation = args.model_options().get("attn_implementation")
        if implementation not in (None, "flex_attention"):
            check_implementation(implementation)
        check_weights(model)
    else:
        check_adapters(model)
    if tokenizer is None:
        tokenizer = tokenizer_of(model, args.model_options())
    check_kind("processing_class", tokenizer, PreTrainedTokenizerBase, "a tokenizer")
    check_end(tokenizer, args)
    spec = _spec(config, args, tokenizer)
    if adapter is not None:
        check_adapter(adapter)
        check_targets(empty_model(config) if isinstance(model, str) else model, adapter)
    check_layers(config)
    return args, spec, tokenizer


def _spec(config: PretrainedConfig, args: DiffusionSFTConfig, tokenizer: PreTrainedTokenizerBase) -> DiffusionSpec:
    """The spec of the policy. Raises a `ValueError` if arguments do not fit it."""
    spec = resolve_spec(config, args.spec_overrides(), tokenizer)
    if args.max_corruption:  # visible tokens are scored
        spec = spec.replace(predicts_visible_tokens=True)
    elif spec.predicts_visible_tokens:
        logger.warning(
            "The policy predicts visible tokens (`predicts_visible_tokens`), but this training does not train it to do so, so it "
            "may forget it. Set `weighting='mean'` and `max_corruption`, such as 0.1."
        )
    if args.canvas_length is not None and spec.attention != "full":
        raise ValueError(
            "`canvas_length` is for full attention; with block attention a policy sees no block after the one that it writes."
        )
    if args.block_sizes:
        if spec.attention != "block":
            raise ValueError(
                "`block_sizes` is for block attention; with full attention the whole canvas is one block."
            )
        if args.block_sizes[-1] != spec.block_size:
            raise ValueError(
                f"`block_sizes` must end with the block size of the policy, {spec.block_size}, got {args.block_sizes}."
            )
    return spec


def check_rows(datasets: list[tuple[str, Any]], args: DiffusionSFTConfig, formatting_func: Any = None) -> None:
    """
    Checks that every dataset has rows, and that it is clear which of their tokens are trained.

    Raises:
        TypeError: if a dataset is neither a `Dataset` nor an `IterableDataset`.
        ValueError: if a dataset is missing or empty, has no column to train on, or has a `completion_mask` that TRL would ignore.
    """
    for name, dataset in datasets:
        if dataset is None:
            raise ValueError(f"`{name}` is required.")
        check_kind(name, dataset, Dataset | IterableDataset, "a Dataset or an IterableDataset")
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"`{name}` is empty.")
        known = ["input_ids", "messages", "conversations", "completion", args.dataset_text_field]
        prepared = (cast(dict[str, Any], args.dataset_kwargs) or {}).get("skip_prepare_dataset", False)
        if not prepared and formatting_func is None and not first.keys() & {*known, "image", "images"}:
            raise ValueError(
                f"`{name}` has the columns {sorted(first)}, none of which holds tokens or text to train on. It needs one of {known}. "
                "If the rows are preferences, pass the chosen responses as `completion`."
            )
        if "completion_mask" in first and "labels" not in first and args.completion_only_loss is None:
            raise ValueError(
                f"`{name}` has a `completion_mask`. Set `completion_only_loss=True` to train on the tokens that it marks, or `False` "
                "to train on all tokens, which is TRL's default."
            )


def check_end(tokenizer: PreTrainedTokenizerBase, args: DiffusionSFTConfig) -> None:
    """
    Checks that there is an end-of-text token, which TRL puts at the end of every text.

    Raises:
        ValueError: if neither the tokenizer nor `args.eos_token` says which it is.
    """
    if args.eos_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no end-of-text token, which ends every text of the data. Set `eos_token` in the arguments, or "
            "`tokenizer.eos_token`."
        )


def check_parallel(accelerator: Accelerator) -> None:
    """Raises a `ValueError` if rows would be split among processes. A part of a row would lack tokens that it attends to."""
    config = getattr(accelerator, "parallelism_config", None)
    if config is not None and (config.cp_enabled or config.sp_enabled):
        raise ValueError(
            "Context and sequence parallelism (`cp_size`, `sp_size`) cut rows among processes, with a causal attention. Set them to "
            "1, and save memory with `gradient_checkpointing`, FSDP2 or ZeRO-3."
        )


def make_ready(trainer: DiffusionSFTTrainer) -> DocumentCollator:
    """
    Prepares the policy of a trainer for training, after TRL's constructor has run.

    Returns:
        [`DocumentCollator`]: the collator for the rows of its datasets.

    Raises:
        ValueError: if the policy cannot be trained, or gives other results in packed rows than in plain rows.
    """
    policy, tokenizer = trainer.model, cast(PreTrainedTokenizerBase, trainer.processing_class)
    if trainer.args.chat_template_path is not None:  # TRL may have added tokens
        trainer.spec = with_absent_tokens(trainer.spec.replace(absent_token_ids=None), policy.config, tokenizer)
    spec = trainer.spec
    check_parallel(trainer.accelerator)
    check_one_device(policy)
    if unwrap(policy).config._attn_implementation == "flex_attention":
        enable_plans(unwrap(policy))
    check_attention(policy)
    prepare_rounded(policy)
    switch_off_router_loss(policy)
    trainer.aux_loss_enabled = False
    train_padding_token(policy)
    gather_experts_at_once(policy)
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    check_trainable(policy, trainer.optimizer, run=whole)
    if whole:
        try_policy(policy, spec, cached=False)
    enable_plans(unwrap(policy))
    set_spec(unwrap(policy).config, spec)
    logger.info(f"Diffusion policy: {spec}")
    end = tokenizer.eos_token_id
    if not spec.stop_token_ids:
        raise ValueError("The policy's spec has no stop tokens, so nothing ends a document. Set `stop_token_ids`.")
    fill = end if end in spec.stop_token_ids else spec.stop_token_ids[0]
    vocab_size, context = policy.config.get_text_config().vocab_size, context_length(policy.config)[0]
    return DocumentCollator(spec, fill, trainer.args.canvas_length or 0, vocab_size, context)


def check_documents(trainer: DiffusionSFTTrainer, collator: DocumentCollator) -> None:
    """
    Checks the documents of a trainer before training. Those of a stream are checked when they are read.

    Raises:
        ValueError: naming the dataset and the row, if a row cannot be trained on; or if no token of a dataset is trained.
    """
    for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset):
        if not isinstance(dataset, Dataset):
            continue
        trained, documents, ended = 0, 0, 0
        lengths: set[int] = set()
        for row, example in enumerate(rows_of(dataset)):
            try:
                found = list(documents_of(example))
            except ValueError as error:
                raise ValueError(f"{name}, row {row}: {error}") from error
            for prompt, canvas in found:
                collator.check(prompt, canvas, f"{name}: row {row}")
                trained += len(canvas)
                documents += len(canvas) > 0
                if collator.has_ended(canvas):
                    ended += 1
                    lengths.add(collator.canvas_length(prompt, canvas))
        if trained == 0:
            raise ValueError(
                f"{name} has no token to train: every label is {IGNORED}, or every document has a single token. With "
                "`assistant_only_loss`, look at the chat template; otherwise at `max_length` and the columns."
            )
        if name == "train_dataset":
            _warn_of_ends(trainer, documents, ended, lengths)


def _warn_of_ends(trainer: DiffusionSFTTrainer, documents: int, ended: int, lengths: set[int]) -> None:
    """
    Warns if the policy would learn a wrong length of responses.

    Args:
        trainer ([`DiffusionSFTTrainer`]): the trainer.
        documents (`int`): number of documents.
        ended (`int`): number of documents that end with a stop token.
        lengths (`set[int]`): lengths of the canvases of these.
    """
    spec = trainer.spec
    if ended == 0:
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        logger.warning(
            f"None of the {documents} documents of train_dataset ends with one of the policy's stop tokens, "
            f"{list(spec.stop_token_ids)}, so the policy does not learn to end an answer. The end-of-text token of the tokenizer is "
            f"{tokenizer.eos_token_id}. Set `diffusion_spec={{'stop_token_ids': [...]}}` or `eos_token`, or look at the chat "
            "template and `max_length`."
        )
    if spec.attention == "full" and trainer.args.canvas_length is None and len(lengths) > 1:
        logger.warning(
            f"With full attention the policy sees how long the canvas is, and here it is as long as the answer ({min(lengths)} to "
            f"{max(lengths)} tokens, in whole blocks): the policy learns to fill it. Set `canvas_length` to the number of new "
            "tokens that it will be asked for."
        )


def rows_of(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, their lists as arrays. It reads a thousand rows at a time, which is many times faster than one."""
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    if dataset.format["type"] is not None or "input_ids" not in columns:
        yield from dataset
        return
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        arrays = [_arrays(table[name].combine_chunks()) for name in columns]
        for values in zip(*arrays, strict=True):
            yield dict(zip(columns, values, strict=True))


def _arrays(column: Any) -> Sequence[np.ndarray | None]:
    """The lists of an Arrow column."""
    if column.null_count:
        return [None if values is None else np.asarray(values) for values in column.to_pylist()]
    lengths = np.asarray(pc.list_value_length(column))
    return np.split(np.asarray(column.flatten()), lengths.cumsum()[:-1])
