"""Responses to text prompts, as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..fields import check_kind
from ..policies.forward import check_model, unwrap
from ..policies.loading import resolve_spec, with_absent_tokens
from ..policies.spec import DiffusionSpec
from ..seeds import derive_seed
from ..trajectories.trajectory import TrajectoryBatch
from .config import DecodingConfig
from .decode import decode
from .loop import DenoisingLoop


@dataclass
class Generation:
    """
    What [`generate`] returns.

    Attributes:
        texts (`list[str]`): the response to each prompt, without special tokens.
        trajectories ([`TrajectoryBatch`]): how each response was denoised.
    """

    texts: list[str]
    trajectories: TrajectoryBatch


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | list,
    config: DecodingConfig | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    streamer: bool | Callable[[DenoisingLoop], None] = False,
    spec: DiffusionSpec | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **settings: Any,
) -> Generation:
    """
    Generates a response to each prompt.

    ```python
    prompts = ["sudoku 3100243010040003"]
    answers = generate(model, tokenizer, prompts, max_new_tokens=17)
    answers.texts
    ```

    Args:
        model (`nn.Module`): the policy. It is in evaluation mode during the call.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`str` or `list`): one or more prompts, as strings or conversations (lists of messages).
            If the last message is an assistant's, the policy continues it.
        config ([`DecodingConfig`], *optional*): settings, unless they are given as `settings`.
        seed (`int`, *optional*, defaults to `0`): seed of the random numbers, used if there is a temperature. Each prompt has
            its own random numbers, derived from this seed and the prompt's place.
        batch_size (`int`, *optional*): largest number of responses decoded at once. All of them if `None`.
        streamer (`bool` or callable, *optional*, defaults to `False`): `True` shows in the terminal how the
            canvas is denoised (see [`TerminalStreamer`]). A function is called after each step with the [`DenoisingLoop`].
        spec ([`DiffusionSpec`], *optional*): facts about the policy. Defaults to those of the model's config. Fields
            that are not set (mask token, tokens that do not exist) come from the tokenizer.
        chat_template_kwargs (`dict`, *optional*): variables of the chat template, such as `{"enable_thinking": False}`.
        settings: fields of [`DecodingConfig`], instead of `config`.

    Returns:
        [`Generation`]

    Raises:
        TypeError: if the model is no model, the tokenizer no tokenizer, the config no [`DecodingConfig`], or there are no
            prompts where they should be.
        ValueError: if both `config` and `settings` are given, and as for [`decode`].
    """
    from ..policies.prompts import (
        as_prompts,
        read_chat_template_kwargs,
        tokenize_prompts,
    )  # here, because it imports TRL
    from ..viz.terminal import TerminalStreamer

    if config is not None and settings:
        raise ValueError(f"Give `config` or single settings, not both; got `config` and {sorted(settings)}.")
    DecodingConfig.check_given(settings)
    config = config or DecodingConfig(**settings)
    check_model(model, tokenizer)
    check_kind("config", config, DecodingConfig, "a DecodingConfig")
    prompts = as_prompts(prompts)
    model_config = unwrap(model).config
    spec = with_absent_tokens(spec, model_config, tokenizer) if spec else resolve_spec(model_config, None, tokenizer)
    prompt_ids = tokenize_prompts(tokenizer, prompts, **read_chat_template_kwargs(chat_template_kwargs))
    seeds = [derive_seed(seed, row) for row in range(len(prompts))]
    was_training = model.training
    model.eval()
    on_step = TerminalStreamer(tokenizer) if streamer is True else streamer or None
    try:
        batch = decode(model, prompt_ids, config, spec, seeds, batch_size, on_step=on_step)
    finally:
        model.train(was_training)
        if isinstance(on_step, TerminalStreamer):
            on_step.end()
    return Generation(tokenizer.batch_decode(batch.completions(), skip_special_tokens=True), batch)
