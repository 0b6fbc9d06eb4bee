"""Checks the arguments of a [`DiffusionSFTTrainer`], prepares its policy, and checks its documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..fields import check_kind
from ..policies.attention import enable_plans
from ..policies.files import check_one_policy, check_weights
from ..policies.forward import check_attention, unwrap
from ..policies.limits import check_layers, context_length
from ..policies.loading import load_config, load_tokenizer, resolve_spec
from ..policies.lora import check_adapter, check_adapters, check_targets, empty_model
from ..policies.quantized import prepare_rounded
from ..policies.spec import DiffusionSpec, impossible_token, set_spec
from ..policies.training import check_trainable, switch_off_router_loss, train_padding_token
from ..policies.trial import try_policy
from ..trainer.checks import check_one_gpu, named_datasets
from .config import DiffusionSFTConfig
from .documents import IGNORED, documents_of


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
    model: Model, args: DiffusionSFTConfig | None, tokenizer: Any, options: dict[str, Any]
) -> tuple[DiffusionSFTConfig, DiffusionSpec, PreTrainedTokenizerBase]:
    """
    Checks the arguments of a trainer before weights are loaded, and completes them.

    Args:
        model, args: as for the trainer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the tokenizer.
        options (`dict`): the trainer's other arguments, by name.

    Raises:
        TypeError, ValueError: see [`DiffusionSFTTrainer`].
    """
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a path, a hub id or a model, got {type(model).__name__}.")
    for name, why in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"`{name}` cannot be used with a diffusion policy: {why}. Leave it out.")
    path = model if isinstance(model, str) else model.config._name_or_path
    if args is None:
        args = DiffusionSFTConfig(f"{path.rstrip('/').split('/')[-1]}-SFT")
    if not isinstance(args, DiffusionSFTConfig):
        raise TypeError(f"`args` must be a DiffusionSFTConfig, got {type(args).__name__}.")
    check_one_gpu(args)
    adapter = options.get("peft_config")
    check_one_policy(str(args.output_dir), isinstance(model, PeftModel) or adapter is not None)
    if isinstance(model, str):
        known = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
        config = load_config(model, **{key: value for key, value in args.model_options().items() if key in known})
        check_weights(model)
    else:
        config = model.config
        check_adapters(model)
    if tokenizer is None:
        if not path:
            raise ValueError(
                "The model was not loaded from anywhere, so its tokenizer is unknown. Pass it as `processing_class`."
            )
        tokenizer = load_tokenizer(path)
    check_kind("processing_class", tokenizer, PreTrainedTokenizerBase, "a tokenizer")
    spec = resolve_spec(config, args.spec_overrides(), tokenizer)
    if adapter is not None:
        check_adapter(adapter)
        check_targets(empty_model(config) if isinstance(model, str) else model, adapter)
    check_layers(config)
    if args.block_sizes:
        if spec.attention != "block":
            raise ValueError(
                "`block_sizes` is for block attention; with full attention the whole canvas is one block."
            )
        if args.block_sizes[-1] != spec.block_size:
            raise ValueError(
                f"`block_sizes` must end with the block size of the policy, {spec.block_size}, got {args.block_sizes}."
            )
    return args, spec, tokenizer


def make_ready(trainer: DiffusionSFTTrainer) -> int:
    """
    Prepares the policy of a trainer for training, after TRL's constructor has run.

    Returns:
        `int`: the stop token that fills the last block of a document.

    Raises:
        ValueError: if the policy cannot be trained, or gives other results in packed rows than in plain rows.
    """
    policy, spec = trainer.model, trainer.spec
    check_attention(policy)
    prepare_rounded(policy)
    switch_off_router_loss(policy)
    trainer.aux_loss_enabled = False
    train_padding_token(policy)
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    check_trainable(policy, trainer.optimizer, run=whole)
    if whole:
        try_policy(policy, spec, cached=False)
    enable_plans(unwrap(policy))
    set_spec(unwrap(policy).config, spec)
    logger.info(f"Diffusion policy: {spec}")
    end = cast(PreTrainedTokenizerBase, trainer.processing_class).eos_token_id
    if not spec.stop_token_ids:
        raise ValueError("The policy's spec has no stop tokens, so nothing ends a document. Set `stop_token_ids`.")
    return end if end in spec.stop_token_ids else spec.stop_token_ids[0]


def check_documents(trainer: DiffusionSFTTrainer) -> None:
    """
    Checks the documents of a trainer before training. Those of a stream are not checked.

    Raises:
        ValueError: naming the dataset and the row, if a document holds a token that it cannot hold, or is longer than the
            context of the policy; or if no token of a dataset is trained.
    """
    config = trainer.model.config
    context, limit = context_length(config)
    for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset):
        if not isinstance(dataset, Dataset):
            continue
        trained = 0
        for row, example in enumerate(dataset):
            found = impossible_token(example["input_ids"], trainer.spec, config.get_text_config().vocab_size)
            if found is not None:
                raise ValueError(
                    f"{name}: row {row} holds {found[1]} at position {found[0]}. Remove it from the data."
                )
            for prompt, canvas in documents_of(example):
                end = trainer.spec.canvas_end(len(prompt), len(canvas))
                if context is not None and end > context:
                    raise ValueError(
                        f"{name}: row {row} has {len(prompt) + len(canvas)} tokens, in whole blocks {end}, more than the "
                        f"policy's context of {context} (`{limit}`). Lower `max_length`."
                    )
                trained += len(canvas)
        if trained == 0:
            raise ValueError(
                f"{name} has no token to train: every label is {IGNORED}, or every document has a single token. With "
                "`assistant_only_loss`, look at the chat template; otherwise at `max_length` and the columns."
            )
