"""A collection on disk: its plan, its shards, which are made one by one, and its card."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
import transformers
import trl
import xxhash
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..agreement import check_shared
from ..policies.files import COLLECTION
from ..rewards.call import RewardCaller, as_stored
from ..trajectories.dataset import FORMAT_VERSION, REWARD_PREFIX, Provenance, is_unordered, to_rows
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import TEMPORARY, read_record, whole_file, write_text


Jobs = list[tuple[int, int]]  # row of a prompt, and number of a response to it


@dataclass
class Collection:
    """
    A collection that is started or continued.

    Attributes:
        output_dir (`Path`): its directory.
        prompts ([`~datasets.Dataset`]): the prompts.
        prompt_ids (`list[list[int]]`): their token ids.
        counts (`list[int]`): number of responses to each prompt.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        caller ([`~rewards.call.RewardCaller`], *optional*): the reward functions, if there are any.
        provenance ([`Provenance`]): where the responses come from. Log-probabilities were recorded if it has the fingerprint of
            a policy.
        policy (`str`): what the policy is called.
        rows_per_shard (`int`): prompts in a shard.
        seed (`int`): seed of the responses.
        template (`dict`): variables of the chat template.
        given (`dict[str, list[list]]`): rewards that need no function, by name. For each prompt, a list with the reward of
            each response.
        more (`dict`): further entries of the plan, which must not change when the collection is continued.
    """

    output_dir: Path
    prompts: Dataset
    prompt_ids: list[list[int]]
    counts: list[int]
    tokenizer: PreTrainedTokenizerBase
    caller: RewardCaller | None
    provenance: Provenance
    policy: str
    rows_per_shard: int
    seed: int = 0
    template: dict[str, Any] = field(default_factory=dict)
    given: dict[str, list[list[float | None]]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The settings of the collection, which must not change when it is continued, and the names of policy and tokenizer,
        which may."""
        return {
            "format_version": FORMAT_VERSION,
            "policy_fingerprint": self.provenance.policy_fingerprint,
            "tokenizer_fingerprint": self.provenance.tokenizer_fingerprint,
            "spec": self.provenance.spec.to_dict(),
            "decoding": self.provenance.decoding,
            "rewards": [*self.given, *(self.caller.names if self.caller else [])],
            "num_responses": self.counts[0] if len(set(self.counts)) == 1 else sorted(set(self.counts)),
            "num_prompts": len(self.prompt_ids),
            "prompts_fingerprint": xxhash.xxh3_128_hexdigest(json.dumps(self.prompt_ids).encode()),
            "rows_per_shard": self.rows_per_shard,
            "num_shards": -(-len(self.prompt_ids) // self.rows_per_shard),
            "seed": self.seed,
            **({"chat_template_kwargs": self.template} if self.template else {}),
            **self.more,
            "policy": self.policy,
            "tokenizer": self.tokenizer.name_or_path,
        }

    def make(
        self, answer: Callable[[list[Jobs], Progress], Iterator[TrajectoryBatch]], disable_tqdm: bool = False
    ) -> Path:
        """
        Makes the shards that are missing. Processes share them.

        Args:
            answer (`Callable`): takes the jobs of all shards of this process and a progress bar. Yields the responses of one
                shard after the other.
            disable_tqdm (`bool`, *optional*, defaults to `False`): whether to show no progress bar.

        Returns:
            The directory.
        """
        state = PartialState()
        own = self._own_shards(state)
        shards = [[(row, k) for row in self._rows_of(shard) for k in range(self.counts[row])] for shard in own]
        progress = Progress(sum(map(len, shards)), disable_tqdm or not state.is_main_process)
        try:
            for shard, jobs, batch in zip(own, shards, answer(shards, progress), strict=True):
                self._write_shard(shard, jobs, batch)
        finally:
            progress.bar.close()
        state.wait_for_everyone()
        if state.is_main_process:
            write_text(self.output_dir / "README.md", _card(self.output_dir, self.plan))
        state.wait_for_everyone()
        return self.output_dir

    def _own_shards(self, state: PartialState) -> list[int]:
        """
        The missing shards that this process makes.

        Raises:
            ValueError: on a process that does not see what the main process has written.
        """
        check_shared(state, self.output_dir)
        with state.main_process_first():  # it writes the plan and removes unfinished files before the others look
            if state.is_main_process:
                _prepare(self.output_dir, self.plan)
        missing = [
            shard for shard in range(self.plan["num_shards"]) if not _shard_path(self.output_dir, shard).exists()
        ]
        state.wait_for_everyone()
        return missing[state.process_index :: state.num_processes]

    def _rows_of(self, shard: int) -> range:
        """The prompts of a shard."""
        size = self.rows_per_shard
        return range(shard * size, min((shard + 1) * size, len(self.prompts)))

    def _write_shard(self, shard: int, jobs: Jobs, batch: TrajectoryBatch) -> None:
        """Scores the responses of a shard, and writes it."""
        rows = self._rows_of(shard)
        counts = [self.counts[row] for row in rows]
        rewards = {name: [value for row in rows for value in values[row]] for name, values in self.given.items()}
        if self.caller is not None:
            rewards |= _score(batch, self.prompts, [row for row, _ in jobs], self.tokenizer, self.caller)
        table, begin = [], 0
        for row, source, trajectories, count in zip(
            rows, self.prompts.select(rows).to_list(), self._table(batch, counts), counts, strict=True
        ):
            own = {REWARD_PREFIX + name: values[begin : begin + count] for name, values in rewards.items()}
            table.append({**source, "row": row, **trajectories, **own})
            begin += count
        _write(_shard_path(self.output_dir, shard), table, list(rewards))

    def _table(self, batch: TrajectoryBatch, counts: list[int]) -> list[dict[str, Any]]:
        """Rows of trajectories, one for each prompt."""
        spec, ends = self.provenance.spec, torch.tensor(counts).cumsum(0).tolist()
        recorded = self.provenance.policy_fingerprint is not None
        if len(set(counts)) == 1:
            return to_rows(batch, spec, counts[0], self.provenance, recorded)
        parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        return [
            row
            for part, count in zip(parts, counts, strict=True)
            for row in to_rows(batch.select(part), spec, count, self.provenance, recorded)
        ]


class Progress:
    """A progress bar of responses, with tokens per second over the whole run."""

    def __init__(self, total: int, disable: bool):
        self.bar = tqdm(total=total, desc="collecting", unit="response", disable=disable)
        self.started, self.tokens = time.perf_counter(), 0

    def add(self, responses: int, tokens: int) -> None:
        self.tokens += tokens
        self.bar.update(responses)
        self.bar.set_postfix({"tokens/s": f"{self.tokens / (time.perf_counter() - self.started):.0f}"})


def _prepare(output_dir: Path, plan: dict[str, Any]) -> None:
    """Writes the plan of a new collection, or checks that of an interrupted one, and removes unfinished files."""
    path = output_dir / COLLECTION
    if path.exists():
        found = read_record(path, advice="Use another `output_dir`.")
        # The names of policy and tokenizer may change. Their fingerprints may not.
        differing = sorted(
            key
            for key in {*plan, *found} - {"policy", "tokenizer"}
            if json.dumps(plan.get(key), sort_keys=True) != json.dumps(found.get(key), sort_keys=True)
        )
        if differing:
            details = "; ".join(f"`{key}` was {found.get(key)!r} and is {plan.get(key)!r}" for key in differing)
            raise ValueError(
                f"{output_dir} holds a collection with other settings: {details}. Use another `output_dir`."
            )
    elif output_dir.exists() and any(not entry.name.startswith(TEMPORARY) for entry in output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty and holds no collection. Use another `output_dir`.")
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plan, indent=2) + "\n")
    (output_dir / "data").mkdir(exist_ok=True)
    for rest in [*output_dir.glob(TEMPORARY + "*"), *(output_dir / "data").glob(TEMPORARY + "*")]:
        rest.unlink()
    for shard in (output_dir / "data").glob("shard-*.parquet"):
        try:
            parquet.read_metadata(shard)
        except Exception as error:
            raise ValueError(f"{shard} cannot be read ({error}). Delete it to have it made again.") from error


