"""Denoising a batch of responses."""

from __future__ import annotations

import torch
from torch import nn

from ..policies.forward import unwrap
from ..policies.spec import DiffusionSpec, get_spec
from ..trajectories.trajectory import TrajectoryBatch
from .config import DecodingConfig
from .loop import BlockLoop, FullLoop


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: list[list[int]],
    config: DecodingConfig,
    spec: DiffusionSpec | None = None,
    seeds: list[int] | None = None,
) -> TrajectoryBatch:
    """
    Denoises one response for each prompt, block by block, and remembers how.

    With block attention, finished blocks are kept in a key-value cache, and the clean pass that fills it shares a
    forward with the first step of the next block. With full attention every step runs the whole canvas, whose blocks
    to come are masks. Either way, a row leaves the batch with the block that holds its stop token.

    Args:
        model (`nn.Module`):
            The policy, wrapped or not.
        prompts (`list[list[int]]`):
            Token ids of the prompts, unpadded, of any lengths.
        config ([`DecodingConfig`]):
            Settings of the loop.
        spec ([`DiffusionSpec`], *optional*):
            Facts about the policy. Defaults to the ones stored in the model's config.
        seeds (`list[int]`, *optional*):
            One seed for each prompt; needed if `config.temperature > 0`. A response depends on its own prompt and seed
            alone, not on its neighbours in the batch, and not on the global random state.

    Returns:
        [`TrajectoryBatch`]

    Raises:
        ValueError: if there is no prompt, or one is empty, holds the mask token, or leaves no room for the response in
            the model's context; or if a temperature is given without one seed per prompt.
    """
    base = unwrap(model)
    spec = get_spec(base.config) if spec is None else spec
    if len(prompts) == 0:
        raise ValueError("There is no prompt to decode.")
    if config.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError(
            "Sampling with a temperature needs `seeds`, one for each prompt, so that a rollout can be reproduced; got "
            f"{'none' if seeds is None else len(seeds)} for {len(prompts)} prompts."
        )
    if config.allow_mask_token and spec.attention != "full":
        raise ValueError("`allow_mask_token=True` is for full-attention policies only.")
    check_prompts(prompts, spec, base.config, config.max_new_tokens)
    loop = BlockLoop if spec.attention == "block" else FullLoop
    return loop(model, prompts, config, spec, seeds).run()


def check_prompts(prompts: list[list[int]], spec: DiffusionSpec, config, max_new_tokens: int) -> None:
    """Raises a `ValueError` that names the first prompt that the policy cannot take, and why."""
    config = config.get_text_config()
    context, vocab_size = getattr(config, "max_position_embeddings", None), config.vocab_size
    for row, prompt in enumerate(prompts):
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
        if context is None:
            continue
        tail = spec.prompt_tail(len(prompt))
        needed = len(prompt) - tail + -(-(tail + max_new_tokens) // spec.block_size) * spec.block_size
        if needed > context:
            raise ValueError(
                f"Prompt {row} has {len(prompt)} tokens. With up to {max_new_tokens} new tokens in whole blocks of "
                f"{spec.block_size} that makes {needed} positions, more than the policy's context of {context} "
                "(`max_position_embeddings`). Shorten or drop long prompts, or lower the number of new tokens."
            )
