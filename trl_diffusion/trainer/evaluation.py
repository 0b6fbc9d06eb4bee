"""Evaluation during training. Its metrics do not depend on how the rows were split into batches."""

from __future__ import annotations

import random
import re
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from accelerate.logging import get_logger
from datasets import IterableDataset
from torch import Tensor

from ..utils import whole_file
from ._trl import TrainerMixin, print_completions
from .metrics import How, Tally, add_over_processes, length_figures, reward_figures
from .trackers import Trackers


logger = get_logger(__name__)

# How TRL's metrics of several batches are combined. Metrics that are not listed are means.
_HOW: dict[str, How] = {
    "num_tokens": "last",
    "clip_ratio/low_min": "min",
    "clip_ratio/high_max": "max",
    "sampling/sampling_logp_difference/max": "max",
    "sampling/importance_sampling_ratio/min": "min",
    "sampling/importance_sampling_ratio/max": "max",
}
# Metrics that are means over tokens. The metrics of ratios are means over tokens only if the ratios are taken per token.
_OF_TOKENS = ("kl", "entropy")
_OF_RATIOS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
# Losses that TRL divides by the tokens of the batch, and losses that it divides by `num_items_in_batch`. Other
# losses are means over responses.
_LOSS_OF_TOKENS = ("bnpo",)
_LOSS_OF_ITEMS = ("dapo", "cispo", "vespo")


def safe_name(name: str) -> str:
    """The prefix of an evaluation, for the name of a file."""
    return re.sub(r"[^\w.-]", "_", name)


@dataclass
class Evaluation:
    """
    An evaluation in progress.

    All processes get the same number of rows. If the rows cannot be divided evenly among them, some rows from the
    beginning are evaluated a second time to fill the last batch. These repeated rows do not count.

    Attributes:
        expected (`Callable[[], int]`): returns the total number of rows, as far as it is known at the moment.
        name (`str`): prefix of its metrics, such as `"eval"`.
        rows (`int`): number of rows evaluated so far, by all processes together.
        first (`int`): index, in the whole evaluation, of the first row of this process's batch.
        new (`int`): number of rows of the batch that count, in all processes together.
        counted (`Tensor` of shape `(R,)`, bool): which rows of this process's batch count.
        rewards (`list[Tensor]` of shape `(new, F)`): for each batch, the rewards of its counted rows, from all
            processes.
        lengths (`list[Tensor]` of shape `(new, 2)`): for each batch, the number of tokens of each response, and
            whether the response was cut off.
        tally ([`~trainer.metrics.Tally`]): all other metrics.
    """

    expected: Callable[[], int]
    name: str = "eval"
    rows: int = 0
    first: int = 0
    new: int = 0
    counted: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    rewards: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    @property
    def is_first_batch(self) -> bool:
        """Whether the current batch is the first one."""
        return self.rows == self.new

    def begin_batch(self, size: int, accelerator: Accelerator) -> None:
        """Determines which of the `size` rows of this process's next batch count."""
        place = accelerator.process_index * size
        self.first = self.rows + place
        self.new = size * accelerator.num_processes
        if accelerator.num_processes > 1:
            self.new = min(self.new, self.expected() - self.rows)
        self.counted = place + torch.arange(size, device=accelerator.device) < self.new
        self.rows += self.new

    def take(self, figures: dict[str, list[float]], weight: Callable[[str], tuple[float, float]]) -> None:
        """
        Moves the metrics that TRL recorded for a batch into the tally.

        Args:
            figures (`dict[str, list[float]]`): TRL's metrics. The dictionary is empty afterwards.
            weight (callable): maps the name of a metric to two numbers. The first is the number of rows, tokens or
                items over which TRL took the mean. The second is the number of them that count. The others are 0 in TRL's
                mean.
        """
        for name, values in figures.items():
            over, counted = weight(name)
            how = _HOW.get(name, "mean")
            for value in values:
                if how == "mean" and counted:
                    value = value * over / counted
                self.tally.add(name, value, counted, how)
        figures.clear()

    def figures(self, names: list[str], weights: Tensor, group_size: int) -> dict[str, float | None]:
        """All metrics of the evaluation. A metric without a value is `None`."""
        found: dict[str, float | None] = self.tally.results()
        if self.rewards:
            lengths, truncated = torch.cat(self.lengths).unbind(1)
            found.update(length_figures(lengths, truncated.bool()))
            found.update(reward_figures(torch.cat(self.rewards), names, weights.cpu(), group_size))
        return {name: None if value is None or value != value else value for name, value in found.items()}


