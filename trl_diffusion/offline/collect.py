"""Collecting trajectories: a policy, prompts and reward functions in, a dataset on disk out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..decoding.config import DecodingConfig
from ..decoding.decode import check_prompts, decode
from ..fields import check_at_least, check_kind
from ..names import knows_names
from ..policies.forward import NonFiniteLogits, check_model
from ..policies.loading import resolve_spec, with_absent_tokens
from ..policies.lora import adapters
from ..policies.prompts import as_prompts, check_form, check_visible, read_chat_template_kwargs, tokenize_prompts
from ..policies.spec import DiffusionSpec
from ..rewards.call import RewardCaller, RewardFunc
from ..seeds import derive_seed
from ..trajectories.dataset import OWN_COLUMNS, REWARD_PREFIX, Provenance
from ..trajectories.fingerprint import fingerprint_policy, fingerprint_tokenizer
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import check_writable
from .collection import Collection, Jobs, Progress


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

    A shard appears when it is complete. After an interruption of any kind, the same call makes the shards that are missing.
    Every response depends only on `seed`, its row and its number in the group, so the result is the same.

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
            Prompts in a shard. An interruption costs each process at most one shard.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the responses.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the chat template, such as `{"enable_thinking": False}`, also for reward models. Training on the
            collection needs the same ones.

    Returns:
        `output_dir` as a `Path`.

    Raises:
        TypeError: if an argument has the wrong type, for example because two arguments are swapped.
        ValueError: before anything is written, for a setting out of range, prompts that the policy cannot take, a column
            whose name the format needs, or an `output_dir` that holds something else, such as a collection with other
            settings (the message names the differences). Later, if a reward function does not return one finite number or
            `None` for each response. The shard is then not written.
        NonFiniteLogits: a `FloatingPointError`, if the policy's logits are NaN or infinite. Complete shards stay, and the
            current one is not written.
    """
    prompts = _check_arguments(model, tokenizer, prompts, reward_funcs, output_dir, decoding)
    template = read_chat_template_kwargs(chat_template_kwargs)
    caller = RewardCaller.of(reward_funcs, template)
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
    collection = Collection(
        Path(output_dir), prompts, prompt_ids, [num_responses] * len(prompts), tokenizer, caller, provenance, _name(model),
        rows_per_shard, seed, template,
    )  # fmt: skip

    def answer(shards: list[Jobs], progress: Progress) -> Iterator[TrajectoryBatch]:
        for jobs in shards:
            batches = []
            for begin in range(0, len(jobs), batch_size):
                part = jobs[begin : begin + batch_size]
                batches.append(_decode(model, prompt_ids, part, decoding, spec, seed))
                progress.add(len(part), int(batches[-1].completion_lengths.sum()))
            yield TrajectoryBatch.concatenate(batches)

    was_training = model.training
    model.eval()
    try:
        return collection.make(answer, disable_tqdm)
    finally:
        model.train(was_training)


def _check_arguments(model, tokenizer, prompts, reward_funcs, output_dir, decoding) -> Dataset:
    """Raises a `TypeError` for an argument of [`collect`] with the wrong type. Returns the prompts as a dataset."""
    check_model(model, tokenizer)
    several = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    for one in several:
        if not callable(one):  # functions and models are callable
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
    except NonFiniteLogits as error:  # names the row of the dataset
        raise NonFiniteLogits(jobs[error.row][0], error.reason) from error


def check_source(
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: dict[str, Any],
    spec: DiffusionSpec,
    config: Any,
    max_new_tokens: int,
) -> list[list[int]]:
    """Checks a dataset of prompts and returns their token ids. Raises a `ValueError` if it cannot be used."""
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


def _name(model: PreTrainedModel) -> str:
    """Name or path of the policy, with its adapters and its quantization."""
    kinds = [f"with an adapter ({type(one).__name__})" for one in adapters(model).values()]
    if getattr(model.config, "quantization_config", None) is not None:
        kinds.append("with rounded weights")
    return ", ".join([getattr(model.config, "_name_or_path", ""), *kinds])
