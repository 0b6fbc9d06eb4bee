"""
Trajectories on disk: one row per prompt with its group of responses, each an event log.

| column | type | meaning |
|---|---|---|
| `prompt` and others | any | the columns of the prompt dataset |
| `format_version` | int | version of this format |
| `row` | int | row of the prompt dataset |
| `prompt_ids` | list of int | token ids of the prompt |
| `canvas_lengths`, `completion_lengths` | list of int | for each response, positions of the canvas, and tokens that count |
| `event_steps`, `event_positions`, `event_tokens` | list of list of int | for each response and each token written or erased: \
decoding step, counted from 0 inside its block; position in the canvas; token id, which is the mask token if the position was \
erased |
| `event_logps` | list of list of float, or null | log-probability, in nats, that the decoding policy gave the token, 0 for an \
erasure; null if it was not recorded |
| `reward_NAME` | list of float | for each response, the reward of the function `NAME`; null if the function does not apply |
| `policy_fingerprint`, `tokenizer_fingerprint` | string | the policy and the tokenizer that made it |
| `spec`, `decoding` | string | [`DiffusionSpec`] and settings of the decoder, as JSON |

A position without an event was never unmasked. Events are sorted by block, step and position. If the order is unknown, as for
text that was written elsewhere, `order` in `decoding` is null and all steps are 0.

Rows of a decoder that takes no token back have version 1: every position has at most one event. Rows of a decoder that
revises have version 2: a position may be written, erased and written again. With full attention, their steps are counted over
the whole response, and events are sorted by step and position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from ..fields import check_kind
from ..policies.spec import DiffusionSpec, impossible_token
from ..utils import read_record
from .revisions import NEVER, Revisions
from .trajectory import TrajectoryBatch, event_regions


FORMAT_VERSION, REVISED_VERSION = 1, 2
EVENTS = ("event_steps", "event_positions", "event_tokens", "event_logps")
OWN_COLUMNS = (
    "format_version", "row", "prompt_ids", "canvas_lengths", "completion_lengths", *EVENTS, "policy_fingerprint",
    "tokenizer_fingerprint", "spec", "decoding",
)  # fmt: skip
REWARD_PREFIX = "reward_"


@dataclass(frozen=True)
class Provenance:
    """Where trajectories come from: the values of the columns of the same names."""

    policy_fingerprint: str | None
    tokenizer_fingerprint: str
    spec: DiffusionSpec
    decoding: dict[str, Any]

    def columns(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "policy_fingerprint": self.policy_fingerprint,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "spec": json.dumps(self.spec.to_dict(), sort_keys=True),
            "decoding": json.dumps(self.decoding, sort_keys=True),
        }


def is_trajectory_dataset(dataset: Dataset | IterableDataset | None) -> bool:
    """Whether a dataset holds trajectories and not prompts."""
    return {"format_version", "event_steps"} <= set(getattr(dataset, "column_names", None) or ())


def is_unordered(decoding: Mapping[str, Any]) -> bool:
    """Whether stored settings of the decoder say that the order in which the tokens were written is unknown."""
    return "order" in decoding and decoding["order"] is None


def has_unordered(dataset: Dataset | IterableDataset | None) -> bool:
    """Whether a dataset holds stored responses whose order is unknown. Their steps are all 0."""
    if (
        not isinstance(dataset, Dataset)
        or not is_trajectory_dataset(dataset)
        or "decoding" not in dataset.column_names
    ):
        return False
    return any(is_unordered(_mapping(text)) for text in set(dataset["decoding"]))


def _mapping(text: Any) -> dict[str, Any]:
    """Parses a JSON object. Anything else gives an empty one; [`check_trajectories`] reports it."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def reward_columns(dataset: Dataset) -> list[str]:
    """Names of the stored rewards, without their prefix, in the order of the columns."""
    return [name.removeprefix(REWARD_PREFIX) for name in dataset.column_names if name.startswith(REWARD_PREFIX)]


