"""Opening a policy to be measured, with or without a LoRA adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..policies.forward import check_attention, unwrap
from ..policies.limits import context_length
from ..policies.loading import load_config, resolve_spec
from ..policies.lora import check_adapter, check_targets
from ..policies.spec import DiffusionSpec
from ..policies.trial import try_policy


if TYPE_CHECKING:
    from transformers import BatchEncoding


logger = logging.getLogger(__name__)


@dataclass
class Policy:
    """
    A model in evaluation mode with what is needed to let it answer.

    Attributes:
        model (`nn.Module`): the model, with its adapter if there is one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        spec ([`DiffusionSpec`]): facts about it.

    Raises:
        ValueError: if the model computes something else under the attention of a diffusion policy (see [`try_policy`]).
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    spec: DiffusionSpec

    def __post_init__(self):
        try_policy(self.model, self.spec)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """Most positions that the model takes, if its config says."""
        return context_length(unwrap(self.model).config)[0]

    def encode(self, prompts: list[str | list[dict[str, str]]]) -> list[list[int]]:
        """Token ids of prompts, standard or conversational, as training tokenizes them."""
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(text=prompt)["input_ids"]
        encoding = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return cast("BatchEncoding", encoding)["input_ids"]

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


def load_policy(
    pretrained: str | None = None,
    peft: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    diffusion_spec: Mapping[str, Any] | None = None,
) -> Policy:
    """
    Opens a checkpoint.

    Args:
        pretrained (`str`, *optional*): path or hub id of the model. Defaults to the one that the adapter was made for.
        peft (`str`, *optional*): path or hub id of an adapter, which is used as it is, not merged.
        tokenizer (`str`, *optional*): path or hub id of the tokenizer, if it is not where the model is.
        revision (`str`, *optional*): revision of the model on the hub.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): type of the weights; the checkpoint's own.
        device (`str`, *optional*): where to put the model. A GPU if there is one.
        attn_implementation (`str`, *optional*): `"sdpa"` or `"eager"`.
        diffusion_spec (`Mapping[str, Any]`, *optional*): fields of [`DiffusionSpec`] that complete those of the model.

    Raises:
        ValueError: if neither a model nor an adapter is given, the adapter does not fit the model or is of a kind that a
            diffusion policy cannot have, nothing says how the model is denoised, or it cannot be a policy (see
            [`try_policy`]).
    """
    adapter = None if peft is None else PeftConfig.from_pretrained(peft)
    if adapter is not None:
        check_adapter(adapter)
    pretrained = pretrained or (adapter and adapter.base_model_name_or_path)
    if not pretrained:
        raise ValueError(
            "No model was given: pass `pretrained`, a path or hub id"
            + (f"; the adapter {peft} does not name the one it was made for." if peft else ".")
        )
    options = {} if revision is None else {"revision": revision}
    config = load_config(pretrained, **options)
    found = AutoTokenizer.from_pretrained(
        tokenizer or pretrained, padding_side="left", **({} if tokenizer else options)
    )
    spec = resolve_spec(config, diffusion_spec, found)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(pretrained, config=config, dtype=dtype, **options)
    except SafetensorError as error:
        raise ValueError(f"The weights of {pretrained} cannot be read: {error}. Is the file whole?") from error
    if peft is not None and adapter is not None:
        check_targets(model, adapter)
        model = PeftModel.from_pretrained(model, peft, config=adapter)
    check_attention(model)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Policy(model.to(device).eval(), found, spec)