def _shard_path(output_dir: Path, shard: int) -> Path:
    return output_dir / "data" / f"shard-{shard:05d}.parquet"


def _score(
    batch: TrajectoryBatch,
    prompts: Dataset,
    rows: list[int],
    tokenizer: PreTrainedTokenizerBase,
    caller: RewardCaller,
) -> dict[str, list[float | None]]:
    """The rewards of responses to the prompts at `rows`, as they are stored."""
    completion_ids = batch.completions()
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    source = prompts.select(rows)
    columns = {name: list(source[name]) for name in source.column_names}
    completions: list[str] | list[list[dict[str, str]]] = texts
    if is_conversational({"prompt": columns["prompt"][0]}):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = caller(columns.pop("prompt"), completions, completion_ids, columns)
    return {
        name: [as_stored(value, name, f"a response to row {row}") for row, value in zip(rows, values, strict=True)]
        for name, values in rewards.items()
    }


def _write(path: Path, table: list[dict[str, Any]], names: list[str]) -> None:
    """Writes a shard, either completely or not at all."""
    arrow = pa.Table.from_pylist(table)
    integers, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    types = {
        "format_version": pa.int32(), "row": pa.int64(), "prompt_ids": integers, "canvas_lengths": integers,
        "completion_lengths": integers, "event_steps": pa.list_(integers), "event_positions": pa.list_(integers),
        "event_tokens": pa.list_(integers), "event_logps": pa.list_(floats), "policy_fingerprint": pa.string(),
        **{REWARD_PREFIX + name: floats for name in names},
    }  # fmt: skip
    schema = pa.schema([pa.field(field.name, types.get(field.name, field.type)) for field in arrow.schema])
    with whole_file(path) as temporary:
        parquet.write_table(arrow.cast(schema), temporary)