def to_rows(
    batch: TrajectoryBatch, spec: DiffusionSpec, num_responses: int, provenance: Provenance, recorded: bool = True
) -> list[dict[str, Any]]:
    """
    Rows of this format. `num_responses` neighbours of a batch, which respond to the same prompt, form a row. The caller
    adds the columns of the prompt dataset and the rewards. `recorded`: whether log-probabilities were recorded; if not,
    `event_logps` is null.
    """
    batch = batch.to("cpu")
    regions = event_regions(spec, batch)
    version = FORMAT_VERSION if batch.revisions is None else REVISED_VERSION
    rows = []
    for begin in range(0, len(batch), num_responses):
        row: dict[str, Any] = {**provenance.columns(), "format_version": version}
        row["prompt_ids"] = batch.prompt_ids[begin][batch.prompt_mask[begin] > 0].tolist()
        members = range(begin, begin + num_responses)
        row["canvas_lengths"] = batch.canvas_lengths[begin : begin + num_responses].tolist()
        row["completion_lengths"] = batch.completion_lengths[begin : begin + num_responses].tolist()
        events: dict[str, list] = {name: [] for name in EVENTS}
        for member in members:
            for name, values in zip(EVENTS, _events(batch, regions, spec.mask_token_id, member), strict=True):
                events[name].append(values)
        row.update(events)
        if not recorded:
            row["event_logps"] = None
        rows.append(row)
    return rows


def _events(batch: TrajectoryBatch, regions: Tensor, mask_token_id: int, row: int) -> list[list]:
    """Steps, positions, tokens and log-probabilities of the writes and erasures of a response."""
    written_at = (batch.event_steps[row] != NEVER).nonzero().squeeze(1)
    columns = [
        values[row, written_at].tolist()
        for values in (regions, batch.event_steps, batch.event_positions, batch.event_ids, batch.event_logps)
    ]
    events = list(zip(*columns, strict=True))
    if batch.revisions is not None:
        written = {event[1:3] for event in events}  # step and position
        width = batch.canvas_ids.shape[1]
        taken_back = zip(batch.revisions.steps[row].tolist(), batch.revisions.until[row].tolist(),
                         batch.revisions.positions[row].tolist(), regions[row, width:].tolist(), strict=True)  # fmt: skip
        events += [
            (region, until, position, mask_token_id, 0.0)
            for step, until, position, region in taken_back
            if step != NEVER and (until, position) not in written
        ]
    events.sort()
    return [list(values) for values in list(zip(*events, strict=True))[1:]] if events else [[], [], [], []]


def completions_of(row: dict[str, Any]) -> list[list[int]]:
    """The token ids of each completion of a row of this format."""
    found = []
    for positions, tokens, length in zip(
        row["event_positions"], row["event_tokens"], row["completion_lengths"], strict=True
    ):
        by_position = dict(zip(positions, tokens, strict=True))
        found.append([by_position[position] for position in range(length)])
    return found