class RowwiseEvaluation(TrainerMixin):
    """
    Makes evaluations of a [`~trl.GRPOTrainer`] independent of batches, of processes and of training.

    - Each metric has the value that TRL computes if all rows are in one batch. A mean is taken over all rows (or
      tokens). A minimum or maximum is taken over all rows.
    - The name of a metric names its dataset: `eval_NAME_...` if there are several datasets, and `test_...` for
      `predict`.
    - The completions of an evaluation are written to `completions/PREFIX_STEP.parquet`. The prefix is, for example,
      `eval` or `eval_NAME`. The table of training completions does not change.
    - After an evaluation, the random states and the mode of the policy are restored. A run with evaluations therefore
      trains in the same way as a run without them.

    Put this class before the trainer in the list of base classes: `class MyTrainer(RowwiseEvaluation, GRPOTrainer)`.
    """

    evaluation: Evaluation | None = None  # the evaluation in progress, if any
    eos_token_ids: list[int] | None  # of TRL, from 1.16 on

    def __init__(self, *args: Any, **kwargs: Any):
        self.tally = Tally()  # training metrics since the last log
        self._streamed = 0  # rows read so far from the stream that is evaluated
        self._shown_at = -1  # optimizer step of the last table of training completions
        self._tables: dict[str, pd.DataFrame] = {}  # of evaluations, not sent to trackers yet
        self.trackers = Trackers(self)
        self.eos_token_ids = None  # TRL sets it from 1.16 on
        super().__init__(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------- the loop

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates the policy. See [`~transformers.Trainer.evaluate`]."""
        self.trackers.start()
        with self._training_untouched():
            metrics = super().evaluate(*args, **kwargs)
        self._send_tables()
        return metrics

    def predict(self, *args: Any, **kwargs: Any):
        """Evaluates the policy on another dataset, without logging. See [`~transformers.Trainer.predict`]."""
        self.trackers.start()
        with self._training_untouched():
            output = super().predict(*args, **kwargs)
        self._send_tables()
        return output

    @contextmanager
    def _training_untouched(self) -> Iterator[None]:
        """Restores the random states and the mode of the policy at the end of the block."""
        python, numpy, training = random.getstate(), np.random.get_state(), self.model.training
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for model in (self.model_wrapped, self.model):
                model.train(training)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Runs the evaluation loop of transformers, and adds metrics over rows to its result."""
        self._prepare_precision()
        self.evaluation = Evaluation(self._expected_rows(dataloader), metric_key_prefix)
        logs, self._logs = self._logs, self._empty_logs()
        self._metrics["eval"].clear()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            rows = self.evaluation.rows
            figures = self.evaluation.figures(self.reward_func_names, self.reward_weights, self.num_generations_eval)
            self._show_completions(metric_key_prefix, rows)
        finally:
            self.evaluation, self._logs = None, logs
            self._metrics["eval"].clear()
        metrics = cast("dict[str, float | None]", output.metrics)
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output._replace(num_samples=rows)

    def _prepare_precision(self) -> None:
        """
        Lets an evaluation before training run in the mixed precision of training. transformers does so only if accelerate has
        prepared no other model. A reference is such a model.
        """
        others = self.accelerator._models and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self.accelerator.native_amp and others and not hasattr(self.model, "_original_forward"):
            self.accelerator.prepare_model(self.model, evaluation_mode=True)

    def _expected_rows(self, dataloader) -> Callable[[], int]:
        """A function that returns the number of rows to evaluate. Rows of a stream are counted as they are read."""
        dataset, size = dataloader.dataset, self.num_generations_eval
        if isinstance(dataset, IterableDatasetShard):
            return lambda: self._streamed * size
        if isinstance(dataset, IterableDataset):  # each process reads other shards, and no row is repeated
            return lambda: sys.maxsize
        return lambda: len(dataset) * size

    def get_eval_dataloader(self, eval_dataset=None):
        """
        TRL's dataloader for evaluation, with two changes.

        The rows of a stream are counted as they are read. If a dataset object is passed, its dataloader is not kept:
        with persistent workers, the trainer would use it again for another dataset.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, IterableDataset):
            self._streamed = 0
            dataset = eval_dataset = dataset.filter(self._count_row)
        persistent = self.args.dataloader_persistent_workers
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            self.args.dataloader_persistent_workers = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_persistent_workers = persistent

    def get_test_dataloader(self, test_dataset):
        """The dataloader for `predict`. It is that of an evaluation, in which TRL repeats the prompts of a stream as well."""
        return self.get_eval_dataloader(test_dataset)

    def _count_row(self, row: dict[str, Any]) -> bool:
        self._streamed += 1
        return True

    # ------------------------------------------------------------------------------------------------- a batch

    def _generate_and_score_completions(self, inputs):
        if self.evaluation is None:
            return super()._generate_and_score_completions(inputs)
        self._check_groups(len(inputs))
        self.evaluation.begin_batch(len(inputs), self.accelerator)
        output = super()._generate_and_score_completions(inputs)
        new = self.evaluation.new
        self.evaluation.take(self._metrics["eval"], lambda name: (new, new))
        if new < len(inputs) * self.accelerator.num_processes:
            output = self._leave_out(output, self.evaluation.counted)
        return output

    def _check_groups(self, rows: int) -> None:
        """Raises a `ValueError` if a batch of an evaluation does not consist of whole groups. `rows`: its rows on each process."""
        size, of_pairs = self.num_generations_eval, self.loss_type == "dpo"
        whole = rows if of_pairs else rows * self.accelerator.num_processes
        if whole % size:
            raise ValueError(
                f"A batch of this evaluation has {whole} responses{' on a process' if of_pairs else ''}, which is not a multiple of the "
                f"group size, {size} (`num_generations_eval`). Set `per_device_eval_batch_size` to a multiple of it."
            )

    def _leave_out(self, output: dict[str, Any], counted: Tensor) -> dict[str, Any]:
        """The rollout, with no tokens and advantage 0 in rows that do not count."""
        mask = output["completion_mask"] * counted[:, None]
        (tokens,) = add_over_processes(self.accelerator, mask.sum())
        items = torch.as_tensor(output["num_items_in_batch"])
        return {
            **output,
            "completion_mask": mask,
            "advantages": output["advantages"] * counted,
            "num_items_in_batch": torch.tensor(tokens, device=mask.device).to(items.dtype),
        }

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.evaluation is not None:
            ends = {*(self.eos_token_ids or [self._tokenizer.eos_token_id]), self._tokenizer.pad_token_id}
            shapes = [[len(ids), ids[-1] not in ends] for ids in completion_ids_list]
            gathered = self.accelerator.gather(torch.tensor(shapes, device=rewards.device))
            self.evaluation.rewards.append(rewards[: self.evaluation.new].cpu())
            self.evaluation.lengths.append(gathered[: self.evaluation.new].cpu())
            if not self.evaluation.counted.any():
                self._pending_metrics.clear()  # reward functions logged these for rows that do not count
        return rewards

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.evaluation is not None:
            self._tally_loss(loss, inputs)
        return loss

    def _tally_loss(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        """Adds the loss of a batch and TRL's other metrics to the tally, weighted as if all rows were in one batch."""
        assert self.evaluation is not None
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        share = 1 / self.accelerator.num_processes  # `num_items_in_batch` counts all processes together
        over = {"rows": float(len(mask)), "tokens": float(mask.sum())}
        over["items"] = float(inputs["num_items_in_batch"]) * share
        of_loss, least = "rows", 1.0  # TRL divides by at least one token
        if self.loss_type in _LOSS_OF_TOKENS:
            of_loss = "tokens"
        elif self.loss_type in _LOSS_OF_ITEMS:
            of_loss, least = "items", share
        total, *sums = add_over_processes(self.accelerator, loss * max(over[of_loss], least), *over.values())
        overall = dict(zip(over, sums, strict=True))
        counted = {**overall, "rows": float(self.evaluation.new)}
        self.evaluation.tally.add("loss", total / (counted[of_loss] or 1.0), counted[of_loss])

        def weight(name: str) -> tuple[float, float]:
            kind = "rows"
            if name == "policy_loss":
                kind = of_loss
            elif name in _OF_TOKENS or (name in _OF_RATIOS and self.importance_sampling_level == "token"):
                kind = "tokens"
            return overall[kind], counted[kind]

        self.evaluation.take(self._metrics["eval"], weight)

    def _counted(self, size: int) -> Tensor:
        """Which rows of the current batch count, shape `(R,)`: all except repeated rows of an evaluation."""
        if self.evaluation is None:
            return torch.ones(size, dtype=torch.bool, device=self.accelerator.device)
        return self.evaluation.counted

    @property
    def _tally_of_batch(self) -> Tally:
        """
        The tally that gets the metrics of the current batch, over all processes. It is that of the evaluation in progress, or in
        training that of the next log. The metrics of any other batch are not kept.
        """
        if self.evaluation is not None:
            return self.evaluation.tally
        return self.tally if self.model.training else Tally()

    def _record(self, name: str, value: float, weight: float = 1.0, how: How = "mean") -> None:
        """
        Records a metric of a batch, for the evaluation in progress or else for the next log of training.

        Args:
            name (`str`): name of the metric.
            value (`float`): value of the metric over all processes.
            weight, how: see [`~trainer.metrics.Tally.add`].
        """
        self._tally_of_batch.add(name, value, weight, how)

    # ------------------------------------------------------------------------------------------- what is shown

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Logs as TRL does, and adds the training metrics recorded here.

        The table of completions is shown only with training metrics, because an evaluation has already shown its own
        table. At the end of training it is not shown again.
        """
        if self.model.training:
            for name, value in self.tally.results().items():
                self._metrics["train"][name] = [float("nan") if value is None else value]
            self.tally = Tally()
        shown = self.log_completions
        again = "train_runtime" in logs and self._shown_at == self.state.global_step
        self.log_completions = shown and self.model.training and len(self._logs["prompt"]) > 0 and not again
        try:
            if self.log_completions:
                self._shown_at = self.state.global_step
            super().log(logs, start_time)
        finally:
            self.log_completions = shown

    def _empty_logs(self) -> dict[str, Any]:
        """
        An empty table for the completions of an evaluation. Unlike TRL's table, it can hold more than one rollout.

        On a process that shows no completions, the table keeps no rows.
        """

        def column():
            return [] if self.log_completions and self.accelerator.is_main_process else deque(maxlen=0)

        return {
            name: defaultdict(column) if isinstance(value, dict) else column() for name, value in self._logs.items()
        }

    def _show_completions(self, name: str, rows: int) -> None:
        """Prints a sample of the completions of an evaluation, and writes all of them to a file."""
        if not (self.log_completions and self.accelerator.is_main_process):
            return
        logs, step = self._logs, self.state.global_step
        whole = {column: values[:rows] for column, values in logs["extra"].items() if len(values) >= rows}
        for column in sorted(set(logs["extra"]) - set(whole)):
            logger.warning(
                f"{name}: reward functions did not log {column!r} for every response. The table leaves it out."
            )
        rewards = {column: values[:rows] for column, values in logs["rewards"].items()}
        prompts, completions, advantages = (logs[key][:rows] for key in ("prompt", "completion", "advantages"))
        if find_spec("rich") is not None:
            print(f"{name}:")
            print_completions(
                prompts, completions, rewards, advantages, step, self.num_completions_to_print, extra=whole
            )
        table = pd.DataFrame(
            {"step": [step] * len(prompts), "prompt": prompts, "completion": completions, **rewards, **whole}
            | {"advantage": advantages}
        )
        path = Path(self.args.output_dir, "completions", f"{safe_name(name)}_{step:05d}.parquet")
        with whole_file(path) as temporary:
            table.to_parquet(temporary)
        if self.log_unique_prompts:
            table = table[~table["prompt"].map(str).duplicated()]
        self._tables[f"{name}/completions"] = table

    def _send_tables(self) -> None:
        """Sends the tables of an evaluation to the trackers, after its metrics were logged: in an evaluation before training,
        trackers start only then."""
        tables, self._tables = self._tables, {}
        for name, table in tables.items():
            self.trackers.send_table(name, table)
