"""Collecting from a server: prompts and reward functions in, the answers of an OpenAI-compatible endpoint on disk out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..decoding.config import DecodingConfig
from ..fields import check_at_least
from ..policies.prompts import read_chat_template_kwargs, render_prompt
from ..policies.spec import DiffusionSpec, impossible_token
from ..rewards.call import RewardCaller, RewardFunc
from ..seeds import derive_seed
from ..trajectories.dataset import Provenance
from ..trajectories.exchange import trajectory_of_fields
from ..trajectories.fingerprint import fingerprint_tokenizer
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import check_writable
from .collect import check_source
from .collection import Collection, Jobs, Progress
from .endpoint import Endpoint, EndpointError, Pool
from .orders import finished_batch


logger = logging.getLogger(__name__)

SMALL_SEEDS = 2**31 - 1  # the largest seed that every server accepts
ENOUGH_GROUPS = 8  # so many groups of identical responses are no accident


def collect_from_server(
    endpoint: Endpoint,
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec,
    config: PretrainedConfig,
    prompts: Dataset,
    reward_funcs: RewardFunc | Sequence[RewardFunc] | RewardCaller,
    output_dir: str | Path,
    max_new_tokens: int,
    temperature: float = 1.0,
    model: str | None = None,
    num_responses: int = 8,
    rows_per_shard: int = 64,
    concurrency: int = 32,
    seed: int = 0,
    disable_tqdm: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Path:
    """
    As [`collect`], with the responses of a server. `trl-diffusion serve` sends the steps and the log-probabilities of all
    tokens. The collection is then the same as that of [`collect`] for this policy, with the settings of the server and the
    same seed. Other servers send text. It is tokenized here, and the order of its tokens is unknown: `decoding_order` of
    training chooses one.

    Args:
        endpoint ([`Endpoint`]): the server.
        tokenizer (`PreTrainedTokenizerBase`): the policy's.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`~transformers.PretrainedConfig`]): its config.
        prompts, reward_funcs, output_dir, num_responses, rows_per_shard, seed, disable_tqdm, chat_template_kwargs (*optional*):
            As for [`collect`].
        max_new_tokens (`int`): largest number of tokens of a response.
        temperature (`float`, *optional*, defaults to `1.0`): temperature of sampling.
        model (`str`, *optional*): name of the policy on the server. Needed if the server has several models.
        concurrency (`int`, *optional*, defaults to `32`): number of requests at the same time.

    Returns:
        `output_dir` as a `Path`.

    Raises:
        ValueError: as [`collect`]; if the server has another tokenizer or another spec than this policy; or if it refuses a
            request.
        ConnectionError: if the server does not answer. The same call continues the collection.
    """
    template = read_chat_template_kwargs(chat_template_kwargs)
    caller = RewardCaller.of(reward_funcs, template)
    for name, value in dict(num_responses=num_responses, rows_per_shard=rows_per_shard).items():
        check_at_least(name, value)
    check_writable(output_dir, "output_dir")
    prompt_ids = check_source(prompts, tokenizer, template, spec, config, max_new_tokens)
    entry = endpoint.find_model(model)
    provenance = _provenance(entry, tokenizer, spec, temperature, max_new_tokens)
    collection = Collection(
        Path(output_dir), prompts, prompt_ids, [num_responses] * len(prompts), tokenizer, caller, provenance,
        f"{entry['id']} at {endpoint.url}", rows_per_shard, seed, template,
    )  # fmt: skip
    asking = _Asking(
        endpoint, entry, prompts, prompt_ids, tokenizer, spec, max_new_tokens, temperature, seed, template
    )
    groups = _Groups(num_responses, temperature)
    pool = Pool(concurrency)
    try:
        return collection.make(partial(asking.answer_all, pool, groups), disable_tqdm)
    finally:
        endpoint.stop()
        pool.close()


def _provenance(
    entry: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec,
    temperature: float,
    max_new_tokens: int,
) -> Provenance:
    """
    Provenance of the responses, from the server's entry of its model.

    Raises:
        ValueError: if the server's policy has another tokenizer or spec than the given ones, or uses an approximate cache.
    """
    own, facts = fingerprint_tokenizer(tokenizer), entry.get("denoising")
    if not isinstance(facts, dict):
        unknown = {"decoder": "server", "order": None, "temperature": temperature, "max_new_tokens": max_new_tokens}
        return Provenance(None, own, spec, unknown)
    if facts.get("tokenizer_fingerprint") != own:
        raise ValueError(
            f"The server's policy {entry['id']!r} has another tokenizer than {tokenizer.name_or_path}. Pass its model with "
            "`--model_name_or_path`, or its tokenizer with `--tokenizer_name_or_path`."
        )
    if facts.get("spec") != spec.to_dict():
        raise ValueError(
            f"The server's policy {entry['id']!r} is denoised in another way: its spec is {facts.get('spec')}, here it is "
            f"{spec.to_dict()}. Pass its model with `--model_name_or_path`."
        )
    settings: dict[str, Any] = {**facts["decoding"], "temperature": temperature, "max_new_tokens": max_new_tokens}
    decoding = DecodingConfig(**{name: value for name, value in settings.items() if value is not None})
    if decoding.approximate_cache is not None:
        raise ValueError(
            "The server uses an `approximate_cache`, so its log-probabilities are not the policy's. Serve without."
        )
    return Provenance(facts["policy_fingerprint"], own, spec, {"decoder": "loop", **decoding.to_dict()})


@dataclass
class _Asking:
    """Asks a server for single responses, in any thread."""

    endpoint: Endpoint
    entry: dict[str, Any]
    prompts: Dataset
    prompt_ids: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    spec: DiffusionSpec
    max_new_tokens: int
    temperature: float
    seed: int
    template: dict[str, Any]
    takes_ids: bool = field(default=True, init=False)
    tokenizing: threading.Lock = field(default_factory=threading.Lock, init=False)  # tokenizers are not thread-safe

    def answer_all(
        self, pool: Pool, groups: _Groups, shards: list[Jobs], progress: Progress
    ) -> Iterator[TrajectoryBatch]:
        """The responses of one shard after the other."""
        waiting: dict[int, list[Future]] = {}
        for shard in range(len(shards)):
            for ahead in range(shard, min(shard + 2, len(shards))):  # so that no thread is idle at the end of a shard
                if ahead not in waiting:
                    waiting[ahead] = [pool.submit(self.answer, *job) for job in shards[ahead]]
            found = []
            for future in waiting.pop(shard):
                found.append(future.result())
                progress.add(1, int(found[-1].completion_lengths[0]))
            groups.look_at([batch.completions()[0] for batch in found])
            yield TrajectoryBatch.concatenate(found)
        groups.report()

    def answer(self, row: int, response: int) -> TrajectoryBatch:
        """A response to the prompt of a row, as a batch of one."""
        ids, facts = self.prompt_ids[row], self.entry.get("denoising")
        seed = derive_seed(self.seed, row, response)
        body = {
            "model": self.entry["id"],
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": seed if facts else seed & SMALL_SEEDS,
            **({"return_denoising": True} if facts else {}),
        }
        found = self._complete(row, body)
        try:
            choice = found["choices"][0]
            if facts:
                self._check_policy(found, facts)
                return trajectory_of_fields(ids, choice["denoising"])
            tokens = self._tokens(choice["text"], choice.get("finish_reason"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"The server's response to row {row} cannot be used ({type(error).__name__}: {error})."
            ) from error
        return finished_batch([ids], [tokens], self.spec)

    def _complete(self, row: int, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer to a prompt. A server that does not accept token ids gets the text of the prompt."""
        if self.takes_ids:
            try:
                return self.endpoint.call("/completions", {**body, "prompt": self.prompt_ids[row]})
            except EndpointError as error:
                if error.status not in (400, 422) or self.entry.get("denoising"):
                    raise
                refusal = error
            found = self.endpoint.call("/completions", {**body, "prompt": self._text(row)})
            if self.takes_ids:
                self.takes_ids = False
                logger.warning(
                    f"The server does not accept token ids, so it gets the text of the prompts ({refusal})."
                )
            return found
        return self.endpoint.call("/completions", {**body, "prompt": self._text(row)})

    def _text(self, row: int) -> str:
        """The text of a prompt, without the token that servers put before a text themselves."""
        with self.tokenizing:
            prompt = self.prompts[row]["prompt"]
            text = prompt if isinstance(prompt, str) else render_prompt(self.tokenizer, prompt, **self.template)
        return text.removeprefix(self.tokenizer.bos_token or "")

    @staticmethod
    def _check_policy(found: dict[str, Any], facts: dict[str, Any]) -> None:
        if found.get("system_fingerprint") != facts.get("system_fingerprint"):
            raise ValueError(
                "the policy or the settings of the server have changed since the collection began. Start the server as it was, and "
                "give the same command again"
            )

    def _tokens(self, text: str, reason: str | None) -> list[int]:
        """The token ids of a text. A response that has ended gets its stop token."""
        with self.tokenizing:
            ids = self.tokenizer(text=text, add_special_tokens=False)["input_ids"]
        if reason == "stop" and self.spec.stop_token_ids and not set(ids) & set(self.spec.stop_token_ids):
            ids = [*ids, self.spec.stop_token_ids[0]]
        ids = ids[: self.max_new_tokens]
        if not ids:
            raise ValueError("it is empty")
        wrong = impossible_token(ids, self.spec)
        if wrong is not None:
            raise ValueError(f"it holds {wrong[1]}")
        return ids


@dataclass
class _Groups:
    """Checks whether the responses to a prompt differ."""

    size: int
    temperature: float
    seen: int = 0
    same: int = 0
    has_said: bool = False

    def look_at(self, completions: list[list[int]]) -> None:
        """Counts whole groups of responses, and those in which all responses are the same."""
        for begin in range(0, len(completions), self.size):
            group = completions[begin : begin + self.size]
            self.seen += 1
            self.same += all(one == group[0] for one in group)
        if self.seen >= ENOUGH_GROUPS:
            self.report()

    def report(self) -> None:
        """Warns once if the responses are the same in every group."""
        if self.size > 1 and self.temperature > 0 and self.seen and self.same == self.seen and not self.has_said:
            self.has_said = True
            logger.warning(
                f"All {self.size} answers to each of {self.seen} prompts are the same, although the temperature is "
                f"{self.temperature:g}: does the server decode greedily? There is nothing to learn from such groups."
            )
