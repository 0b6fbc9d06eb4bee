"""Importing existing responses: prompts, responses and perhaps rewards in, a collection on disk out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..decoding.decode import check_prompts
from ..fields import check_at_least, is_number
from ..policies.prompts import (
    TemplateRefusal,
    check_form,
    check_visible,
    read_chat_template_kwargs,
    tokenize_responses,
)
from ..policies.spec import DiffusionSpec, impossible_token
from ..rewards.call import RewardCaller, RewardFunc
from ..trajectories.dataset import OWN_COLUMNS, REWARD_PREFIX, Provenance
from ..trajectories.fingerprint import fingerprint_tokenizer
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import check_writable
from .collection import Collection, Jobs, Progress
from .orders import finished_batch


SEVERAL, SINGLE = ("responses", "rewards", "finish_reasons"), ("response", "reward", "finish_reason")
ENDED, CUT = ("stop", "", None), "length"  # why a response ends, as the OpenAI API calls it
GIVEN = "given"  # the name of rewards without a name


@dataclass
class Group:
    """
    A prompt and the responses to it.

    Attributes:
        where (`str`): the file and the row of the first response, for errors.
        prompt: text or messages.
        columns (`dict`): the other columns.
        texts (`list[str]`): the responses.
        rewards (`dict[str, list]`): rewards by name, one for each response; None where there is none.
        cut (`list[bool]`): whether each response is cut off, and has no stop token.
        prompt_ids (`list[int]`): the token ids of the prompt.
        ids (`list[list[int]]`): the token ids of each response.
    """

    where: str
    prompt: Any
    columns: dict[str, Any]
    texts: list[str]
    rewards: dict[str, list[float | None]]
    cut: list[bool]
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)


def import_responses(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec,
    config: PretrainedConfig,
    output_dir: str | Path,
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
    max_new_tokens: int | None = None,
    rows_per_shard: int = 64,
    source: str = "rows",
    disable_tqdm: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Path:
    """
    Writes existing responses as a collection, for offline training. The order of their tokens is unknown: `decoding_order` of
    training chooses one.

    Args:
        rows (`Sequence[dict]`):
            A row has a `prompt` (text or messages), and either `responses` (a list of texts) or `response` (a text). Rows with
            `response` and the same prompt form a group.

            A row with `responses` may have `rewards` (a list of numbers, one for each response, or an object of such lists) and
            `finish_reasons` (a list). A row with `response` may have `reward` (a number, or an object of numbers) and
            `finish_reason`. A response gets the stop token of the policy, unless its reason is `"length"`, that is, unless it
            was cut off. Other columns are kept, and passed to the reward functions.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`~transformers.PretrainedConfig`]): its config.
        output_dir (`str` or `Path`): a new directory, or that of an interrupted import.
        reward_funcs (*optional*): reward functions, as for [`collect`], in addition to the rewards of the rows.
        max_new_tokens (`int`, *optional*): largest number of tokens of a response. Longer ones are refused.
        rows_per_shard (`int`, *optional*, defaults to `64`): prompts in a shard.
        source (`str`, *optional*): where the rows are from, for errors and the card.
        disable_tqdm, chat_template_kwargs (*optional*): as for [`collect`].

    Returns:
        `output_dir` as a `Path`.

    Raises:
        ValueError: naming `source` and the row, if a row has another form, or holds a response that cannot be trained on.
    """
    template = read_chat_template_kwargs(chat_template_kwargs)
    check_at_least("rows_per_shard", rows_per_shard)
    check_writable(output_dir, "output_dir")
    caller = None
    if reward_funcs is not None:
        caller = RewardCaller(reward_funcs, chat_template_kwargs=template)
    groups = _groups(rows, source)
    names = _reward_names(groups, caller, source)
    for group in groups:
        _tokenize(group, tokenizer, spec, config, max_new_tokens, template)
    provenance = Provenance(None, fingerprint_tokenizer(tokenizer), spec, {"decoder": "file", "order": None})
    prompt_ids = [group.prompt_ids for group in groups]
    digest = xxhash.xxh3_128_hexdigest(repr([(group.ids, group.rewards) for group in groups]).encode())

    def answer(shards: list[Jobs], progress: Progress) -> Iterator[TrajectoryBatch]:
        for jobs in shards:
            found = [groups[row].ids[response] for row, response in jobs]
            progress.add(len(jobs), sum(map(len, found)))
            yield finished_batch([prompt_ids[row] for row, _ in jobs], found, spec)

    prompts = Dataset.from_list([{"prompt": group.prompt, **group.columns} for group in groups])
    collection = Collection(
        Path(output_dir), prompts, prompt_ids, [len(group.texts) for group in groups], tokenizer, caller, provenance,
        f"unknown: the responses are from {source}", rows_per_shard, template=template,
        given={name: [group.rewards[name] for group in groups] for name in names}, more={"responses_fingerprint": digest},
    )  # fmt: skip
    return collection.make(answer, disable_tqdm)


def _groups(rows: Sequence[dict[str, Any]], source: str) -> list[Group]:
    """The prompts in the order in which they come first, each with its responses."""
    found: dict[str, Group] = {}
    for number, row in enumerate(rows):
        where = f"{source}, row {number}"
        group = _group(row, where)
        several = "responses" in row
        before = found.get(repr(group.prompt))
        if before is None or several:
            key = f"{number}" if several else repr(group.prompt)
            found[key] = group
            continue
        if group.columns != before.columns or list(group.rewards) != list(before.rewards):
            raise ValueError(
                f"{where}: has the same prompt as {before.where}, but other columns or rewards. Make them the same, or give all "
                "`responses` in one row."
            )
        before.texts += group.texts
        before.cut += group.cut
        for name, values in group.rewards.items():
            before.rewards[name] += values
    if not found:
        raise ValueError(f"{source} has no rows.")
    groups = list(found.values())
    for group in groups:
        if set(group.columns) != set(groups[0].columns):
            raise ValueError(
                f"{group.where}: has the columns {sorted(group.columns)}, and {groups[0].where} has {sorted(groups[0].columns)}. Every "
                "row needs the same ones."
            )
    return groups


def _group(row: dict[str, Any], where: str) -> Group:
    """The prompt, the responses and the rewards of a row."""
    check_form(where, row.get("prompt"))
    if ("responses" in row) == ("response" in row):
        raise ValueError(
            f"{where}: needs either `responses`, a list of texts, or `response`, a text; it has {sorted(row)}."
        )
    texts_of, rewards_of, reasons_of = SEVERAL if "responses" in row else SINGLE
    others = zip((SINGLE if "responses" in row else SEVERAL)[1:], (rewards_of, reasons_of), strict=True)
    texts = row[texts_of] if texts_of == "responses" else [row[texts_of]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{where}, `{texts_of}`: must be text that is not empty, got {row[texts_of]!r:.80}.")
    for other, own in others:
        if other in row:
            raise ValueError(f"{where}: `{other}` does not go with `{texts_of}`; use `{own}`.")
    columns = {name: value for name, value in row.items() if name not in ("prompt", texts_of, rewards_of, reasons_of)}
    taken = sorted(name for name in columns if name in OWN_COLUMNS or name.startswith(REWARD_PREFIX))
    if taken:
        raise ValueError(f"{where}: trajectories need the columns {taken} for themselves. Rename them.")
    rewards = _rewards(row.get(rewards_of), rewards_of, len(texts), where)
    return Group(
        where, row["prompt"], columns, list(texts), rewards, _cut(row.get(reasons_of), reasons_of, len(texts), where)
    )


def _cut(value: Any, name: str, count: int, where: str) -> list[bool]:
    """Whether each response of a row is cut off."""
    reasons = [None] * count if value is None else [value] if name == SINGLE[2] else value
    if not isinstance(reasons, list) or len(reasons) != count or not all(one in (*ENDED, CUT) for one in reasons):
        raise ValueError(
            f'{where}, `{name}`: must be "stop", "length" or null for each of {count} responses, got {value!r:.80}.'
        )
    return [one == CUT for one in reasons]


def _rewards(value: Any, name: str, count: int, where: str) -> dict[str, list[float | None]]:
    """The rewards of a row, by name: a finite number, or None, for each response."""
    if value is None:
        return {}
    named = value if isinstance(value, dict) else {GIVEN: value}
    found = {}
    for key, values in named.items():
        values = [_number(values)] if name == "reward" else values
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"{where}, `{name}`: must be a number for each of {count} responses, got {values!r:.80}.")
        for one in values:
            if one is not None and not (is_number(one) and math.isfinite(one) and abs(one) < 3e38):
                raise ValueError(f"{where}, `{name}`: a reward is a finite number or null, got {one!r:.80}.")
        found[str(key)] = [None if one is None else float(one) for one in values]
    return found


def _number(value: Any) -> Any:
    """Turns text into a number, since the numbers of a CSV file are text. Anything else is returned as it is."""
    try:
        return (float(value) if value.strip() else None) if isinstance(value, str) else value
    except ValueError:
        return value


def _reward_names(groups: list[Group], caller: RewardCaller | None, source: str) -> list[str]:
    """The names of the rewards that the rows have, which must be the same in all of them."""
    names = list(groups[0].rewards)
    for group in groups:
        if set(group.rewards) != set(names):
            raise ValueError(
                f"{group.where}: has the rewards {sorted(group.rewards)}, and {groups[0].where} has {sorted(names)}. Every row needs "
                "the same ones; null stands for none."
            )
    twice = sorted(set(names) & set(caller.names if caller else ()))
    if twice:
        raise ValueError(
            f"{source} has rewards {twice}, which are also names of reward functions. Leave one of the two out."
        )
    if not names and caller is None:
        raise ValueError(f"{source} has no rewards: add `rewards` to each row, or give `--reward_funcs`.")
    return names


def _tokenize(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec,
    config: PretrainedConfig,
    max_new_tokens: int | None,
    template: dict[str, Any],
) -> None:
    """Fills in the token ids of a group. Raises a `ValueError` that names its row."""
    conversational = not isinstance(group.prompt, str)
    vocab_size = config.get_text_config().vocab_size
    for number, text in enumerate(group.texts):
        response = [{"role": "assistant", "content": text}] if conversational else text
        example = {"prompt": group.prompt, "completion": response}
        try:
            _, group.prompt_ids, (ids,) = tokenize_responses(tokenizer, example, spec, **template)
        except TemplateRefusal as error:
            raise ValueError(f"{group.where}: {error.reason}.") from error
        except ValueError as error:
            raise ValueError(f"{group.where}, response {number}: cannot be tokenized ({error}).") from error
        if group.cut[number] and ids[-1] in spec.stop_token_ids:
            ids = ids[:-1]
        found = impossible_token(ids, spec, vocab_size)
        if found is not None:
            raise ValueError(f"{group.where}, response {number}: holds {found[1]}.")
        if max_new_tokens is not None and len(ids) > max_new_tokens:
            raise ValueError(
                f"{group.where}, response {number}: has {len(ids)} tokens, more than `--max_completion_length` "
                f"({max_new_tokens}). Raise it, or drop the response."
            )
        group.ids.append(ids)
    try:
        check_prompts([group.prompt_ids], spec, config, max(map(len, group.ids)))
        check_visible(tokenizer, [group.prompt], [group.prompt_ids], **template)
    except ValueError as error:
        raise ValueError(f"{group.where}: {error}") from error