def from_rows(responses: Iterable[tuple[dict[str, Any], int]], spec: DiffusionSpec) -> TrajectoryBatch:
    """
    A batch of stored responses.

    Args:
        responses (iterable of `(row, index)`): a row of this format and the number of a response in it.
        spec ([`DiffusionSpec`]): facts about the policy; its mask token fills positions that were never unmasked.

    Returns:
        [`TrajectoryBatch`], with prompts padded on the left and canvases on the right. Log-probabilities are 0 if none were
        recorded.
    """
    responses = list(responses)
    prompt_width = max(len(row["prompt_ids"]) for row, _ in responses)
    width = max(row["canvas_lengths"][index] for row, index in responses)
    count = len(responses)
    prompt_ids = np.zeros((count, prompt_width), dtype=np.int64)
    prompt_mask = np.zeros((count, prompt_width), dtype=np.int64)
    canvas = np.full((count, width), spec.mask_token_id, dtype=np.int64)
    steps = np.full((count, width), NEVER, dtype=np.int64)
    logps = np.zeros((count, width), dtype=np.float32)
    taken_back: dict[str, list] = {name: [] for name in ("rows", *(one.name for one in fields(Revisions)))}
    for place, (row, index) in enumerate(responses):
        ids = row["prompt_ids"]
        prompt_ids[place, prompt_width - len(ids) :] = ids
        prompt_mask[place, prompt_width - len(ids) :] = 1
        positions, tokens, times = (row[name][index] for name in ("event_positions", "event_tokens", "event_steps"))
        values = row["event_logps"][index] if row["event_logps"] is not None else [0.0] * len(positions)
        if row["format_version"] != REVISED_VERSION:
            canvas[place, positions], steps[place, positions], logps[place, positions] = tokens, times, values
            continue
        for position, token, time, logp in zip(positions, tokens, times, values, strict=True):
            if steps[place, position] != NEVER:
                gone = (place, position, canvas[place, position], steps[place, position], time, logps[place, position])
                for name, value in zip(taken_back, gone, strict=True):
                    taken_back[name].append(value)
            canvas[place, position], logps[place, position] = token, logp
            steps[place, position] = NEVER if token == spec.mask_token_id else time
    revisions = None
    if any(row["format_version"] == REVISED_VERSION for row, _ in responses):
        found = {name: torch.tensor(np.array(values, dtype=float)) for name, values in taken_back.items()}
        revisions = Revisions.collect(found.pop("rows").long(), count, **found)
    return TrajectoryBatch(
        prompt_ids=torch.from_numpy(prompt_ids),
        prompt_mask=torch.from_numpy(prompt_mask),
        canvas_ids=torch.from_numpy(canvas),
        steps=torch.from_numpy(steps),
        logps=torch.from_numpy(logps),
        canvas_lengths=torch.tensor([row["canvas_lengths"][index] for row, index in responses]),
        completion_lengths=torch.tensor([row["completion_lengths"][index] for row, index in responses]),
        revisions=revisions,
    )


def check_trajectories(
    dataset: Dataset, spec: DiffusionSpec, vocab_size: int, tokenizer_fingerprint: str | None = None
) -> None:
    """
    Checks every row of a trajectory dataset.

    Raises:
        ValueError: with the row and the column, if

            - a column is missing, or the format version is unknown;
            - the tokenizer was another one, or the policy denoised in another way (mask token, block size, ...);
            - lengths disagree, or a position of a completion is masked in the end;
            - a position has two events, and the decoder did not revise; or an event contradicts those before it;
            - rows have different format versions;
            - the steps of a block are not counted from 0;
            - a token is the mask token, outside the vocabulary or unknown to the tokenizer;
            - log-probabilities were recorded with other tokens in the softmax;
            - a log-probability is positive, infinite or NaN;
            - a reward is neither a finite number nor null.
    """
    missing = sorted(set(OWN_COLUMNS) - {"row"} - set(dataset.column_names))
    if missing:
        raise ValueError(
            f"This trajectory dataset lacks the columns {missing}; it has {sorted(dataset.column_names)}."
        )
    rewards = [REWARD_PREFIX + name for name in reward_columns(dataset)]
    wanted = dataset.select_columns([*(name for name in OWN_COLUMNS if name in dataset.column_names), *rewards])
    version = None
    for number, row in enumerate(wanted):
        _check_row(row, number, spec, vocab_size, tokenizer_fingerprint, rewards)
        version = row["format_version"] if version is None else version
        if row["format_version"] != version:
            raise ValueError(
                f"Row {number}, column `format_version`: is {row['format_version']}, but row 0 has {version}. Responses of a "
                "decoder that takes tokens back and of one that does not cannot be in one dataset. Train on one after the "
                "other."
            )


