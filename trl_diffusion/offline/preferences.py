"""Trajectories from preference data."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..fields import check_kind, check_one_of
from ..policies.forward import unwrap
from ..policies.loading import with_absent_tokens
from ..policies.prompts import read_chat_template_kwargs, tokenize_responses
from ..policies.spec import DiffusionSpec, impossible_token
from ..trajectories.dataset import OWN_COLUMNS, REWARD_PREFIX, to_rows
from ..trajectories.fingerprint import fingerprint_tokenizer
from .orders import ORDERS, DecodingOrder, finished_batch
from .replay import order_batches, order_provenance


def is_preference_dataset(dataset: Any) -> bool:
    """Whether a dataset has preferences in TRL's format: `chosen` and `rejected`."""
    return {"chosen", "rejected"} <= set(getattr(dataset, "column_names", None) or ())


def from_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec,
    decoding_order: DecodingOrder = "random",
    tokens_per_step: int = 1,
    temperature: float = 1.0,
    model: nn.Module | None = None,
    max_completion_length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """
    Makes a trajectory dataset of a preference dataset (https://huggingface.co/docs/trl/dataset_formats#preference). Each row
    has two responses: the chosen one, whose reward `preference` is 1, and the rejected one, whose reward is 0.

    Args:
        dataset ([`~datasets.Dataset`]):
            `chosen` and `rejected`, standard or conversational, with or without an explicit `prompt`.
        tokenizer (`PreTrainedTokenizerBase`):
            The policy's.
        spec ([`DiffusionSpec`]):
            Facts about the policy. With a `model`, `absent_token_ids` comes from the tokenizer if it is `None`.
        decoding_order (`str`, *optional*, defaults to `"random"`):
            The order that responses are given: `"random"`, `"left_to_right"` or `"confidence"` (see [`orders`]). With the
            last one, log-probabilities are recorded.
        tokens_per_step (`int`, *optional*, defaults to `1`):
            Tokens unmasked at a step.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the log-probabilities that `"confidence"` records.
        model (`nn.Module`, *optional*):
            The policy that `"confidence"` runs. The orders are kept in the cache of `datasets`, and read from there when the
            same policy, responses and settings are used again.
        max_completion_length (`int`, *optional*):
            Longest response in tokens. Longer ones are refused.
        batch_size (`int`, *optional*, defaults to `16`):
            Responses that `"confidence"` runs at once.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order `"random"`.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the chat template. Training needs the same ones.

    Raises:
        TypeError: if `dataset` is not a dataset.
        ValueError: naming the row, if a prompt or a response is empty, a response is too long, or one of them holds the mask
            token or a token that does not exist. Also for a column whose name a trajectory dataset needs, for an unknown
            `decoding_order`, and for `"confidence"` without a `model`.
        FloatingPointError: naming the row, if the policy's log-probabilities of a response are NaN or infinite.
    """
    check_kind("dataset", dataset, Dataset | IterableDataset, "a dataset of preference pairs")
    check_one_of("decoding_order", decoding_order, ORDERS)
    if decoding_order == "confidence" and model is None:
        raise ValueError("`decoding_order='confidence'` needs a `model`, which gives the order. Pass one.")
    kept = [name for name in dataset.column_names if name not in ("prompt", "chosen", "rejected")]
    taken = sorted(name for name in kept if name in OWN_COLUMNS or name.startswith(REWARD_PREFIX))
    if taken:
        raise ValueError(f"The dataset has columns that trajectories need for themselves: {taken}. Rename them.")
    template = read_chat_template_kwargs(chat_template_kwargs)
    vocab_size = None
    if model is not None:
        spec = with_absent_tokens(spec, unwrap(model).config, tokenizer)
        vocab_size = unwrap(model).config.get_text_config().vocab_size
    prompts, ids, responses = [], [], []
    for number, example in enumerate(dataset):
        try:
            prompt, prompt_ids, pair = _tokens_of(
                example, tokenizer, spec, vocab_size, max_completion_length, template
            )
        except ValueError as error:
            raise ValueError(f"Row {number}{error}") from error
        prompts.append(prompt)
        ids += [prompt_ids, prompt_ids]
        responses += pair

    recorded = decoding_order == "confidence"
    provenance = order_provenance(
        decoding_order, tokens_per_step, temperature, model, fingerprint_tokenizer(tokenizer), spec
    )
    size = max(batch_size // 2, 1) * 2
    starts = range(0, len(ids), size)
    batches = [finished_batch(ids[start : start + size], responses[start : start + size], spec) for start in starts]
    batches = order_batches(
        batches,
        provenance,
        model,
        seed,
        lambda number: f"Row {number // 2}, column `{('chosen', 'rejected')[number % 2]}`",
    )
    rows = [row for batch in batches for row in to_rows(batch, spec, 2, provenance, recorded)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return Dataset.from_dict(
        {
            "prompt": prompts,
            **{name: dataset[name] for name in kept},
            "row": list(range(len(rows))),
            **columns,
            "reward_preference": [[1.0, 0.0]] * len(rows),
        }
    )


def _tokens_of(
    example: Any,
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec,
    vocab_size: int | None,
    longest: int | None,
    template: dict[str, Any],
) -> tuple[Any, list[int], list[list[int]]]:
    """Prompt, its token ids, and those of the chosen and the rejected response. The message of a `ValueError` continues
    "Row N"."""
    for column in ("chosen", "rejected"):
        if not example[column]:
            raise ValueError(f", column `{column}` is empty.")
    prompt, prompt_ids, pair = tokenize_responses(tokenizer, example, spec, **template)
    if not prompt_ids:
        raise ValueError(" has an empty prompt.")
    found = impossible_token(prompt_ids, spec, vocab_size)
    if found is not None:
        raise ValueError(f": the prompt holds {found[1]}.")
    for column, response in zip(("chosen", "rejected"), pair, strict=True):
        found = impossible_token(response, spec, vocab_size)
        if found is not None:
            raise ValueError(f", column `{column}` holds {found[1]}.")
        if longest is not None and len(response) > longest:
            raise ValueError(
                f", column `{column}` has {len(response)} tokens, more than `max_completion_length={longest}`. Raise it, or "
                "drop long rows."
            )
    return prompt, prompt_ids, pair
