"""Stored responses as the trainer's data source."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from ..decoding.config import OTHER_DISTRIBUTION, stored_selection
from ..objectives.pairwise import make_pairs
from ..offline.preferences import from_preferences, is_preference_dataset
from ..offline.replay import with_orders
from ..policies.loading import source_options
from ..policies.policy import load_model
from ..policies.spec import DiffusionSpec
from ..scoring.estimators import ESTIMATORS
from ..trajectories.dataset import (
    OWN_COLUMNS,
    REWARD_PREFIX,
    check_trajectories,
    completions_of,
    has_unordered,
    is_trajectory_dataset,
    reward_columns,
)
from ..trajectories.fingerprint import fingerprint_policy, fingerprint_tokenizer
from .checks import check_number_of_rows, prompts_per_rollout
from .config import DTRPOConfig


if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from ..offline.orders import DecodingOrder


logger = get_logger(__name__)


def count_epochs(num_rows: int, args: DTRPOConfig) -> int:
    """
    Number of passes that training makes over the rows. The last rows of a pass are left out if they do not fill a rollout.

    Args:
        num_rows (`int`): rows of the training dataset.
        args ([`DTRPOConfig`]): settings of the trainer.
    """
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    rollouts = num_rows // prompts_per_rollout(args)
    batches = rollouts * args.num_iterations * cast(int, args.steps_per_generation)
    return math.ceil(args.max_steps / math.ceil(batches / args.gradient_accumulation_steps))


def stored_columns(datasets: Iterable[Any]) -> list[str]:
    """The columns of stored responses that training reads."""
    found: set[str] = set()
    for dataset in datasets:
        if is_trajectory_dataset(dataset):
            found |= {*OWN_COLUMNS, *(REWARD_PREFIX + name for name in reward_columns(dataset))}
    return sorted(found)


class StoredReward:
    """A reward function that returns the stored rewards of a trajectory dataset."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, completions, **kwargs) -> list[float | None]:
        return kwargs[REWARD_PREFIX + self.__name__]


