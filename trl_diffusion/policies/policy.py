"""A policy that is open: its model, its tokenizer and its spec. All code that opens a checkpoint to use it does so here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..fields import check_kind
from .files import check_records, check_weights, policy_in
from .forward import check_attention, check_implementation, check_model, unwrap
from .limits import check_layers, context_length
from .loading import load_config, load_tokenizer, refusing_code, resolve_spec
from .lora import check_adapter, check_targets, empty_model
from .places import check_there
from .quantized import prepare_rounded
from .spec import DiffusionSpec
from .tiny import resolve_embedded
from .trial import try_policy
from .whole import check_report, only_whole_models


if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin


logger = logging.getLogger(__name__)


@dataclass
class Policy:
    """
    A model in evaluation mode with what is needed to let it answer.

    Attributes:
        model (`nn.Module`): the model, with its adapter if there is one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer. `None` will do if the policy is only asked with token
            ids.
        spec ([`DiffusionSpec`]): facts about it.
        chat_template_kwargs (`dict`): variables of the chat template that conversations are written with.

    Raises:
        TypeError: if the model is no model, or the tokenizer no tokenizer.
        ValueError: if the model computes something else under the attention of a diffusion policy (see [`try_policy`]).
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    spec: DiffusionSpec
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_model(self.model, self.tokenizer, takes_text=self.tokenizer is not None)
        try_policy(self.model, self.spec)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """Most positions that the model takes, if its config says."""
        return context_length(unwrap(self.model).config)[0]

    def encode(self, prompts: str | list) -> list[list[int]]:
        """Token ids of prompts, standard or conversational, one or more, as training tokenizes them."""
        from .prompts import as_prompts, tokenize_prompts  # here, since it brings TRL along

        prompts = as_prompts(prompts) if prompts else []
        return tokenize_prompts(self.tokenizer, prompts, **self.chat_template_kwargs)

    def fit(self, prompts: list[list[int]], new_tokens: int, context: int | None = None) -> list[list[int]]:
        """
        Cuts the beginning of prompts that leave no room for `new_tokens` more, in whole blocks, as is usual in
        evaluation, and says how many there were.

        Args:
            prompts (`list[list[int]]`): token ids.
            new_tokens (`int`): most tokens of an answer.
            context (`int`, *optional*): most positions of prompt and answer together. Defaults to the model's.

        Raises:
            ValueError: if there is no room for any prompt.
        """
        context = context or self.context
        if context is None:
            return prompts
        room = self.spec.longest_prompt(context, new_tokens)
        if room < 1:
            raise ValueError(
                f"{new_tokens} new tokens leave no room for a prompt in a context of {context}. Lower the number of new "
                "tokens, for example with max_new_tokens in the decoding settings."
            )
        long = sum(len(prompt) > room for prompt in prompts)
        if long:
            logger.warning(
                f"{long} of {len(prompts)} prompts are longer than {room} tokens, which is what {new_tokens} new tokens "
                f"leave of a context of {context}. They lose their beginning."
            )
        return [prompt[-room:] for prompt in prompts]

    def decode(self, completions: list[list[int]]) -> list[str]:
        """The text of completions."""
        return self.tokenizer.batch_decode(completions, skip_special_tokens=True)


def adapter_config_of(path: str) -> PeftConfig:
    """The config of an adapter, if its files are whole and it is of a kind that a policy can have."""
    if [*policy_in(path)] == ["a whole model"]:
        raise ValueError(f"{path} holds a whole model and no adapter. Give it as the model.")
    check_there(path, "adapter_config.json")
    check_records(path)
    check_weights(path)
    try:
        config = PeftConfig.from_pretrained(path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"There is no adapter at {path} ({type(error).__name__}: {error}): its `adapter_config.json` must be one of peft's."
        ) from error
    check_adapter(config)
    return config


def _adapted(model: PreTrainedModel, path: str, config: PeftConfig, trainable: bool = False) -> PeftModel:
    """An adapter on its model. Raises a `ValueError` that names its weights that are missing or left over."""
    adapted = PeftModel.from_pretrained(model, path, config=config, is_trainable=trainable)
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    saved = load_peft_weights(path, device="cpu").keys()
    own = adapted.state_dict().keys()  # embeddings are saved under the model's names
    check_report(path, PeftModel, wanted - saved, saved - wanted - own)
    return adapted