def _card(output_dir: Path, plan: dict[str, Any]) -> str:
    """The dataset card: who made this, how, with what, how much."""
    responses = tokens = 0
    sums = dict.fromkeys(plan["rewards"], (0.0, 0))
    for shard in sorted((output_dir / "data").glob("shard-*.parquet")):
        columns = ["completion_lengths", *(REWARD_PREFIX + name for name in plan["rewards"])]
        for row in parquet.read_table(shard, columns=columns).to_pylist():
            responses += len(row["completion_lengths"])
            tokens += sum(row["completion_lengths"])
            for name in plan["rewards"]:
                given = [value for value in row[REWARD_PREFIX + name] if value is not None]
                total, count = sums[name]
                sums[name] = (total + sum(given), count + len(given))
    rewards = "\n".join(
        f"| `{name}` | {total / count:.4f} | {count} |" if count else f"| `{name}` | not applicable | 0 |"
        for name, (total, count) in sums.items()
    )
    settings = "\n".join(f"| {key} | `{value}` |" for key, value in plan["decoding"].items() if value is not None)
    each = plan["num_responses"]
    each = each if isinstance(each, int) else f"{each[0]} to {each[-1]}"
    order = "Each response comes with the order in which its tokens were unmasked, and with the log-probability of each at that step."
    if is_unordered(plan["decoding"]):
        order = "The order in which their tokens were written is not known. `decoding_order` of training chooses one."
    versions = {"trl": trl, "transformers": transformers, "torch": torch}
    return f"""---
tags:
- trl-diffusion
- trajectories
configs:
- config_name: default
  data_files: data/*.parquet
---

# Trajectories

{plan["num_prompts"]} prompts with {each} responses each: {responses} responses, {tokens} tokens, in \
{plan["num_shards"]} shards. {order} Format version {plan["format_version"]} of trl_diffusion.

| made by | |
|---|---|
| policy | `{plan["policy"]}` |
| policy fingerprint | `{plan["policy_fingerprint"]}` |
| tokenizer | `{plan["tokenizer"]}` |
| tokenizer fingerprint | `{plan["tokenizer_fingerprint"]}` |
| spec | `{json.dumps(plan["spec"])}` |
| seed | {plan["seed"]} |
| versions | {", ".join(f"{name} {module.__version__}" for name, module in versions.items())} |

| decoding | |
|---|---|
{settings}

| reward | mean | responses |
|---|---|---|
{rewards}

```python
from trl_diffusion import DTRPOConfig, DTRPOTrainer, load_trajectories

trainer = DTRPOTrainer(model=..., args=DTRPOConfig(...), train_dataset=load_trajectories("this directory"))
```
"""
