"""Prompts and answers as token ids, outside a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational, maybe_extract_prompt

from ..fields import check_kind
from ..utils import read_mapping
from .spec import DiffusionSpec


if TYPE_CHECKING:
    from transformers import BatchEncoding


def check_form(where: str, prompt: Any) -> None:
    """Raises a `ValueError` if a prompt is neither text nor a list of text messages."""
    if not prompt and not isinstance(prompt, int | float):
        raise ValueError(f"{where} has no prompt (it is {prompt!r}).")
    if isinstance(prompt, str):
        return
    messages = prompt if isinstance(prompt, list) else [prompt]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(prompt, list):
            raise ValueError(f"{where}: a prompt must be text or a list of messages, got {prompt!r}.")
        content = message.get("content")
        if message.get("role") is None or not isinstance(content, str | list):
            raise ValueError(f"{where}: a message must have a `role` and a `content`, got {message!r}.")
        if isinstance(content, list) and any(
            not isinstance(part, dict) or part.get("type") != "text" for part in content
        ):
            raise ValueError(f"{where}: diffusion policies here take text only, got {message!r}.")


# Arguments of `apply_chat_template` that are not variables of the template.
_OWN_ARGUMENTS = ("add_generation_prompt", "continue_final_message", "conversation", "return_dict", "tokenize")


def as_prompts(prompts: Any) -> list:
    """
    One or more prompts as a list.

    Args:
        prompts (`str` or iterable): a prompt (text, or a conversation, which is a list of messages, of which there may be a
            single one), or several.

    Raises:
        TypeError: if it is something else, such as a dataset instead of its column.
        ValueError: if there is none, or one is neither text nor a list of messages.
    """
    if isinstance(prompts, Dataset | IterableDataset):
        raise TypeError("`prompts` must be prompts, got a dataset: pass its column, dataset['prompt'].")
    # The column of a dataset is not a list.
    check_kind("prompts", prompts, Iterable, "text, a list of messages, or a list of prompts")
    prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    if not prompts:
        raise ValueError("There is no prompt to answer.")
    prompts = [prompts] if isinstance(prompts[0], Mapping) else prompts
    for row, prompt in enumerate(prompts):
        check_form(f"Prompt {row}", prompt)
    return prompts


def read_chat_template_kwargs(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Reads variables of the chat template, such as `enable_thinking`, in one of the forms that [`~utils.read_mapping`] takes.

    Raises:
        ValueError: if they cannot be read, or one of them is not for the template.
    """
    found = read_mapping(value, "chat_template_kwargs")
    taken = sorted(set(_OWN_ARGUMENTS) & set(found))
    if taken:
        raise ValueError(
            f"`chat_template_kwargs` holds {taken}, which this library sets itself: it is for variables of the chat template, "
            "such as `enable_thinking`. Leave them out."
        )
    return found


def is_started(prompt: Any) -> bool:
    """Whether a prompt is a conversation that ends with the beginning of an answer, which the policy continues."""
    return isinstance(prompt, list) and bool(prompt) and prompt[-1]["role"] == "assistant"


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, Any]], **template: Any) -> str:
    """
    The text of a conversation, as the policy continues it. It ends with the header of a new answer. If the conversation ends
    with the beginning of an answer, the text ends there.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        prompt (`list[dict]`): messages.
        template (`dict`): variables of the chat template.
    """
    return cast(str, tokenizer.apply_chat_template(prompt, **_opening(prompt), tokenize=False, **template))


def _opening(prompt: list[dict[str, Any]]) -> dict[str, Any]:
    started = is_started(prompt)
    return {"add_generation_prompt": not started, "continue_final_message": started}


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list, **template: Any) -> list[list[int]]:
    """
    Token ids of standard or conversational prompts, as [`DTRPOTrainer`] makes them. If the last message of a conversation is
    an assistant's, it is left open, and the policy continues it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        prompts (`list`): standard or conversational prompts.
        template (`dict`): variables of the chat template.

    Raises:
        TemplateRefusal: a `ValueError` that names the prompt, if the chat template does not take it.
    """
    ids = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids.append(tokenizer(text=prompt)["input_ids"])
            continue
        try:
            encoding = tokenizer.apply_chat_template(
                prompt, **_opening(prompt), tokenize=True, return_dict=True, **template
            )
        except (TemplateError, ValueError) as error:
            why = error if tokenizer.chat_template else ValueError("the tokenizer has none; text needs none")
            raise TemplateRefusal(row, prompt, why) from error
        ids.append(cast("BatchEncoding", encoding)["input_ids"])
    return ids


