"""Opening a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..links import link
from .families import FAMILIES
from .families.configs import HOW_TO
from .families.refused import check_masked
from .files import check_records
from .places import check_there
from .spec import DiffusionSpec, check_spec, family_fields, get_spec, spec_fields


def load_config(path: str, **options) -> PretrainedConfig:
    """
    The config of a checkpoint.

    Args:
        path (`str`): directory or hub id.
        options (`dict`): passed on to `AutoConfig.from_pretrained`.

    Raises:
        FileNotFoundError: if there is no such directory, and nothing of this name on the hub.
        ValueError: if a file of the checkpoint is damaged, it is of a model type that neither transformers nor this package
            knows (the message lists what there is), or of one that has no mask token.
    """
    check_there(path, **options)
    check_records(path)
    try:  # `False` makes an error of what transformers would ask on the terminal
        config = AutoConfig.from_pretrained(path, **options, trust_remote_code=False)
    except ValueError as error:
        values, _ = PretrainedConfig.get_config_dict(path, **options)
        model_type = values.get("model_type")
        check_masked(model_type)
        if model_type in CONFIG_MAPPING:
            raise
        if model_type is None:
            raise ValueError(
                f"There is no checkpoint at {path}: no `config.json` there that has a `model_type`. A LoRA adapter is "
                "opened with `peft.AutoPeftModelForCausalLM.from_pretrained(path)`, to be trained with `is_trainable=True`, and "
                "passed as a model."
            ) from error
        known = ", ".join(f"{name} (`{config.model_type}`)" for name, (config, *_) in FAMILIES.items())
        raise ValueError(
            f"{path} has the model type {model_type!r}, which neither trl_diffusion nor transformers "
            f"{transformers.__version__} knows. Families that load as they were published: {known}. Another family takes two "
            f"small classes ({link(HOW_TO)}). A checkpoint on "
            "any causal backbone of transformers (Llama, Qwen2, Qwen3, ...) works too: give it that backbone's "
            "`model_type` and say how it is denoised with DTRPOConfig(diffusion_spec={'mask_token_id': ..., "
            "'block_size': ..., ...})."
        ) from error
    check_masked(config.model_type)
    return config


def load_tokenizer(path: str, **options: Any) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint, which pads and cuts on the left, as prompts need it.

    Args:
        path (`str`): directory or hub id.
        options (`dict`): passed on to `AutoTokenizer.from_pretrained`.

    Raises:
        FileNotFoundError: if there is no such directory, and nothing of this name on the hub.
        ValueError: if it is damaged, or code of the checkpoint's own, which is never run.
    """
    check_there(path, **options)
    check_records(path)
    try:
        with refusing_code(f"The tokenizer of {path}", "Pass a tokenizer of a kind that transformers knows."):
            return AutoTokenizer.from_pretrained(
                path, padding_side="left", truncation_side="left", **options, trust_remote_code=False
            )
    except (OSError, ValueError):
        raise
    except Exception as error:  # tokenizers raises no other kind
        raise ValueError(
            f"The tokenizer of {path} cannot be read ({type(error).__name__}: {error}). Fetch its files again, or pass another "
            "tokenizer."
        ) from error


def config_of(model: Any, options: Mapping[str, Any]) -> PretrainedConfig:
    """The config of a model, or of the checkpoint at a path or hub id. `options`: those with which the model is loaded."""
    if not isinstance(model, str):
        return model.config
    return load_config(model, **source_options(options))


def source_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options with which a model is loaded that say where it is."""
    known = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
    return {key: value for key, value in options.items() if key in known}


def tokenizer_of(model: Any, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint, or of that from which a model was loaded.

    Args:
        model: a model, or the path or hub id of one.
        options (`dict`): those with which it is loaded. Its tokenizer is of the same `revision`. It lies beside a `subfolder`.

    Raises:
        ValueError: if the model was not loaded from anywhere.
    """
    path = model if isinstance(model, str) else model.config._name_or_path
    if not path:
        raise ValueError(
            "The model was not loaded from anywhere, so its tokenizer is unknown. Pass it as `processing_class`."
        )
    source = source_options(options) if isinstance(model, str) else {}
    return load_tokenizer(path, **{key: value for key, value in source.items() if key != "subfolder"})