def _check_row(row, number, spec, vocab_size, tokenizer_fingerprint, rewards) -> None:
    def refuse(column: str, why: str, response: int | None = None):
        where = f"Row {number}, column `{column}`" + ("" if response is None else f", response {response}")
        raise ValueError(f"{where}: {why}")

    if row["format_version"] not in (FORMAT_VERSION, REVISED_VERSION):
        refuse(
            "format_version",
            f"is {row['format_version']!r}; this version of trl_diffusion reads {FORMAT_VERSION} and {REVISED_VERSION}.",
        )
    if tokenizer_fingerprint is not None and row["tokenizer_fingerprint"] != tokenizer_fingerprint:
        refuse(
            "tokenizer_fingerprint",
            f"is {row['tokenizer_fingerprint']}, but the tokenizer in use has {tokenizer_fingerprint}: token ids mean "
            "something else. Train with the tokenizer that the data was made with.",
        )
    try:
        stored = DiffusionSpec.from_dict(json.loads(row["spec"]))
    except (AttributeError, TypeError, ValueError) as error:
        refuse("spec", f"cannot be read ({error}).")
    try:
        decoding = json.loads(row["decoding"])
    except (TypeError, ValueError) as error:
        refuse("decoding", f"cannot be read ({error}).")
    if not isinstance(decoding, dict):
        refuse("decoding", f"must be a JSON object, got {row['decoding']!r:.80}.")
    names = (
        "mask_token_id",
        "attention",
        "clean_attention",
        "block_size",
        "block_origin",
        "token_shift",
        "first_token",
    )
    for name in names:
        if getattr(stored, name) != getattr(spec, name):
            refuse(
                "spec",
                f"`{name}` was {getattr(stored, name)!r} when this was made; now it is {getattr(spec, name)!r}.",
            )
    for name in ("predicts_mask_token", "absent_token_ids"):
        then, now = (getattr(facts, name) or () for facts in (stored, spec))
        if row["event_logps"] is not None and then != now:
            refuse(
                "spec",
                f"`{name}` was {then!r} when these log-probabilities were recorded; now it is {now!r}, and other tokens "
                f"share the softmax. Collect again, or set it as it was with `diffusion_spec`.",
            )
    if not row["prompt_ids"]:
        refuse("prompt_ids", "is empty.")
    found = impossible_token(row["prompt_ids"], spec, vocab_size)
    if found is not None:
        refuse("prompt_ids", f"position {found[0]} holds {found[1]}.")
    count = len(row["canvas_lengths"] or ())
    if count == 0:
        refuse("canvas_lengths", "holds no response.")
    for column in ("completion_lengths", *EVENTS, *rewards):
        values = row[column]
        if values is None and column == "event_logps":
            continue
        if values is None or len(values) != count:
            refuse(column, f"holds {'nothing' if values is None else len(values)} for {count} responses.")
    for column in rewards:
        for index, value in enumerate(row[column]):
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                refuse(column, f"is {value!r}; a reward is a finite number, or null where it does not apply.", index)
    prompt_length = len(row["prompt_ids"])
    for index in range(count):
        _check_response(row, index, spec, vocab_size, prompt_length, refuse)


def _check_response(row, index, spec, vocab_size, prompt_length, refuse) -> None:
    length, counted = row["canvas_lengths"][index], row["completion_lengths"][index]
    steps, positions, tokens = (np.asarray(row[name][index], dtype=np.int64) for name in EVENTS[:3])
    for column, values in (("event_steps", steps), ("event_tokens", tokens)):
        if len(values) != len(positions):
            refuse(column, f"holds {len(values)} events, but `event_positions` {len(positions)}.", index)
    if not 0 < counted <= length:
        refuse("completion_lengths", f"is {counted}, with a canvas of {length} positions.", index)
    if len(positions) and (positions.min() < 0 or positions.max() >= length):
        refuse("event_positions", f"holds a position outside the canvas of {length}.", index)
    revises = row["format_version"] == REVISED_VERSION
    written = tokens != spec.mask_token_id if revises else np.ones(len(tokens), dtype=bool)
    found = impossible_token(tokens[written], spec, vocab_size)
    if found is not None:
        refuse("event_tokens", f"position {int(positions[written][found[0]])} holds {found[1]}.", index)
    if (steps < 0).any():
        refuse("event_steps", f"holds the step {int(steps.min())}.", index)
    covered = np.bincount(positions[written], minlength=length)
    if not revises and (covered > 1).any():
        refuse("event_positions", f"unmasks position {int(covered.argmax())} twice.", index)
    if revises:
        covered = _replay(positions, steps, written, length, lambda why: refuse("event_positions", why, index))
        again = np.flatnonzero(np.bincount(positions, minlength=length) > 1)
        first = again[spec.place_of(prompt_length + again, prompt_length) == 0]
        if spec.first_token == "autoregressive" and len(first):
            refuse(
                "event_positions",
                f"takes back position {first[0]}, which is the autoregressive first one of its block.",
                index,
            )
    if (covered[:counted] == 0).any():
        where = int((covered[:counted] == 0).argmax())
        refuse("event_positions", f"leaves position {where} of the response masked; {counted} tokens count.", index)
    blocks = spec.block_of(prompt_length + positions, prompt_length)
    if revises and spec.attention == "full":
        blocks = np.zeros_like(blocks)  # steps are counted over the whole response
    for block in np.unique(blocks):
        own = np.unique(steps[blocks == block])
        if own[0] != 0 or own[-1] != len(own) - 1:
            refuse("event_steps", f"block {int(block)} has the steps {own.tolist()}; they must count from 0.", index)
    if row["event_logps"] is None:
        return
    logps = np.asarray([np.nan if value is None else value for value in row["event_logps"][index]], dtype=np.float64)
    if len(logps) != len(positions):
        refuse("event_logps", f"holds {len(logps)} events, but `event_positions` {len(positions)}.", index)
    if not np.isfinite(logps).all() or (logps > 1e-6).any():
        bad = logps[(~np.isfinite(logps) | (logps > 1e-6)).argmax()]
        refuse("event_logps", f"holds {bad}, which is not the logarithm of a probability.", index)
    if logps[~written].any():
        refuse("event_logps", f"holds {logps[~written & (logps != 0)][0]} for an erasure; it must be 0.", index)


