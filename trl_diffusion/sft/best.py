"""The best responses of a collection, as documents for supervised fine-tuning: rejection sampling."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from datasets import Dataset

from ..trajectories.dataset import REWARD_PREFIX, completions_of, is_trajectory_dataset, reward_columns
from .documents import IGNORED


def best_responses(dataset: Dataset, tokenizer_fingerprint: str | None = None) -> Dataset:
    """
    The best response of each group, if its reward is above the mean of the group. The reward of a response is the sum of what the
    reward functions gave it. Responses without a reward do not count. If two best responses have the same prompt and the same
    tokens, one is kept.

    Args:
        dataset ([`~datasets.Dataset`]):
            Trajectories, as [`load_trajectories`] loads them.
        tokenizer_fingerprint (`str`, *optional*):
            Fingerprint of the policy's tokenizer.

    Returns:
        [`~datasets.Dataset`] with `input_ids`, the tokens of a prompt and its response, and `labels`, which leave the prompt out.

    Raises:
        ValueError: if the dataset holds no trajectories, was made with another tokenizer, or has no response that is better than
            the mean of its group.
    """
    if not is_trajectory_dataset(dataset):
        raise ValueError(f"This is no trajectory dataset: it has the columns {sorted(dataset.column_names)}.")
    columns = [REWARD_PREFIX + name for name in reward_columns(dataset)]
    needed = ("prompt_ids", "tokenizer_fingerprint", "event_positions", "event_tokens", "completion_lengths")
    found: dict[tuple, None] = {}
    for number, row in enumerate(dataset.select_columns([*needed, *columns])):
        made_with = row["tokenizer_fingerprint"]
        if tokenizer_fingerprint is not None and made_with != tokenizer_fingerprint:
            raise ValueError(
                f"Row {number}, column `tokenizer_fingerprint`: is {made_with}, but the tokenizer in use has "
                f"{tokenizer_fingerprint}: token ids mean something else. Train with the tokenizer that the data was made with."
            )
        best = _best(_totals([row[name] for name in columns]))
        if best is not None:
            found[tuple(row["prompt_ids"]), tuple(completions_of(row)[best])] = None
    if not found:
        raise ValueError(
            f"In each of the {len(dataset)} groups all responses have the same reward, so none is better than the mean of its "
            "group. Collect with a higher temperature, other prompts, or a reward that tells responses apart."
        )
    return Dataset.from_dict(
        {
            "input_ids": [[*prompt, *completion] for prompt, completion in found],
            "labels": [[*len(prompt) * [IGNORED], *completion] for prompt, completion in found],
        }
    )


def _totals(rewards: list[list[Any]]) -> list[float | None]:
    """The sum of the rewards of each response of a group, without those that do not apply. `None` if none applies."""
    totals = []
    for values in zip(*rewards, strict=True):
        known = [value for value in values if value is not None]
        totals.append(sum(known) if known else None)
    return totals


def _best(totals: list[float | None]) -> int | None:
    """The first of the best responses of a group, if it is better than the mean."""
    known = [total for total in totals if total is not None]
    if not known or math.isclose(max(known), fmean(known), rel_tol=1e-9, abs_tol=1e-12):
        return None
    return totals.index(max(known))
