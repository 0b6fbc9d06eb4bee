"""Denoising a batch of responses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import distributed, nn

from ..fields import check_at_least, check_kind
from ..policies.forward import unwrap
from ..policies.limits import CONTEXT, context_length
from ..policies.spec import DiffusionSpec, get_spec
from ..policies.trial import try_policy
from ..trajectories.trajectory import TrajectoryBatch
from .config import DecodingConfig
from .loop import DenoisingLoop
from .pace import SharedPace


logger = logging.getLogger(__name__)


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: list[list[int]],
    config: DecodingConfig,
    spec: DiffusionSpec | None = None,
    seeds: list[int] | None = None,
    batch_size: int | None = None,
    keep_pace: bool = False,
    on_step: Callable[[DenoisingLoop], None] | None = None,
) -> TrajectoryBatch:
    """
    Denoises one response for each prompt, block by block, and records the trajectories.

    With block attention, finished blocks are kept in a key-value cache. The clean pass that fills the cache shares a
    forward pass with the first step of the next block. With full attention, every step runs the whole canvas, in which
    later blocks are masked. In both cases nothing is padded, logits are computed only for positions that may be unmasked,
    and the next prompt takes the place of a response that has ended.

    Args:
        model (`nn.Module`):
            The policy, wrapped or not.
        prompts (`list[list[int]]`):
            Token ids of the prompts, unpadded, of any lengths. A single prompt may be given as a list of ids.
        config ([`DecodingConfig`]):
            Settings of the loop.
        spec ([`DiffusionSpec`], *optional*):
            Facts about the policy. Defaults to those in the model's config.
        seeds (`list[int]`, *optional*):
            One seed for each prompt. Needed if `config.temperature > 0`, and with `"random"` as `strategy` or `revision`. A
            response depends only on its own prompt and seed. It depends neither on other responses in the batch nor on the
            global random state. (The exception is rounding: on a GPU, it depends on the shape of the batch.)
        batch_size (`int`, *optional*):
            Largest number of responses decoded at once. The others wait. All are decoded at once if `None`.
        keep_pace (`bool`, *optional*, defaults to `False`):
            Whether all processes of the default process group run the same number of forward passes. Needed if a forward
            pass gathers parameters from all of them (ZeRO-3 without gathering, FSDP).
        on_step (callable, *optional*):
            Called after each step with the [`DenoisingLoop`], for example to show its progress.

    Returns:
        [`TrajectoryBatch`]

    Raises:
        TypeError: if `model` is not a model, `config` is not a [`DecodingConfig`], or `prompts` are not token ids.
        ValueError: in these cases:

            - There is no prompt.
            - A prompt is empty, holds the mask token or a token that the policy does not have, or leaves no room for the
              response in the model's context.
            - Responses are random and there are no seeds, or the number of seeds is not the number of prompts.
            - `batch_size` is below 1, or a setting does not apply to this policy.
        NonFiniteLogits: a `FloatingPointError`, if the policy's logits are NaN or infinite. Its message names the prompt
            and the step.
        PeerFailed: with `keep_pace`, if decoding failed on another process.
    """
    check_kind("model", model, nn.Module, "a model")
    check_kind("config", config, DecodingConfig, "a DecodingConfig")
    prompts = _as_ids(prompts)
    base = unwrap(model)
    spec = get_spec(base.config) if spec is None else spec
    if batch_size is not None:
        check_at_least("batch_size", batch_size)
    if (config.is_random and seeds is None) or (seeds is not None and len(seeds) != len(prompts)):
        raise ValueError(
            "Sampling needs `seeds`, one for each prompt, so that a rollout can be reproduced; got "
            f"{'none' if seeds is None else len(seeds)} for {len(prompts)} prompts."
        )
    check_settings(config, spec, base.config.get_text_config().vocab_size)
    if config.stop_token_ids is not None:
        spec = spec.replace(stop_token_ids=config.stop_token_ids)
    check_prompts(prompts, spec, base.config, config.max_new_tokens)
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        _say_rounding(spec, config.max_new_tokens)
    try_policy(model, spec, cached=spec.attention == "block" or config.approximate_cache is not None)
    pace = SharedPace(next(base.parameters()).device) if keep_pace else None
    return DenoisingLoop(model, prompts, config, spec, seeds, batch_size, pace, on_step).run()


def _as_ids(prompts: Any) -> list[list[int]]:
    """
    Token ids of one or more prompts as a list.

    Raises:
        TypeError: if they are something else, such as text.
        ValueError: if there is no prompt.
    """
    what = "token ids, a list for each prompt (`generate` takes text)"
    check_kind("prompts", prompts, list | tuple, what)
    if len(prompts) == 0:
        raise ValueError("There is no prompt to decode.")
    if isinstance(prompts[0], int):
        return [list(prompts)]
    for prompt in prompts:
        check_kind("prompts", prompt, list | tuple, what)
        if prompt and not isinstance(prompt[0], int):
            raise TypeError(f"`prompts` must be {what}, got {prompt!r:.80}.")
    return list(prompts)


@cache
def _say_rounding(spec: DiffusionSpec, new_tokens: int) -> None:
    """Warns once if responses of the largest length do not fill the blocks that are run for them."""
    whole = spec.canvas_end(0, new_tokens)
    if new_tokens < spec.block_size:
        logger.warning(
            f"Responses have up to {new_tokens} tokens, less than a block of this policy ({spec.block_size}): every step runs "
            "the whole block, whose rest stays masked."
        )
    elif spec.block_origin == "response" and whole > new_tokens:
        logger.warning(
            f"Responses have up to {new_tokens} tokens, which is rounded up to whole blocks of {spec.block_size}: {whole} "
            f"positions are denoised, and the last {whole - new_tokens} do not count."
        )


def check_settings(config: DecodingConfig, spec: DiffusionSpec, vocab_size: int) -> None:
    """Raises a `ValueError` for a setting that does not apply to this policy."""
    if config.revising is not None and config.revising.edits and not spec.predicts_visible_tokens:
        raise ValueError(
            f"`revision={config.to_dict()['revision']!r}` writes over visible tokens where the policy now prefers others, but "
            "this policy was not trained to predict visible tokens. Use `revision='confidence'`, which erases first; or set "
            "`predicts_visible_tokens` in the policy's spec, if it was trained for it."
        )
    if config.allow_mask_token and spec.attention != "full":
        raise ValueError("`allow_mask_token=True` is for full-attention policies only.")
    attention: dict[str | None, str] = {"prefix": "full", "dual": "full", "sub_block": "block"}
    needed = attention.get(config.approximate_cache, spec.attention)
    if spec.attention != needed:
        raise ValueError(
            f"`approximate_cache={config.approximate_cache!r}` is for {needed}-attention policies, and this one has "
            f"{spec.attention} attention."
        )
    for name in ("suppress_tokens", "stop_token_ids"):
        outside = [token for token in getattr(config, name) or () if token >= vocab_size]
        if outside:
            raise ValueError(f"`{name}` holds {outside[0]}, but the model's vocabulary has {vocab_size} tokens.")
    absent = [token for token in config.stop_token_ids or () if spec.is_absent(token)]
    if absent:
        raise ValueError(
            f"`stop_token_ids` holds {absent[0]}, which the tokenizer does not have (`absent_token_ids` of the policy's "
            "spec), so no response would end with it."
        )


def check_prompts(
    prompts: list[list[int]], spec: DiffusionSpec, config, max_new_tokens: int, first_row: int = 0
) -> None:
    """
    Raises a `ValueError` with the first prompt that the policy cannot take, and the reason. `first_row` is the number of
    the first prompt in the message.
    """
    (context, limit), vocab_size = context_length(config), config.get_text_config().vocab_size
    for row, prompt in enumerate(prompts, start=first_row):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {row} is empty.")
        if spec.mask_token_id in prompt:
            where = prompt.index(spec.mask_token_id)
            raise ValueError(
                f"Prompt {row} contains the mask token ({spec.mask_token_id}) at position {where}. The policy would "
                "take it for a position to be denoised. Remove it from the data."
            )
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"Prompt {row} holds token {outside[0]}, but the model's vocabulary has {vocab_size} tokens. Is this "
                "the model's own tokenizer?"
            )
        absent = [token for token in prompt if spec.is_absent(token)]
        if absent:
            raise ValueError(
                f"Prompt {row} holds token {absent[0]}, which the tokenizer does not have (`absent_token_ids` of the "
                "policy's spec)."
            )
        if context is None:
            continue
        needed = spec.canvas_end(len(prompt), max_new_tokens)
        if needed > context:
            raise ValueError(
                f"Prompt {row} has {len(prompt)} tokens. With up to {max_new_tokens} new tokens in whole blocks of "
                f"{spec.block_size} that makes {needed} positions, more than the policy's context of {context} "
                f"(`{limit}`). Shorten or drop long prompts, or lower the number of new tokens."
                + (
                    ""
                    if limit == CONTEXT
                    else f" A policy that was trained without this window has `{limit}: null` in its config."
                )
            )
