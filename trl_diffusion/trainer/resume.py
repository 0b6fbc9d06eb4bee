"""Exact resuming: training from a checkpoint equals training that was never interrupted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..agreement import check_shared, fail_together
from . import checkpoints
from ._trl import TrainerMixin
from .policy_files import TiedWeights


if TYPE_CHECKING:
    from torch.utils.data import Sampler
    from transformers.trainer_utils import TrainOutput


logger = get_logger(__name__)

# Settings of a trainer that decide how rollouts are split into batches, in addition to those of GRPO.
_SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed")
# Settings of GRPO that do not affect a rollout.
_HARMLESS = frozenset(
    """
    log_completions log_trajectories num_completions_to_print log_unique_prompts log_multimodal log_completions_hub_repo
    num_generations_eval model_init_kwargs rollout_batch_size estimator_check_steps estimator_check_size
    precompute_ref_log_probs ds3_gather_for_generation
    """.split()
)


def find_checkpoint(trainer: Trainer, wanted: str | bool | None) -> str | None:
    """
    The checkpoint to continue from: the same on all processes, and without a fault on any of them. Every process must call it.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer.
        wanted (`str` or `bool`, *optional*): a checkpoint, or `True` for the newest complete one, if there is one.

    Raises:
        ValueError: if the checkpoint is damaged or incomplete.
    """
    accelerator, directory = trainer.accelerator, str(trainer.args.output_dir)
    failure: Exception | None = None
    engine: checkpoints.Engine = "fsdp" if trainer.is_fsdp_enabled else "plain"
    engine = "deepspeed" if trainer.is_deepspeed_enabled else engine
    if wanted is True:
        newest: list[str | None] = [None]
        if accelerator.is_main_process:
            try:
                found = checkpoints.last_usable_checkpoint(directory, engine)
                newest = [None if found is None else str(found)]
            except (OSError, ValueError) as error:
                failure = error
        fail_together(accelerator, failure, "Looking for a checkpoint")
        broadcast_object_list(newest)
        wanted = newest[0]
        if wanted is None:
            logger.warning(f"There is no complete checkpoint in {directory}: training starts from the beginning.")
    if not wanted:
        return None
    fault = checkpoints.find_fault(str(wanted), engine)
    if fault is not None:
        failure = ValueError(
            f"{wanted} cannot be resumed: {fault}. Restore it, go on from another checkpoint, or start a new run from "
            "its weights, with its path as `model`."
        )
    fail_together(accelerator, failure, "Resuming")
    return str(wanted)


@dataclass
class Progress:
    """
    The position of a process in a run, in addition to what transformers saves.

    Attributes:
        batches (`int`): batches trained on so far.
        epoch (`int`): number of passes over the dataset before this one.
        batches_in_epoch (`int`): batches of this pass trained on so far.
        settings (`dict[str, str]`): settings that decide how rollouts are generated and split into batches.
        rollout (`list[dict[str, Any]]`, *optional*): the batches of the rollout that is still being trained on.
        completions (`dict[str, Any]`): the table of the rollout's completions, if it is shown.
        metrics (`dict[str, list[float]]`): metrics that were not logged yet.
        loss (`Tensor`): sum of the losses that were not logged yet.
        steps_since_log (`int`): number of optimizer steps of these losses.
        extra (`dict[str, Any]`): state that a trainer adds, see [`ExactResume.extra_state`].
    """

    batches: int
    epoch: int
    batches_in_epoch: int
    settings: dict[str, str]
    rollout: list[dict[str, Any]] | None
    completions: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    steps_since_log: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def path(checkpoint: str | Path, process_index: int) -> Path:
        return Path(checkpoint) / f"rollout_{process_index}.pt"

    def save(self, checkpoint: str | Path, process_index: int) -> None:
        """Writes the progress to a checkpoint."""
        torch.save(
            {entry.name: getattr(self, entry.name) for entry in fields(self)}, self.path(checkpoint, process_index)
        )

    @classmethod
    def load(cls, checkpoint: str | Path, process_index: int, device: torch.device) -> Progress | None:
        """
        Reads the progress from a checkpoint. `None` if another program wrote the checkpoint.

        Raises:
            ValueError: if the file is damaged.
        """
        path = cls.path(checkpoint, process_index)
        if not path.is_file():
            return None
        try:
            progress = cls(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({error}). Go on from another checkpoint.") from error
        if progress.rollout is not None:
            progress.rollout = [
                {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
                for batch in progress.rollout
            ]
        return progress


class ExactResume(TiedWeights, TrainerMixin):
    """
    Makes resuming of a [`~trl.GRPOTrainer`] exact: training from a checkpoint equals, bit for bit, training that was never
    interrupted. This also holds in the middle of a rollout.

    - A checkpoint also holds the rollout that is being trained on, the position in the data and in the log, and the state of
      callbacks. What a reward function or a random dataset keeps in memory is not part of it.
    - A checkpoint is complete once all of it is on the disk. Only then are older ones deleted (`save_total_limit`).
    - If settings of batches or rollouts, or the number of processes, have changed, training continues with a fresh rollout,
      and a warning says what has changed.
    - Only one training at a time can use `output_dir`.

    Put this class before the trainer in the list of base classes: `class MyTrainer(ExactResume, GRPOTrainer)`. If such a
    class keeps state in memory between steps, `extra_state` and `restore_extra_state` add it to a checkpoint. Large state
    uses `save_extra_files` and `load_extra_files`.
    """

    train_sampler: Sampler | None = None
    # Position in the data: the pass over the dataset, and the batches before it. `_skipped`: batches of this pass that a
    # resumed run does not read.
    _epoch = -1
    _epoch_start = _skipped = 0
    # Of a resumed run, until training begins: the checkpoint, the sum of the losses not logged yet, and their number of steps.
    _resumed: tuple[Path, Tensor, int] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_PlaceCallback(self))

    # ------------------------------------------------------------------------------------------- for subclasses

    def prepare_run(self) -> None:
        """Called when it is certain that training can begin, and before it begins."""

    def extra_state(self) -> dict[str, Any]:
        """Other state that a process keeps in memory between steps: tensors, numbers, text, lists and mappings."""
        return {}

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the state that [`extra_state`] returned when the checkpoint was written."""

    def save_extra_files(self, checkpoint: Path) -> None:
        """Adds files to a checkpoint, such as the weights of another model. Every process calls it, before the checkpoint
        counts as complete."""

    def load_extra_files(self, checkpoint: Path) -> None:
        """Reads the files of `save_extra_files`. Every process calls it before the first batch, when all models are on their
        devices."""

    # --------------------------------------------------------------------------------------------- starting a run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains the policy. With `resume_from_checkpoint=True` it continues from the newest complete checkpoint in
        `output_dir`, or starts from the beginning if there is none. A command that was killed can therefore be given
        again unchanged. The other arguments are those of [`~transformers.Trainer.train`].

        Raises:
            ValueError: if another training uses `output_dir`, the processes do not share it, or the checkpoint is damaged or
                incomplete.
        """
        failure = None
        with ExitStack() as held:
            if self.accelerator.is_main_process:
                try:
                    held.enter_context(checkpoints.only_training_in(self.args.output_dir))
                except (OSError, ValueError) as error:
                    failure = error
            fail_together(self.accelerator, failure, "Training")
            if not self.args.save_on_each_node:
                check_shared(self.accelerator, str(self.args.output_dir))
            checkpoint = find_checkpoint(self, resume_from_checkpoint)
            self.prepare_run()
            return super().train(checkpoint, *args, **kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        self.train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self.train_sampler

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """Sets the state of a run in transformers, and the position in data and rollout. Returns the number of finished passes
        over the dataset, and the number of batches of the current pass that were trained on."""
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._step, self._buffered_inputs, self._resumed = 0, None, None
        self._metrics["train"].clear()
        if resume_from_checkpoint is not None:
            self._resumed = (Path(resume_from_checkpoint), torch.zeros(()), 0)
            self._restore_callbacks()
            if self._is_over(max_steps):
                return num_train_epochs, 0
            epochs, batches = self._restore(Path(resume_from_checkpoint), epochs, batches)
        self._epoch, self._skipped = epochs - 1, batches
        if self.train_sampler is not None:
            for _ in range(epochs):
                next(iter(self.train_sampler), None)  # draws the order of one pass
        return epochs, batches

    def _is_over(self, max_steps: int) -> bool:
        """Whether no step is left. transformers would make a step before it checks this."""
        step, reason = self.state.global_step, None
        if step >= max_steps:
            reason = f"`max_steps` is {max_steps}"
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                if callback.early_stopping_patience_counter >= callback.early_stopping_patience:
                    reason = "it was stopped early"
        if reason is not None:
            logger.warning(f"The run was over after {step} optimizer steps ({reason}): nothing is trained.")
        return reason is not None

    def _restore_callbacks(self) -> None:
        """Restores the state of callbacks, with the settings of this run."""
        found: dict[str, list] = {}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback)
        for name, callbacks in found.items():
            states = self.state.stateful_callbacks.get(name, [])
            states = states if isinstance(states, list) else [states]
            # with several callbacks of a class, transformers appends their states to those of earlier checkpoints
            for callback, state in zip(callbacks, states[-len(callbacks) :], strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)
            now = [callback.state() for callback in callbacks]
            self.state.stateful_callbacks[name] = now if len(now) > 1 else now[0]

    # ------------------------------------------------------------------------------------- the place in a rollout

    def _restore(self, checkpoint: Path, epochs: int, batches: int) -> tuple[int, int]:
        """Continues the rollout of a checkpoint at its position, or begins with a fresh one. Returns the position in the data.
        For a stream it is that of the checkpoint, otherwise that of transformers."""
        progress, failure = None, None
        try:
            progress = Progress.load(checkpoint, self.accelerator.process_index, self.accelerator.device)
        except ValueError as error:
            failure = error
        fail_together(self.accelerator, failure, "Resuming")
        now = self._settings()
        changes = self._changes(progress, now)
        streams = isinstance(self.train_dataset, IterableDataset) and not self.args.ignore_data_skip
        if changes:
            logger.warning(
                f"{checkpoint} {'; '.join(changes)}. Training continues with a fresh rollout, and after the data of as many steps "
                "with the present settings, so it does not equal an uninterrupted run exactly."
            )
            if streams and progress is not None:
                epochs, batches = progress.epoch, self._place_in_stream(progress, now)
            self._step = batches  # a pass over the data consists of whole rollouts, so this is the position inside one
            return epochs, batches
        assert progress is not None
        self._step, self._buffered_inputs = progress.batches, progress.rollout
        self._metrics["train"].update(progress.metrics)
        self._restore_completions(progress.completions)
        self.restore_extra_state(progress.extra)
        self._resumed = (checkpoint, progress.loss, progress.steps_since_log)
        return (progress.epoch, progress.batches_in_epoch) if streams else (epochs, batches)

    def _changes(self, progress: Progress | None, now: Mapping[str, str]) -> list[str]:
        """The changes, on any process, that prevent an exact continuation. The result is the same on all processes."""
        if progress is None:
            changes = ["holds no rollout"]
        else:
            then = progress.settings
            pairs = [(name, then.get(name, value), value) for name, value in now.items()]
            changed = [f"{name}={before}, not {value}" for name, before, value in pairs if before != value]
            changes = ["was written with " + ", ".join(changed)] if changed else []
        return list(dict.fromkeys(gather_object(changes)))

    def _settings(self) -> dict[str, str]:
        """The settings that decide how rollouts are generated and split into batches."""
        general = {entry.name for entry in fields(TrainingArguments)}
        own = [
            entry.name
            for entry in fields(self.args)
            if entry.name not in general and entry.name not in _HARMLESS and not entry.name.startswith("vllm_")
        ]
        settings = {name: getattr(self.args, name) for name in (*_SETTINGS, *own)}
        settings["number of processes"] = self.accelerator.num_processes
        if not isinstance(self.train_dataset, IterableDataset):
            settings["rows of the dataset"] = len(self.train_dataset)
        return {name: repr(value) for name, value in settings.items()}

    @staticmethod
    def _place_in_stream(progress: Progress, now: Mapping[str, str]) -> int:
        """Number of batches, with the settings `now`, that have as many prompts as the batches before the checkpoint, rounded
        down to whole optimizer steps."""

        def prompts_per_batch(settings: Mapping[str, str]) -> Fraction:
            prompts = Fraction(int(settings["generation_batch_size"]), int(settings["num_generations"]))
            return prompts / int(settings["num_iterations"]) / int(settings["steps_per_generation"])

        batches = int(progress.batches_in_epoch * prompts_per_batch(progress.settings) / prompts_per_batch(now))
        return batches - batches % int(now["gradient_accumulation_steps"])

    # --------------------------------------------------------------------------------------------------- saving

    def inside_rollout(self) -> bool:
        """Whether the next step will train on the current rollout as well."""
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the random state and, with it, the rollout that is still being trained on."""
        super()._save_rng_state(output_dir)
        shown = self.log_completions and self.accelerator.is_main_process
        progress = Progress(
            batches=self._step,
            epoch=self._epoch,
            batches_in_epoch=self._step - self._epoch_start,
            settings=self._settings(),
            rollout=self._buffered_inputs if self.inside_rollout() else None,
            completions=_plain({name: self._logs[name] for name in self._logs if name != "images"}) if shown else {},
            metrics={name: list(values) for name, values in self._metrics["train"].items()},
            loss=self._tr_loss.cpu(),
            steps_since_log=self.state.global_step - self._globalstep_last_logged,
            extra=self.extra_state(),
        )
        progress.save(output_dir, self.accelerator.process_index)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint. It counts, and older ones are deleted, only after all of it is on the disk."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"checkpoint-{self.state.global_step}"
        self.save_extra_files(checkpoint)
        if checkpoint.is_dir():
            checkpoints.make_durable(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.unmark_later(run_dir, self.state.global_step)
            checkpoints.mark_complete(checkpoint)
            checkpoints.rotate(run_dir, limit, keep=[checkpoint, self.state.best_model_checkpoint])

    def _restore_completions(self, table: dict[str, Any]) -> None:
        """Restores the table of completions."""
        for name, values in table.items():
            if isinstance(values, dict):
                for column, cells in values.items():
                    self._logs[name][column].extend(cells)
            else:
                self._logs[name].extend(values)


class _PlaceCallback(TrainerCallback):
    """Counts the passes over the dataset, and finishes the set-up of a resumed run when training begins."""

    def __init__(self, trainer: ExactResume):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer._resumed is None:
            return
        checkpoint, loss, steps = trainer._resumed
        trainer._resumed = None
        trainer.load_extra_files(checkpoint)
        trainer._tr_loss += loss.to(trainer._tr_loss.device)
        trainer._total_loss_scalar -= loss.item()  # `train_loss` is the mean of this call's steps
        trainer._globalstep_last_logged -= steps

    def on_epoch_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._epoch += 1
        trainer._epoch_start = trainer._step - trainer._skipped
        trainer._skipped = 0


def _plain(value: Any) -> Any:
    """The same value as lists, mappings, text and numbers only, so that a file can be read without running code."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    return str(value)