@contextmanager
def refusing_code(what: str, advice: str) -> Iterator[None]:
    """
    Inside, something is loaded with `trust_remote_code=False`. If it needs code of its own, transformers would advise to
    let it run; the error says instead that it never is.

    Args:
        what (`str`): what is loaded, for the message.
        advice (`str`): what to do instead.

    Raises:
        ValueError: if it needs code of its own.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"{what} needs code of its own (from the hub), which is never run here. {advice}") from error


def load_renamed_weights(model: PreTrainedModel, directory: str | Path) -> bool:
    """
    Loads the weights of a checkpoint whose names are not the model's own but its family's, as LLaDA's are.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, bare.
        directory (`str` or `Path`): the checkpoint, in safetensors format.

    Returns:
        `bool`: whether there was such a checkpoint; nothing is done otherwise.
    """
    saved: set[str] = set()
    for path in Path(directory).glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved.update(file.keys())
    if not saved or saved <= set(model.state_dict()):
        return False
    stored = type(model).from_pretrained(directory, config=model.config, dtype=model.dtype, trust_remote_code=False)
    model.load_state_dict(stored.state_dict())
    return True


def resolve_mask_token(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Id of the token that stands for [MASK]: from the config, or else from the tokenizer.

    Raises:
        ValueError: if neither has one.
    """
    if (mask := spec_fields(config).get("mask_token_id")) is not None:
        return mask
    if (spelling := getattr(config, "mask_token", None)) in (vocabulary := tokenizer.get_vocab()):
        return vocabulary[spelling]
    if getattr(tokenizer, "mask_token", None) is not None:
        return tokenizer.mask_token_id
    raise ValueError(
        f"Neither the config of this `{config.model_type}` model nor its tokenizer says which token stands for [MASK]; "
        f"the tokenizer's special tokens are {tokenizer.all_special_tokens}. Pass "
        "`diffusion_spec={'mask_token_id': ...}`."
    )


def needs_tokenizer(config: PretrainedConfig, overrides: Mapping[str, Any] | None = None) -> bool:
    """Whether this is a family's model of which only the tokenizer knows the mask token."""
    return bool(family_fields(config)) and "mask_token_id" not in {**spec_fields(config), **(overrides or {})}


def resolve_spec(
    config: PretrainedConfig,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DiffusionSpec:
    """
    The policy's spec: what its config says, completed and overridden. The tokenizer says which tokens there are
    (`absent_token_ids`), whatever is stored, and which is the mask token where a family's config does not know it.

    Raises:
        ValueError: if nothing says which token is the mask, the model has none, the spec names tokens that the model does not
            have, or the tokenizer has none of the model's tokens.
    """
    check_masked(config.model_type)
    overrides = dict(overrides or {})
    if tokenizer is not None:
        if needs_tokenizer(config, overrides):
            overrides["mask_token_id"] = resolve_mask_token(config, tokenizer)
        if "absent_token_ids" in spec_fields(config):
            overrides.setdefault("absent_token_ids", None)
    spec = get_spec(config, overrides)
    if tokenizer is not None:
        spec = with_absent_tokens(spec, config, tokenizer)
    check_spec(spec, config)
    return spec


def with_absent_tokens(
    spec: DiffusionSpec, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> DiffusionSpec:
    """
    The spec with `absent_token_ids` from the tokenizer, if it does not say: the ids of the model's vocabulary that the
    tokenizer has no token for. Tokens that the spec names (mask, stop tokens) are there in any case. A spec for which
    nothing is absent is returned as it is.

    Raises:
        ValueError: if the tokenizer has none of the model's tokens.
    """
    if spec.absent_token_ids is not None:
        return spec
    size = config.get_text_config().vocab_size
    known = np.zeros(size + 2, dtype=bool)  # id `i` at `i + 1`
    known[[0, -1]] = True
    ids = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
    ids = ids[(ids >= 0) & (ids < size)]
    if len(ids) == 0:
        raise ValueError(
            f"The tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has none of the {size} tokens of the "
            "model. Pass the model's own tokenizer."
        )
    named = [spec.mask_token_id, *spec.stop_token_ids]
    known[ids + 1] = True
    known[[token + 1 for token in named if 0 <= token < size]] = True
    edges = np.flatnonzero(known[1:] != known[:-1])
    if len(edges) == 0:
        return spec
    return spec.replace(absent_token_ids=tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)))