def load_model(
    path: str, device: str | torch.device, quantization: QuantizationConfigMixin | None = None, **options: Any
) -> PreTrainedModel:
    """
    The model of a checkpoint, with its weights.

    Args:
        path (`str`): directory or hub id.
        device (`str` or `torch.device`): where to put it.
        quantization ([`~transformers.BitsAndBytesConfig`], *optional*): how the weights are rounded when they are loaded.
        options (`dict`): passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: if the file of the weights is damaged, or weights are missing or left over.
    """
    if quantization is not None:  # weights are rounded where they will be: some cannot be moved afterwards
        options.update(quantization_config=quantization, device_map={"": device})
    try:
        advice = "Use a checkpoint of a known family, or of a backbone of transformers."
        with refusing_code(f"The model {path}", advice), only_whole_models():
            model = AutoModelForCausalLM.from_pretrained(path, **options, trust_remote_code=False)
    except SafetensorError as error:
        raise ValueError(f"The weights of {path} cannot be read: {error}. Is the file whole?") from error
    if quantization is None:
        return model.to(device)  # type: ignore[arg-type]  # transformers wraps the method
    prepare_rounded(model)  # it computes what the policy computes that is trained
    return model


def open_adapter(
    path: str, device: str | torch.device, quantization: QuantizationConfigMixin | None = None, **options: Any
) -> PeftModel:
    """
    An adapter on the model that it was made for, to train it further.

    Args:
        path (`str`): directory or hub id of the adapter.
        device, quantization, options: as for [`load_model`].

    Raises:
        ValueError: if the adapter does not name its model, is damaged, or is of a kind that a diffusion policy cannot have.
    """
    config = adapter_config_of(path)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter {path} does not name the model that it was made for (`base_model_name_or_path`)."
        )
    check_weights(config.base_model_name_or_path)
    model = load_model(config.base_model_name_or_path, device, quantization, **options)
    return _adapted(model, path, config, trainable=True)


def open_facts(
    path: str,
    tokenizer: str | None = None,
    revision: str | None = None,
    diffusion_spec: Mapping[str, Any] | None = None,
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, DiffusionSpec]:
    """
    What is known of a checkpoint without its weights: its config, its tokenizer and its spec.

    Args:
        path (`str`): path or hub id of the model, or `embedded:NAME` (see [`tiny_policy_path`]).
        tokenizer, revision, diffusion_spec: as for [`open_policy`].

    Raises:
        FileNotFoundError, ValueError: as [`open_policy`].
    """
    path, source = resolve_embedded(path), {} if revision is None else {"revision": revision}
    config = load_config(path, **source)
    check_layers(config)
    found = load_tokenizer(tokenizer or path, **({} if tokenizer else source))
    return config, found, resolve_spec(config, diffusion_spec, found)


def open_policy(
    path: str | None = None,
    adapter: str | None = None,
    tokenizer: str | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    quantization: QuantizationConfigMixin | None = None,
    diffusion_spec: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Policy:
    """
    Opens a checkpoint to let it answer. What can be known from configs and the tokenizer is checked before the weights are
    loaded.

    Args:
        path (`str`, *optional*): path or hub id of the model, or `embedded:NAME` (see [`tiny_policy_path`]). Defaults to the one that the adapter was made for.
        adapter (`str`, *optional*): path or hub id of an adapter, which is used as it is, not merged.
        tokenizer (`str`, *optional*): path or hub id of the tokenizer, if it is not where the model is.
        revision (`str`, *optional*): revision of the model on the hub.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): type of the weights; the checkpoint's own.
        device (`str`, *optional*): where to put the model. A GPU if there is one.
        attn_implementation (`str`, *optional*): `"sdpa"` or `"eager"`.
        quantization ([`~transformers.BitsAndBytesConfig`], *optional*): how the weights are rounded when they are loaded.
        diffusion_spec (`Mapping[str, Any]`, *optional*): fields of [`DiffusionSpec`] that complete those of the model.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*): variables of the chat template.

    Raises:
        TypeError: if the path of the model is no path.
        FileNotFoundError: if there is no such directory, and nothing of this name on the hub.
        ValueError: if neither a model nor an adapter is given, the adapter does not fit the model or is of a kind that a
            diffusion policy cannot have, nothing says how the model is denoised, or it cannot be a policy (see
            [`check_layers`] and [`try_policy`]).
    """
    check_kind("path", path, str | Path | None, "a path or a hub id")
    adapter_config = None if adapter is None else adapter_config_of(adapter)
    if not path and adapter_config is not None:
        path = adapter_config.base_model_name_or_path
    if not path:
        raise ValueError(
            "No model was given: pass its path or hub id"
            + (f"; the adapter {adapter} does not name the one it was made for." if adapter else ".")
        )
    path = resolve_embedded(path)
    if attn_implementation is not None:
        check_implementation(attn_implementation)
    source = {} if revision is None else {"revision": revision}
    config = load_config(path, **source)
    check_layers(config)
    check_weights(path)
    found = load_tokenizer(tokenizer or path, **({} if tokenizer else source))
    spec = resolve_spec(config, diffusion_spec, found)
    if adapter_config is not None:
        check_targets(empty_model(config), adapter_config)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {**source, "dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    loaded = load_model(path, device, quantization, config=config, **options)
    model: nn.Module = loaded
    if adapter is not None and adapter_config is not None:
        model = _adapted(loaded, adapter, adapter_config)
    check_attention(model)
    return Policy(model.eval(), found, spec, dict(chat_template_kwargs or {}))