class OfflineData:
    """
    Checks and prepares stored responses, and determines whether the reference generated them.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the policy as it is before training, which
            is the reference.
        config ([`~transformers.PretrainedConfig`]): its config.
        args ([`DTRPOConfig`]): settings of the trainer.
        spec ([`DiffusionSpec`]): facts about the policy.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        reward_funcs: reward functions that score the responses again, if any.
        quantization (*optional*): how the weights are quantized when the policy is loaded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        config: PretrainedConfig,
        args: DTRPOConfig,
        spec: DiffusionSpec,
        tokenizer: PreTrainedTokenizerBase,
        reward_funcs: Any,
        quantization: QuantizationConfigMixin | None = None,
    ):
        self.model, self.args, self.spec, self.tokenizer = model, args, spec, tokenizer
        self.vocab_size = config.get_text_config().vocab_size
        self.rescored, self.quantization = bool(reward_funcs), quantization
        self.reward_funcs: list[StoredReward] = []
        self.reference_is_recorded = False
        self.recorded = True  # whether log-probabilities were recorded
        self._rows = 0
        self.dropped: Counter[str] = Counter()  # groups without a pair, by the reason
        self._makers: set[str | None] = set()
        self.fingerprint: str | None = None

    def prepare(self, train_dataset, eval_dataset):
        """
        Checks the datasets and turns them into trajectories.

        Raises:
            TypeError: if stored responses are a stream.
            ValueError: naming the dataset, row and column, if responses cannot be trained on with these settings.
        """
        several = isinstance(eval_dataset, dict)
        evaluations = eval_dataset if several else {"eval_dataset": eval_dataset}
        group_size = cast(int, self.args.num_generations)
        train = self._with_differences("train_dataset", self._prepare_one("train_dataset", train_dataset, group_size))
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
                        f"{name} does not hold the rewards {names}, which train_dataset holds. Pass `reward_funcs` to score its "
                        "responses."
                    )
        self._find_reference([train, *(dataset for dataset in prepared.values() if dataset is not None)])
        return train, prepared if several else prepared["eval_dataset"]

    def _prepare_one(self, name: str, dataset: Dataset, group_size: int) -> Dataset:
        if isinstance(dataset, IterableDataset):
            raise TypeError(f"`{name}` must be a Dataset, not a stream: stored responses are checked before training.")
        dataset = dataset.with_format(None)  # a format may hide columns
        if is_preference_dataset(dataset):
            dataset = self._from_preferences(name, dataset)
        try:
            check_trajectories(dataset, self.spec, self.vocab_size, fingerprint_tokenizer(self.tokenizer))
            if has_unordered(dataset):
                dataset = self._with_orders(name, dataset)
            self._check_fit(dataset, group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return _with_numbers(dataset)

    def _from_preferences(self, name: str, dataset: Dataset) -> Dataset:
        if self.args.num_generations != 2:
            raise ValueError(f"{name} holds pairs, so `num_generations` must be 2, got {self.args.num_generations}.")
        model = self._asked_for_orders(name, dataset)
        try:
            with PartialState().main_process_first(), self._precision():  # the others read its replay from the cache
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
                    cast("dict[str, Any] | None", self.args.chat_template_kwargs),
                )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _with_orders(self, name: str, dataset: Dataset) -> Dataset:
        """The dataset, in which responses of unknown order have got one."""
        model = self._asked_for_orders(name, dataset)
        with PartialState().main_process_first(), self._precision():  # the others read its replay from the cache
            return with_orders(
                dataset,
                self.spec,
                cast("DecodingOrder", self.args.decoding_order),
                self.args.tokens_per_step,
                self.args.temperature,
                model,
                self.args.per_device_train_batch_size,
                self.args.seed,
            )

    def _precision(self) -> torch.autocast:
        """The mixed precision of training: log-probabilities are recorded as they are scored."""
        dtype = torch.float16 if self.args.fp16 else torch.bfloat16
        return torch.autocast(PartialState().device.type, dtype, enabled=bool(self.args.fp16 or self.args.bf16))

    def _asked_for_orders(self, name: str, dataset: Dataset) -> PreTrainedModel | PeftModel | None:
        """The policy that `decoding_order="confidence"` runs. `None` with the other orders, which need no policy."""
        if self.args.decoding_order != "confidence":
            return None
        if name == "train_dataset":
            check_number_of_rows(dataset, self.args)  # before the responses are replayed
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                f"{name}: `decoding_order='confidence'` runs the whole reference, but ZeRO-3 shards it over the processes. "
                "Make a trajectory dataset first, with `from_preferences`, and train on it."
            )
        model = self.model
        if isinstance(model, str):
            model = load_model(model, PartialState().device, self.quantization, **_loading(self.args))
        model.eval()
        return model

    def _check_fit(self, dataset: Dataset, group_size: int) -> None:
        """Checks that these responses can be trained on with these settings."""
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
            decoding = json.loads(row["decoding"])
            self._check_selection(number, decoding, row["event_logps"] is not None)
            if row["event_logps"] is None:
                if self.args.loss_type != "dpo":
                    raise ValueError(
                        f"Row {number}, column `event_logps`: no log-probabilities were recorded, so there is no importance "
                        f"ratio for `loss_type={self.args.loss_type!r}`. Use `loss_type='dpo'`, or "
                        "`decoding_order='confidence'`."
                    )
                self.recorded = False
                continue
            # Greedy decoding uses the distribution at temperature 1.
            temperature = decoding.get("temperature") or 1.0
            if temperature != self.args.temperature:
                raise ValueError(
                    f"Row {number}, column `decoding`: the log-probabilities were recorded at temperature {temperature}. "
                    f"Set `temperature={temperature}` (it is {self.args.temperature})."
                )
            changed = {name: decoding.get(name) for name in OTHER_DISTRIBUTION if decoding.get(name)}
            if changed:
                raise ValueError(
                    f"Row {number}, column `decoding`: the responses were decoded with {changed}, so their log-probabilities "
                    "are those of a changed distribution, which training does not score. Collect again without these settings."
                )

    def _check_selection(self, number: int, decoding: dict[str, Any], recorded: bool) -> None:
        """Checks that training scores the selection of positions in the same way as the log-probabilities of a row."""
        selections = (stored_selection(decoding), self.args.decoding().selection)
        then, now = (one and one.of_policy(self.spec) for one in selections)
        if then == now:
            return
        if not recorded:
            raise ValueError(
                f"Row {number}, column `decoding`: the order of these responses is from `decoding_order`, and not from a rule "
                "that looks at sampled tokens, so there is no selection to score. Set `score_selection=False`."
            )
        raise ValueError(
            f"Row {number}, column `decoding`: the log-probabilities were recorded with the selection scored as "
            f"{then}, but these settings score {now}. Set `score_selection`, `strategy`, `threshold`, "
            "`sub_block_size`, `tempered_confidence` and `max_completion_length` as they were."
        )

    def _with_differences(self, name: str, dataset: Dataset) -> Dataset:
        """The dataset. With `loss_type="dpo"`, groups without a pair are removed. With any loss, at least one group must have
        two responses whose stored rewards differ."""
        rewards = [REWARD_PREFIX + reward for reward in reward_columns(dataset)]
        if self.rescored or not rewards:
            return dataset
        weights = self.args.reward_weights or [1.0] * len(rewards)
        if len(weights) != len(rewards):
            raise ValueError(f"`reward_weights` holds {len(weights)} weights, but {name} has the rewards {rewards}.")
        pairwise = self.args.loss_type == "dpo"
        columns = ["event_positions", "event_tokens", "completion_lengths"] if pairwise else []
        kept, why = [], Counter[str]()
        for number, row in enumerate(dataset.select_columns([*rewards, *columns])):
            values = torch.tensor([[math.nan if v is None else v for v in row[column]] for column in rewards])
            scores = _group_scores(values, torch.tensor(weights), self.args.multi_objective_aggregation)
            reason = self._no_pair(scores, completions_of(row) if pairwise else None)
            if reason is None:
                kept.append(number)
            else:
                why[reason] += 1
        if not kept:
            raise ValueError(f"{name} has nothing to learn from: {_in_words(why)}.")
        if not pairwise:
            return dataset
        self.dropped, self._rows = why, len(dataset)
        return dataset.select(kept)

    def _no_pair(self, scores: Tensor, completions: list[list[int]] | None) -> str | None:
        """Why a group has no pair. `None` if it has one."""
        same = None
        if completions is not None:
            same = torch.tensor([[a == b for b in completions] for a in completions])[None]
        # Of a group that is larger than needed, each epoch draws some responses, so any pair of its responses may occur.
        whole = len(scores) == self.args.num_generations
        which = cast(Literal["best_worst", "all"], self.args.pair_selection if whole else "all")
        pairs = make_pairs(scores[None], which, same)
        if len(pairs.chosen):
            return None
        if pairs.tied:
            return "all responses have the same reward"
        if pairs.identical:
            return "the better and the worse response have the same tokens"
        return "fewer than two responses are scored"

    def _find_reference(self, datasets: list[Dataset]) -> None:
        """Finds out whether the reference, which is the policy before training, generated all of the data. The recorded
        log-probabilities are then those of the reference."""
        if self.args.beta == 0.0:
            return
        for dataset in datasets:
            self._makers |= set(dataset["policy_fingerprint"]) if _is_stored(dataset) else {"a rollout"}
        # An adapter that is trained further has its own reference.
        unknown = self.quantization is not None or isinstance(self.model, PeftModel)
        source = source_options(self.args.model_options()) if isinstance(self.model, str) else {}
        self.fingerprint = None if unknown else fingerprint_policy(self.model, **source)
        self.reference_is_recorded = (
            self._makers == {self.fingerprint}
            and self.fingerprint is not None
            and ESTIMATORS[self.args.estimator].recorded
        )
        if self.reference_is_recorded and self.args.sync_ref_model:
            raise ValueError(
                "`sync_ref_model=True` updates the reference during training, but the recorded log-probabilities, which are used "
                "for it, do not change. Set it to False."
            )

    def report(self) -> None:
        """Logs what was found, after the trainer has been created."""
        if self.dropped:
            logger.warning(
                f"{self.dropped.total()} of {self._rows} groups were dropped, because they have no pair: "
                f"{_in_words(self.dropped)}."
            )
        if self.args.loss_type != "dpo" and not ESTIMATORS[self.args.estimator].recorded:
            logger.warning(
                f"The estimator {self.args.estimator!r} cannot use the recorded log-probabilities, so the loss treats the stored "
                'responses as responses of the current policy. `estimator="dtrpo"` uses the recorded log-probabilities.'
            )
        if self.args.beta == 0.0:
            return
        if self.reference_is_recorded:
            logger.info(
                "The reference generated the data: its log-probabilities are the recorded ones, without a forward pass."
            )
        elif None in self._makers:
            logger.info(
                "It is unknown which policy generated the data: the reference scores it, in one more forward pass per step."
            )
        else:
            logger.warning(
                f"The data was generated by policy {sorted(map(str, self._makers))}, and the reference is "
                f"{self.fingerprint or 'another one'}: the reference scores the data, in one more forward pass per step."
            )


def _with_numbers(dataset: Dataset) -> Dataset:
    """The dataset with a column `row` of unique numbers. They identify the draws and the precomputed log-probabilities of a
    row. Numbers that are unique already, such as those of one collection, do not change. If they are missing, or if one
    occurs twice because collections were joined, the places in the dataset replace them."""
    numbers = dataset["row"][:] if "row" in dataset.column_names else []
    if len(numbers) == len(set(numbers)) == len(dataset) and all(type(number) is int for number in numbers):
        return dataset
    if "row" in dataset.column_names:
        dataset = dataset.remove_columns("row")
    return dataset.add_column("row", list(range(len(dataset))))


def _group_scores(values: Tensor, weights: Tensor, aggregation: str) -> Tensor:
    """Scores that order the responses of a group, `(G,)`, from the rewards of `F` functions, `(F, G)`, aggregated as in TRL.
    NaN where no function applies."""
    if aggregation == "normalize_then_sum":
        centred = values - values.nanmean(1, keepdim=True)
        values = centred / (centred.square().nanmean(1, keepdim=True).sqrt() + 1e-4)
    scores = (values * weights[:, None]).nansum(0)
    return scores.masked_fill(values.isnan().all(0), math.nan)


def _in_words(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} groups where {reason}" for reason, count in reasons.most_common())


def check_given(name: str, dataset: Any, spec: DiffusionSpec, vocab_size: int, tokenizer: Any) -> None:
    """
    Checks a dataset that only an evaluation is given.

    Raises:
        ValueError: naming row and column, if it holds stored responses that cannot be scored, or responses without a decoding order.
    """
    if not _is_stored(dataset):
        return
    if is_preference_dataset(dataset) or has_unordered(dataset):
        raise ValueError(
            f"{name}: pairs, and responses that another program decoded, get a decoding order when the trainer is created. Pass "
            "them as `eval_dataset` there."
        )
    try:
        check_trajectories(dataset, spec, vocab_size, fingerprint_tokenizer(tokenizer))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_stored(dataset: Any) -> bool:
    return is_trajectory_dataset(dataset) or is_preference_dataset(dataset)


def _loading(args: DTRPOConfig) -> dict[str, Any]:
    options = args.model_options()
    return {
        **source_options(options),
        **{key: options[key] for key in ("dtype", "attn_implementation") if key in options},
    }