class TemplateRefusal(ValueError):
    """
    The chat template does not accept a conversation.

    Attributes:
        row (`int`): place of the conversation among the prompts.
        reason (`str`): what the template says.
    """

    def __init__(self, row: int, prompt: list[dict[str, Any]], error: Exception):
        roles = [message.get("role") for message in prompt]
        self.row, self.reason = row, f"the chat template does not take a conversation of {roles} ({error})"
        super().__init__(f"Prompt {row}: {self.reason}. Use another chat template, or other prompts.")


def _texts_of(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any], template: dict[str, Any]) -> dict[str, str]:
    """Text of the prompt and of each response of a conversational row. The responses continue an answer that was begun."""
    prompt = example["prompt"]
    if not is_started(prompt):
        return apply_chat_template(dict(example), tokenizer, **template)
    texts = {"prompt": render_prompt(tokenizer, prompt, **template)}
    for name in _responses_in(example):
        first, *others = example[name]
        if not isinstance(prompt[-1]["content"], str) or not isinstance(first.get("content"), str):
            raise ValueError(
                f", column `{name}`: a prompt that ends with the beginning of an answer must be of text alone."
            )
        answer = {**prompt[-1], "content": prompt[-1]["content"] + first["content"]}
        whole = cast(str, tokenizer.apply_chat_template([*prompt[:-1], answer, *others], tokenize=False, **template))
        if not whole.startswith(texts["prompt"]):
            raise ValueError(
                f", column `{name}`: the chat template does not keep the beginning of the answer, {prompt[-1]['content']!r}."
            )
        texts[name] = whole.removeprefix(texts["prompt"])
    return texts


def _responses_in(example: dict[str, Any]) -> tuple[str, ...]:
    """The columns with responses, in TRL's formats of preferences, and of prompts with a completion."""
    return ("chosen", "rejected") if "chosen" in example else ("completion",)


def tokenize_responses(
    tokenizer: PreTrainedTokenizerBase, example: dict[str, Any], spec: DiffusionSpec, **template: Any
) -> tuple[Any, list[int], list[list[int]]]:
    """
    A row of a preference dataset (https://huggingface.co/docs/trl/dataset_formats#preference), or a prompt with a completion, as token
    ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        example (`dict`): `chosen` and `rejected`, standard or conversational, with or without an explicit `prompt`; or `prompt` and
            `completion`.
        spec ([`DiffusionSpec`]): a response that does not end with one of its stop tokens gets the first one.
        template (`dict`): variables of the chat template.

    Returns:
        The prompt as it is in a prompt dataset, its token ids, and those of each response (the chosen one first).
    """
    names = ("prompt", *_responses_in(example))
    example = maybe_extract_prompt({key: example[key] for key in names if key in example})
    prompt = example["prompt"]
    prompt_ids = tokenize_prompts(tokenizer, [prompt], **template)[0]
    conversational = is_conversational(example)
    texts: dict[str, Any] = _texts_of(tokenizer, example, template) if conversational else example
    responses = []
    for name in _responses_in(example):
        whole = tokenizer(text=texts["prompt"] + texts[name], add_special_tokens=not conversational)["input_ids"]
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
        template (`dict`): variables of the chat template.

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
    rendered = render_prompt(tokenizer, prompt, **template)
    for number, message in enumerate(prompt):
        texts = [f"0{text}0" for text in _texts(message)]
        if message["role"] == "assistant" or not texts:
            continue
        content = (
            texts[0] if isinstance(message["content"], str) else [{"type": "text", "text": text} for text in texts]
        )
        changed = [*prompt[:number], {**message, "content": content}, *prompt[number + 1 :]]
        if render_prompt(tokenizer, changed, **template) == rendered:
            raise ValueError(
                f"Row {row}: the chat template drops the message of {message['role']!r}, whatever it says; the prompt "
                f"becomes {rendered[:200]!r}. Use another chat template, or another role."
            )
