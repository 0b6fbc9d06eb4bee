"""Stored responses as the trainer's data source."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from ..offline.preferences import from_preferences, is_preference_dataset
from ..policies.spec import DiffusionSpec
from ..scoring.estimators import ESTIMATORS
from ..trajectories.dataset import REWARD_PREFIX, check_trajectories, is_trajectory_dataset, reward_columns
from ..trajectories.fingerprint import fingerprint_policy, fingerprint_tokenizer
from .config import DTRPOConfig


if TYPE_CHECKING:
    from ..offline.orders import DecodingOrder


logger = get_logger(__name__)

# Settings of the decoder that make it sample from something else than the policy's own distribution.
OTHER_DISTRIBUTION = ("top_k", "top_p", "suppress_tokens", "approximate_cache")


class StoredReward:
    """A reward function that gives what a trajectory dataset holds."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, completions, **kwargs) -> list[float | None]:
        return kwargs[REWARD_PREFIX + self.__name__]


class OfflineData:
    """
    Checks and prepares stored responses, and finds out whether the reference made them.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): the policy as it is before training, which is the reference.
        config ([`~transformers.PretrainedConfig`]): its config.
        args ([`DTRPOConfig`]): settings of the trainer.
        spec ([`DiffusionSpec`]): facts about the policy.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        reward_funcs: what scores the responses anew, if anything.
        changed (`bool`, *optional*, defaults to `False`): whether what is loaded is not what the checkpoint says, as with
            quantization.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        config: PretrainedConfig,
        args: DTRPOConfig,
        spec: DiffusionSpec,
        tokenizer: PreTrainedTokenizerBase,
        reward_funcs: Any,
        changed: bool = False,
    ):
        self.model, self.args, self.spec, self.tokenizer = model, args, spec, tokenizer
        self.vocab_size = config.get_text_config().vocab_size
        self.rescored, self.changed = bool(reward_funcs), changed
        self.reward_funcs: list[StoredReward] = []
        self.reference_is_recorded = False
        self.recorded = True  # whether somebody recorded how likely the tokens were
        self._tied = self._rows = 0
        self._makers: set[str | None] = set()
        self._fingerprint: str | None = None

    def prepare(self, train_dataset, eval_dataset):
        """The datasets, checked and as trajectories. Raises a `ValueError` that names the dataset, row and column."""
        several = isinstance(eval_dataset, dict)
        evaluations = eval_dataset if several else {"eval_dataset": eval_dataset}
        group_size = cast(int, self.args.num_generations)
        train = self._prepare_one("train_dataset", train_dataset, group_size, drop_ties=True)
        size = self.args.num_generations_eval or group_size
        prepared = {
            name: self._prepare_one(name, dataset, size) if _is_stored(dataset) else dataset
            for name, dataset in evaluations.items()
        }
        if not self.rescored:
            names = reward_columns(train)
            if not names:
                raise ValueError(
                    "train_dataset holds no stored rewards (no column `reward_...`). Pass `reward_funcs` to score its "
                    "responses."
                )
            self.reward_funcs = [StoredReward(name) for name in names]
            for name, dataset in prepared.items():
                if dataset is not None and (not _is_stored(dataset) or reward_columns(dataset) != names):
                    raise ValueError(
                        f"{name} does not hold the rewards {names}, which are those of train_dataset: pass `reward_funcs`."
                    )
        self._find_reference([train, *(dataset for dataset in prepared.values() if dataset is not None)])
        return train, prepared if several else prepared["eval_dataset"]

    def _prepare_one(self, name: str, dataset: Dataset, group_size: int, drop_ties: bool = False) -> Dataset:
        if isinstance(dataset, IterableDataset):
            raise TypeError(f"`{name}` must be a Dataset, not a stream: stored responses are checked before training.")
        if is_preference_dataset(dataset):
            dataset = self._from_preferences(name, dataset)
        try:
            check_trajectories(dataset, self.spec, self.vocab_size, fingerprint_tokenizer(self.tokenizer))
            self._check_fit(dataset, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if "row" not in dataset.column_names:
            dataset = dataset.add_column("row", list(range(len(dataset))))
        if drop_ties and self.args.loss_type == "dpo" and not self.rescored:
            dataset = self._without_ties(name, dataset)
        return dataset

    def _from_preferences(self, name: str, dataset: Dataset) -> Dataset:
        if self.args.num_generations != 2:
            raise ValueError(f"{name} holds pairs, so `num_generations` must be 2, got {self.args.num_generations}.")
        model: PreTrainedModel | PeftModel | None = None
        if self.args.decoding_order == "confidence":
            if is_deepspeed_zero3_enabled():
                raise ValueError(
                    f"{name}: `decoding_order='confidence'` asks the whole reference, which ZeRO-3 shares among processes. "
                    "Make the trajectories before, with `from_preferences`, and train on them."
                )
            if isinstance(self.model, str):
                loaded = AutoModelForCausalLM.from_pretrained(self.model, **_loading(self.args))
                model = loaded.to(PartialState().device)
            else:
                model = self.model
            model.eval()
        try:
            with PartialState().main_process_first():  # the others find its replay in the cache
                return from_preferences(
                    dataset,
                    self.tokenizer,
                    self.spec,
                    cast("DecodingOrder", self.args.decoding_order),
                    self.args.tokens_per_step,
                    self.args.temperature,
                    model,
                    self.args.max_completion_length,
                    self.args.per_device_train_batch_size,
                    self.args.seed,
                )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _check_fit(self, dataset: Dataset, group_size: int) -> None:
        """Whether these responses can be trained on with these settings."""
        columns = ("canvas_lengths", "completion_lengths", "decoding", "event_logps")
        for number, row in enumerate(dataset.select_columns(list(columns))):
            count = len(row["canvas_lengths"])
            if count < group_size:
                raise ValueError(
                    f"Row {number}, column `canvas_lengths`: {count} responses, but `num_generations` is {group_size}. "
                    "Lower it, or drop the row."
                )
            longest = max(row["completion_lengths"])
            if longest > self.args.max_completion_length:
                raise ValueError(
                    f"Row {number}, column `completion_lengths`: a response has {longest} tokens, more than "
                    f"`max_completion_length={self.args.max_completion_length}`. Raise it."
                )
            if row["event_logps"] is None:
                if self.args.loss_type != "dpo":
                    raise ValueError(
                        f"Row {number}, column `event_logps`: nobody recorded how likely these tokens were, so there is no "
                        f"importance ratio for `loss_type={self.args.loss_type!r}`. Use `loss_type='dpo'`, or "
                        "`decoding_order='confidence'`."
                    )
                self.recorded = False
                continue
            decoding = json.loads(row["decoding"])
            # The distribution that greedy decoding looks at is the untempered one.
            temperature = decoding.get("temperature") or 1.0
            if temperature != self.args.temperature:
                raise ValueError(
                    f"Row {number}, column `decoding`: the log-probabilities were recorded at temperature {temperature}. "
                    f"Set `temperature={temperature}` (it is {self.args.temperature})."
                )
            changed = {name: decoding.get(name) for name in OTHER_DISTRIBUTION if decoding.get(name)}
            if changed:
                raise ValueError(
                    f"Row {number}, column `decoding`: it was decoded with {changed}, so its log-probabilities are those of "
                    "a distribution that is not scored. Collect without."
                )

    def _without_ties(self, name: str, dataset: Dataset) -> Dataset:
        names = [REWARD_PREFIX + reward for reward in reward_columns(dataset)]
        if not names:
            return dataset
        weights = self.args.reward_weights or [1.0] * len(names)
        kept = []
        for number, row in enumerate(dataset.select_columns(names)):
            values = np.array([row[column] for column in names], dtype=np.float64)  # None becomes NaN
            totals = np.nansum(values * np.array(weights)[:, None], axis=0)
            if len(set(totals.tolist())) > 1:
                kept.append(number)
        self._tied, self._rows = len(dataset) - len(kept), len(dataset)
        if not kept:
            raise ValueError(
                f"{name}: in every group all responses have the same reward, so there is no pair to train on."
            )
        return dataset.select(kept)

    def _find_reference(self, datasets: list[Dataset]) -> None:
        """Whether the policy before training made all of the data, so that what it recorded is the reference's."""
        if self.args.beta == 0.0:
            return
        for dataset in datasets:
            self._makers |= set(dataset["policy_fingerprint"]) if _is_stored(dataset) else {"a rollout"}
        # An adapter that goes on being trained has a reference of its own.
        unknown = self.changed or isinstance(self.model, PeftModel)
        self._fingerprint = None if unknown else fingerprint_policy(self.model)
        self.reference_is_recorded = (
            self._makers == {self._fingerprint}
            and self._fingerprint is not None
            and ESTIMATORS[self.args.estimator].recorded
        )
        if self.reference_is_recorded and self.args.sync_ref_model:
            raise ValueError("`sync_ref_model=True` moves the reference away from the recorded log-probabilities.")

    def report(self) -> None:
        """Says what was found, once the trainer is there."""
        if self._tied:
            logger.warning(
                f"{self._tied} of {self._rows} groups were dropped: all their responses have the same reward, so there is "
                "no pair in them."
            )
        if self.args.beta == 0.0:
            return
        if self.reference_is_recorded:
            logger.info("The reference made this data: its recorded log-probabilities are used, no pass of its own.")
        elif None in self._makers:
            logger.info(
                "The data was written by nobody in particular: the reference scores it, one extra pass a step."
            )
        else:
            logger.warning(
                f"The data was made by policy {sorted(map(str, self._makers))}, the reference is "
                f"{self._fingerprint or 'another one'}: it scores the data itself, one extra pass a step."
            )


def _is_stored(dataset: Any) -> bool:
    return is_trajectory_dataset(dataset) or is_preference_dataset(dataset)


def _loading(args: DTRPOConfig) -> dict[str, Any]:
    known = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "dtype", "attn_implementation")
    return {key: value for key, value in args.model_options().items() if key in known}
