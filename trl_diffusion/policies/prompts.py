"""Prompts and answers as token ids, outside a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational, maybe_extract_prompt

from .spec import DiffusionSpec


if TYPE_CHECKING:
    from transformers import BatchEncoding


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list) -> list[list[int]]:
    """Token ids of standard or conversational prompts, as [`DTRPOTrainer`] makes them."""
    if is_conversational({"prompt": prompts[0]}):
        encoding = tokenizer.apply_chat_template(
            conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return cast("BatchEncoding", encoding)["input_ids"]
    return tokenizer(text=prompts)["input_ids"]


def tokenize_preference(
    tokenizer: PreTrainedTokenizerBase, example: dict[str, Any], spec: DiffusionSpec
) -> tuple[Any, list[int], list[list[int]]]:
    """
    A row of a preference dataset (https://huggingface.co/docs/trl/dataset_formats#preference) as token ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        example (`dict`): `chosen` and `rejected`, standard or conversational, with or without an explicit `prompt`.
        spec ([`DiffusionSpec`]): a response that does not end with one of its stop tokens gets the first one.

    Returns:
        The prompt as it is in a prompt dataset, its token ids, and those of the chosen and the rejected response.
    """
    example = maybe_extract_prompt({key: example[key] for key in ("prompt", "chosen", "rejected") if key in example})
    prompt = example["prompt"]
    prompt_ids = tokenize_prompts(tokenizer, [prompt])[0]
    texts: dict[str, Any] = apply_chat_template(dict(example), tokenizer) if is_conversational(example) else example
    responses = []
    for name in ("chosen", "rejected"):
        whole = tokenizer(text=texts["prompt"] + texts[name], add_special_tokens=not is_conversational(example))[
            "input_ids"
        ]
        if whole[: len(prompt_ids)] == prompt_ids:
            ids = whole[len(prompt_ids) :]
        else:  # a token spans the border: cut the text, not the tokens
            ids = tokenizer(text=texts[name], add_special_tokens=False)["input_ids"]
        stops = [place for place, token in enumerate(ids) if token in spec.stop_token_ids]
        if stops:
            ids = ids[: stops[0] + 1]  # a chat template may add something behind the end of the turn
        elif spec.stop_token_ids:
            ids = [*ids, spec.stop_token_ids[0]]
        responses.append(ids)
    return prompt, prompt_ids, responses