def _replay(positions, steps, written, length: int, refuse) -> np.ndarray:
    """Which positions are visible after the events of a decoder that revises, boolean, `(length,)`."""
    visible, last = np.zeros(length, dtype=bool), np.full(length, NEVER)
    for position, step, is_write in zip(positions.tolist(), steps.tolist(), written.tolist(), strict=True):
        if step <= last[position]:
            refuse(f"has two events of position {position} at step {step}, or an earlier one after it.")
        if not is_write and not visible[position]:
            refuse(f"erases position {position} at step {step}, where nothing is written.")
        visible[position], last[position] = is_write, step
    return visible


def load_trajectories(path: str | Path, allow_partial: bool = False) -> Dataset:
    """
    Loads a collection that [`collect`] wrote.

    Args:
        path (`str` or `Path`): the directory.
        allow_partial (`bool`, *optional*, defaults to `False`): whether an interrupted collection is accepted.

    Raises:
        FileNotFoundError: if there is no such directory, or no shard in it.
        ValueError: if a shard cannot be read (the error names it), or the collection was interrupted.
    """
    check_kind("path", path, str | Path, "the directory of a collection")
    return Dataset.from_parquet([str(file) for file in _shards(Path(path), allow_partial)])


def load_row(path: str | Path, index: int) -> tuple[dict[str, Any] | None, int]:
    """
    One row of a collection that [`collect`] wrote, which may be incomplete. Only the shard of the row is read.

    Returns:
        The row (`None` if there is no such row) and the number of rows.

    Raises:
        FileNotFoundError, ValueError: as [`load_trajectories`].
    """
    found, before = None, 0
    for file in _shards(Path(path), allow_partial=True):
        count = parquet.read_metadata(file).num_rows
        if before <= index < before + count:
            found = parquet.read_table(file).slice(index - before, 1).to_pylist()[0]
        before += count
    return found, before


def _shards(path: Path, allow_partial: bool) -> list[Path]:
    """The files of a collection, after a check that they can be read."""
    files = sorted((path / "data").glob("shard-*.parquet"))
    if not files:
        raise FileNotFoundError(f"There are no trajectories in {path} (no {path / 'data'}/*.parquet).")
    for file in files:
        try:
            parquet.read_metadata(file)
        except Exception as error:
            raise ValueError(
                f"{file} cannot be read ({error}). Delete it and collect again: all other shards are kept."
            ) from error
    plan = path / "collection.json"
    if plan.exists() and not allow_partial:
        expected = read_record(
            plan, ("num_shards",), "Give the command of the collection again in another directory."
        )["num_shards"]
        if len(files) != expected:
            raise ValueError(
                f"{path} holds {len(files)} of {expected} shards: its collection was interrupted. Run it again to finish "
                "it, or pass `allow_partial=True`."
            )
    return files
