"""Collecting trajectories: a policy, prompts and reward functions in, a dataset on disk out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from ..decoding.config import DecodingConfig
from ..decoding.decode import check_prompts, decode
from ..fields import check_at_least, check_kind
from ..names import knows_names
from ..policies.files import COLLECTION
from ..policies.forward import NonFiniteLogits, check_model
from ..policies.loading import resolve_spec, with_absent_tokens
from ..policies.lora import adapters
from ..policies.prompts import as_prompts, check_form, check_visible, read_chat_template_kwargs, tokenize_prompts
from ..policies.spec import DiffusionSpec
from ..rewards.call import RewardCaller, RewardFunc, as_stored
from ..seeds import derive_seed
from ..trajectories.dataset import FORMAT_VERSION, OWN_COLUMNS, REWARD_PREFIX, Provenance, to_rows
from ..trajectories.fingerprint import fingerprint_policy, fingerprint_tokenizer
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import TEMPORARY, check_writable, read_record, whole_file, write_text


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@knows_names
def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset | str | list,
    reward_funcs: RewardFunc | Sequence[RewardFunc] | RewardCaller,
    output_dir: str | Path,
    decoding: DecodingConfig,
    num_responses: int = 8,
    spec: DiffusionSpec | None = None,
    batch_size: int = 64,
    rows_per_shard: int = 64,
    seed: int = 0,
    disable_tqdm: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Path:
    """
    Decodes a group of responses for every prompt, scores them, and writes them as Parquet shards in the format of
    [`trajectories.dataset`], with a dataset card. Processes share the shards.

    A shard appears when it is whole. Called again after an interruption of any kind, with the same arguments, it makes
    the shards that are missing; every response depends on `seed` and its own row alone, so the result is the same.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        prompts ([`~datasets.Dataset`], `str` or `list`):
            A `prompt` column, standard or conversational; the other columns reach the reward functions and are kept. Or one
            or more prompts, without other columns.
        reward_funcs (`RewardFunc`, `list[RewardFunc]` or [`~rewards.call.RewardCaller`]):
            As for [`~trl.GRPOTrainer`]: functions, asynchronous ones too, and reward models. Each gives a column
            `reward_NAME`, which holds null where it returned `None` or NaN.
        output_dir (`str` or `Path`):
            A new directory, or that of an interrupted collection.
        decoding ([`DecodingConfig`]):
            Settings of the decoder. With temperature 0 all responses to a prompt are the same, so only one is allowed.
        num_responses (`int`, *optional*, defaults to `8`):
            Responses to each prompt.
        spec ([`DiffusionSpec`], *optional*):
            Facts about the policy. Defaults to the ones stored in the model's config. What is left open (mask token,
            tokens that do not exist) comes from the tokenizer.
        batch_size (`int`, *optional*, defaults to `64`):
            Responses decoded at once on each process.
        rows_per_shard (`int`, *optional*, defaults to `64`):
            Prompts in a shard: what an interruption can cost each process.
        seed (`int`, *optional*, defaults to `0`):
            Source of randomness.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to go without a progress bar.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the chat template, such as `{"enable_thinking": False}`, also for reward models. Training on what
            was collected needs the same ones.

    Returns:
        `output_dir` as a `Path`.

    Raises:
        TypeError: if an argument is something else than it should be, as when two are swapped.
        ValueError: before anything is written, for prompts that the policy cannot take, a column whose name the format
            needs, or an `output_dir` that holds something else, such as a collection with other settings (the
            differences are named). Later, if a reward function gives something else than one finite number or `None` for
            each response; the shard is then not written.
        NonFiniteLogits: a `FloatingPointError`, if the policy's logits are NaN or infinite. Shards that are whole stay; the
            one in work is not written.
    """
    prompts = _check_arguments(model, tokenizer, prompts, reward_funcs, output_dir, decoding)
    template = read_chat_template_kwargs(chat_template_kwargs)
    caller = reward_funcs
    if not isinstance(caller, RewardCaller):
        caller = RewardCaller(reward_funcs, chat_template_kwargs=template)
    output_dir = Path(output_dir)
    spec = resolve_spec(model.config, None, tokenizer) if spec is None else spec
    spec = with_absent_tokens(spec, model.config, tokenizer)
    if decoding.allow_mask_token:
        raise ValueError("`allow_mask_token=True` leaves mask tokens in responses, which cannot be trained on.")
    for name, value in dict(num_responses=num_responses, batch_size=batch_size, rows_per_shard=rows_per_shard).items():
        check_at_least(name, value)
    decoding.check_responses(num_responses)
    check_writable(output_dir, "output_dir")
    prompt_ids = check_source(prompts, tokenizer, template, spec, model.config, decoding.max_new_tokens)
    provenance = Provenance(
        fingerprint_policy(model), fingerprint_tokenizer(tokenizer), spec, {"decoder": "loop", **decoding.to_dict()}
    )
    plan = {
        "format_version": FORMAT_VERSION,
        "policy_fingerprint": provenance.policy_fingerprint,
        "tokenizer_fingerprint": provenance.tokenizer_fingerprint,
        "spec": spec.to_dict(),
        "decoding": provenance.decoding,
        "rewards": caller.names,
        "num_responses": num_responses,
        "num_prompts": len(prompts),
        "prompts_fingerprint": xxhash.xxh3_128_hexdigest(json.dumps(prompt_ids).encode()),
        "rows_per_shard": rows_per_shard,
        "num_shards": -(-len(prompts) // rows_per_shard),
        "seed": seed,
        **({"chat_template_kwargs": template} if template else {}),
        "policy": _name(model),
        "tokenizer": tokenizer.name_or_path,
    }
    state = PartialState()
    own = _own_shards(output_dir, plan, state)
    was_training = model.training
    model.eval()
    total = sum(len(_rows_of(shard, plan)) for shard in own) * num_responses
    progress = _Progress(total, disable_tqdm or not state.is_main_process)
    try:
        for shard in own:
            rows = _rows_of(shard, plan)
            jobs = [(row, response) for row in rows for response in range(num_responses)]
            batches = []
            for begin in range(0, len(jobs), batch_size):
                part = jobs[begin : begin + batch_size]
                batches.append(_decode(model, prompt_ids, part, decoding, spec, seed))
                progress.add(batches[-1])
            batch = TrajectoryBatch.concatenate(batches)
            table = to_rows(batch, spec, num_responses, provenance)
            rewards = _score(batch, prompts, [row for row, _ in jobs], tokenizer, caller)
            _write(_shard_path(output_dir, shard), _with_source(table, prompts, rows, rewards), caller.names)
    finally:
        progress.bar.close()
        model.train(was_training)
    state.wait_for_everyone()
    if state.is_main_process:
        write_text(output_dir / "README.md", _card(output_dir, plan))
    state.wait_for_everyone()
    return output_dir


def _check_arguments(model, tokenizer, prompts, reward_funcs, output_dir, decoding) -> Dataset:
    """Raises a `TypeError` for an argument of [`collect`] that is something else than it should be. Returns the prompts."""
    check_model(model, tokenizer)
    several = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for one in several:
        if not callable(one):  # which models are as well
            check_kind(
                "reward_funcs", one, str | RewardCaller, "a function, a reward model, its path, or a list of these"
            )
    check_kind("output_dir", output_dir, str | Path, "a path")
    check_kind("decoding", decoding, DecodingConfig, "a DecodingConfig")
    return prompts if isinstance(prompts, Dataset) else Dataset.from_dict({"prompt": as_prompts(prompts)})


def _decode(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    jobs: list[tuple[int, int]],
    decoding: DecodingConfig,
    spec: DiffusionSpec,
    seed: int,
) -> TrajectoryBatch:
    """The responses of `jobs`: row of the prompt, and number of the response."""
    seeds = [derive_seed(seed, row, response) for row, response in jobs]
    try:
        return decode(model, [prompt_ids[row] for row, _ in jobs], decoding, spec, seeds).to("cpu")
    except NonFiniteLogits as error:  # under the row of the dataset
        raise NonFiniteLogits(jobs[error.row][0], error.reason) from error


def _own_shards(output_dir: Path, plan: dict[str, Any], state: PartialState) -> list[int]:
    """The shards that are missing and are for this process to make."""
    with state.main_process_first():  # the plan is there, and rubbish is gone, before anyone looks
        if state.is_main_process:
            _prepare(output_dir, plan)
    missing = [shard for shard in range(plan["num_shards"]) if not _shard_path(output_dir, shard).exists()]
    state.wait_for_everyone()
    return missing[state.process_index :: state.num_processes]


def _rows_of(shard: int, plan: dict[str, Any]) -> range:
    """The prompts of a shard."""
    size = plan["rows_per_shard"]
    return range(shard * size, min((shard + 1) * size, plan["num_prompts"]))


class _Progress:
    """A progress bar of responses, with tokens per second over the whole run."""

    def __init__(self, total: int, disable: bool):
        self.bar = tqdm(total=total, desc="collecting", unit="response", disable=disable)
        self.started, self.tokens = time.perf_counter(), 0

    def add(self, batch: TrajectoryBatch) -> None:
        self.tokens += int(batch.completion_lengths.sum())
        self.bar.update(len(batch))
        self.bar.set_postfix({"tokens/s": f"{self.tokens / (time.perf_counter() - self.started):.0f}"})


def _with_source(
    table: list[dict[str, Any]], prompts: Dataset, rows: range, rewards: dict[str, list[float | None]]
) -> list[dict[str, Any]]:
    """Rows of trajectories with the columns of their prompts and the rewards of their responses."""
    size = len(next(iter(rewards.values()))) // len(rows)
    return [
        {
            **source,
            "row": row,
            **trajectories,
            **{REWARD_PREFIX + name: values[place * size : (place + 1) * size] for name, values in rewards.items()},
        }
        for place, (row, source, trajectories) in enumerate(
            zip(rows, prompts.select(rows).to_list(), table, strict=True)
        )
    ]


def check_source(
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: dict[str, Any],
    spec: DiffusionSpec,
    config: Any,
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of the prompts, if they can be collected on; a `ValueError` says why not."""
    if "prompt" not in prompts.column_names:
        raise ValueError(f"The dataset has no `prompt` column; it has {sorted(prompts.column_names)}.")
    if len(prompts) == 0:
        raise ValueError("The dataset is empty.")
    taken = sorted(
        name for name in prompts.column_names if name in OWN_COLUMNS or name.startswith(REWARD_PREFIX)
    )  # `reward_...` would be read as a stored reward
    if taken:
        raise ValueError(f"The dataset has columns that trajectories need for themselves: {taken}. Rename them.")
    column = list(prompts["prompt"])
    for row, prompt in enumerate(column):
        check_form(f"Row {row}", prompt)
    prompt_ids = tokenize_prompts(tokenizer, column, **template)
    check_prompts(prompt_ids, spec, config, max_new_tokens)
    check_visible(tokenizer, column, prompt_ids, **template)
    return prompt_ids


def _prepare(output_dir: Path, plan: dict[str, Any]) -> None:
    """Writes the plan of a new collection, or checks that of an interrupted one, and removes unfinished files."""
    path = output_dir / COLLECTION
    if path.exists():
        found = read_record(path, advice="Use another `output_dir`.")
        # Where the policy and the tokenizer were loaded from does not matter; what they are does.
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


def _name(model: PreTrainedModel) -> str:
    """Where the policy is from, and what it was opened with."""
    kinds = [f"with an adapter ({type(one).__name__})" for one in adapters(model).values()]
    if getattr(model.config, "quantization_config", None) is not None:
        kinds.append("with rounded weights")
    return ", ".join([getattr(model.config, "_name_or_path", ""), *kinds])


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
    """Writes a shard so that it is there whole or not at all."""
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

{plan["num_prompts"]} prompts with {plan["num_responses"]} responses each: {responses} responses, {tokens} tokens, in \
{plan["num_shards"]} shards. Each response comes with the order in which its tokens were unmasked and the log-probability \
each had then. Format version {plan["format_version"]} of trl_diffusion.

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
