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


def check_visible(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    prompt_ids: list[list[int]],
    first_row: int = 0,
    forms: set | None = None,
    **template: Any,
) -> None:
    """
    Checks that the policy sees the prompts: that their text is not made of unknown tokens alone, and that the chat
    template keeps the messages. The template is tried on the first conversation of each form (roles of the messages, and
    text or parts).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        prompts (`list`): standard or conversational prompts.
        prompt_ids (`list[list[int]]`): their token ids.
        first_row (`int`, *optional*, defaults to `0`): row of the first one, for the message.
        forms (`set`, *optional*): forms that were tried before; those that are tried now are added.
        template (`dict`): arguments of the chat template.

    Raises:
        ValueError: naming the row.
    """
    forms = set() if forms is None else forms
    unknown = tokenizer.unk_token_id
    for row, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True), start=first_row):
        texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in _texts(message)]
        if unknown is not None and unknown in ids:
            found = tokenizer(text="".join(texts), add_special_tokens=False)["input_ids"]
            if found and all(token == unknown for token in found):
                raise ValueError(
                    f"Row {row}: the tokenizer knows nothing of the prompt, which becomes {len(found)} times "
                    f"{tokenizer.unk_token!r}. Is this the tokenizer for this data?"
                )
        if isinstance(prompt, str):
            continue
        form = tuple((message["role"], type(message["content"])) for message in prompt)
        if form not in forms:
            forms.add(form)
            _check_template(tokenizer, prompt, row, template)


def _texts(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content or ()]


def _check_template(tokenizer: PreTrainedTokenizerBase, prompt: list, row: int, template: dict[str, Any]) -> None:
    """Raises a `ValueError` if the chat template drops a message. Answers may be shortened, as by their thoughts."""

    def render(messages: list) -> str:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template)
        return cast(str, found)

    rendered = render(prompt)
    for number, message in enumerate(prompt):
        texts = [f"0{text}0" for text in _texts(message)]
        if message["role"] == "assistant" or not texts:
            continue
        content = (
            texts[0] if isinstance(message["content"], str) else [{"type": "text", "text": text} for text in texts]
        )
        if render([*prompt[:number], {**message, "content": content}, *prompt[number + 1 :]]) == rendered:
            raise ValueError(
                f"Row {row}: the chat template drops the message of {message['role']!r}, whatever it says; the prompt "
                f"becomes {rendered[:200]!r}. Use another chat template, or another role."
            )
