"""Callbacks that show the progress of a run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import ProgressCallback, Trainer, TrainerCallback

from ..decoding.config import DecodingConfig
from ..fields import check_at_least
from ..policies.prompts import as_prompts
from ..utils import whole_file
from ..viz.plots import fitting_positions, plot_trajectory
from ..viz.table import trajectory_rows
from .evaluation import safe_name


if TYPE_CHECKING:  # not at run time: a recipe named `evaluate` may be in the same folder as the script
    from evaluate import EvaluationModule

    from .rollouts import Seen
    from .trainer import DTRPOTrainer


logger = get_logger(__name__)


# Of an evaluation, but not about what the policy can do.
_COSTS = frozenset(
    "runtime samples_per_second steps_per_second num_tokens entropy reward_std frac_reward_zero_std".split()
)


class RewardProgressCallback(ProgressCallback):
    """
    A progress bar that shows the rewards instead of writing all metrics at every log. With the pairwise loss, it shows the share of
    pairs in the right order. An evaluation is a line above the bar. All metrics are in `trainer.state.log_history` and in the
    trackers named by `report_to`. [`DTRPOTrainer`] has this bar in place of that of transformers.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        shown = {name: f"{value:.3f}" for name, value in self.figures(logs).items()}
        if shown:
            self.training_bar.set_postfix(shown)
        own = {name: value for name, value in logs.items() if name.startswith("eval_") and "/" not in name}
        measured = {name.removeprefix("eval_"): value for name, value in own.items() if isinstance(value, float)}
        measured = {name: value for name, value in measured.items() if name not in _COSTS} | _rewards(logs, "eval_")
        if measured:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            self.training_bar.write(f"Evaluation after {state.global_step} updates: {figures}")

    def figures(self, logs: dict[str, Any]) -> dict[str, float]:
        """What the bar shows of a log, by name."""
        return _rewards(logs, "")


class LossProgressCallback(RewardProgressCallback):
    """A progress bar that shows the loss instead of writing all metrics at every log. [`DiffusionSFTTrainer`] has it."""

    def figures(self, logs: dict[str, Any]) -> dict[str, float]:
        return {"loss": logs["loss"]} if "loss" in logs else {}


def _rewards(logs: dict[str, Any], prefix: str) -> dict[str, float]:
    """The mean rewards in a log, by the names of their functions, and the share of pairs in the right order."""
    found = {}
    for name, value in logs.items():
        if value is not None and name.startswith(f"{prefix}rewards/") and name.endswith(("/mean", "/accuracies")):
            found[name.removeprefix(f"{prefix}rewards/").removesuffix("/mean")] = value
    return found


def replace_bar(trainer: Trainer, bar: type[RewardProgressCallback]) -> None:
    """Replaces transformers' progress bar by another one. A bar of another kind, such as that of a notebook, stays."""
    callbacks = trainer.callback_handler.callbacks
    plain = [one for one in callbacks if type(one) is ProgressCallback]
    for one in plain:
        trainer.remove_callback(one)
    if plain and not any(isinstance(one, RewardProgressCallback) for one in callbacks):
        trainer.add_callback(bar())


class _LookingCallback(TrainerCallback):
    """
    Shows responses of every evaluation. Only the main process does.

    Args:
        trainer ([`DTRPOTrainer`]): the trainer that this callback is added to.
        directory (`str` or `Path`, *optional*): directory of the files. Defaults to `trajectories` in the output directory.
    """

    def __init__(self, trainer: DTRPOTrainer, directory: str | Path | None):
        self.trainer, self.directory = trainer, directory

    def on_evaluate(self, args, state, control, **kwargs):
        self.look(self.trainer.seen_in_evaluation)

    def look(self, seen: Seen | None) -> None:
        """Shows responses, if there are any to be seen, on the main process."""
        if seen is not None and self.trainer.state.is_world_process_zero:
            self.show(seen)

    def show(self, seen: Seen) -> None:
        """Shows responses."""
        raise NotImplementedError

    def file_of(self, seen: Seen, ending: str) -> Path:
        """The file for something about responses that were seen at the current step."""
        default = Path(str(self.trainer.args.output_dir), "trajectories")
        folder = default if self.directory is None else Path(self.directory)
        return folder / f"{safe_name(seen.name or 'step')}_{self.trainer.state.global_step:06d}{ending}"


class TrajectoryCallback(_LookingCallback):
    """
    Draws responses while they are denoised: of the latest rollout every few updates, and of every evaluation. Pictures are
    written to files, and sent to the trackers that `report_to` names. Only the main process draws.

    Example:

    ```python
    trainer = DTRPOTrainer(...)
    trainer.add_callback(TrajectoryCallback(trainer, every=50))
    ```

    Args:
        trainer ([`DTRPOTrainer`]):
            The trainer that this callback is added to.
        every (`int`, *optional*):
            Draw the latest rollout every this many optimizer steps. Without it, only evaluations are drawn.
        directory (`str` or `Path`, *optional*):
            Directory of the pictures. They are called `step_000123.png`, or `eval_000123.png` after the prefix of an
            evaluation, and `step_000123_1.png` for further responses. Defaults to `trajectories` in the output directory.
        rows (`int`, *optional*, defaults to `1`):
            Number of responses to draw, from the first of the rollout or of the evaluation on.
        max_positions (`int`, *optional*, defaults to `64`):
            Largest number of positions to draw of a response, from its first on. The picture of a long response would be too
            large.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        trainer: DTRPOTrainer,
        every: int | None = None,
        directory: str | Path | None = None,
        rows: int = 1,
        max_positions: int = 64,
    ):
        for name, value in (("every", every), ("rows", rows), ("max_positions", max_positions)):
            if value is not None:
                check_at_least(name, value)
        if find_spec("matplotlib") is None:
            raise ImportError("TrajectoryCallback needs matplotlib: pip install 'trl-diffusion[viz]'")
        super().__init__(trainer, directory)
        self.every, self.rows, self.max_positions = every, rows, max_positions

    def on_step_end(self, args, state, control, **kwargs):
        if self.every is not None and state.global_step % self.every == 0:
            self.look(self.trainer.seen)

    def show(self, seen: Seen) -> None:
        paths, spec, step = [], self.trainer.spec, self.trainer.state.global_step
        for row in range(min(self.rows, len(seen.trajectories))):
            path = self.file_of(seen, f"{f'_{row}' if row else ''}.png")
            title = f"response {row}{f' of {seen.name}' if seen.name else ''} at optimizer step {step}"
            shown = fitting_positions(seen.trajectories, spec, row, self.max_positions)
            tokenizer = self.trainer.processing_class
            paths.append(plot_trajectory(seen.trajectories, spec, tokenizer, path, row, title, max_positions=shown))
        self.trainer.trackers.send_pictures(seen.called("trajectory"), paths)


class TrajectoryTableCallback(_LookingCallback):
    """
    Writes a table of responses at every log of training and at every evaluation, and sends it to the trackers that `report_to`
    names: a row for each response, with the columns of [`~viz.table.trajectory_rows`], its rewards and its advantage. Only the
    main process writes, about its own responses. `log_trajectories` of [`DTRPOConfig`] adds this callback.

    The files are `step_000123.parquet`, and `eval_000123.parquet` after the prefix of an evaluation.

    Args:
        trainer ([`DTRPOTrainer`]):
            The trainer that this callback is added to.
        rows (`int`):
            Largest number of responses in a table, from the first of the rollout or of the evaluation on.
        directory (`str` or `Path`, *optional*):
            Directory of the files. Defaults to `trajectories` in the output directory.

    Raises:
        ValueError: if the number of rows is not positive.
    """

    def __init__(self, trainer: DTRPOTrainer, rows: int, directory: str | Path | None = None):
        check_at_least("rows", rows)
        super().__init__(trainer, directory)
        self.rows = rows

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):  # neither an evaluation nor the end
            self.look(self.trainer.seen)

    def show(self, seen: Seen) -> None:
        trainer, first = self.trainer, seen.trajectories.select(slice(self.rows))
        found = trajectory_rows(first, trainer.spec, trainer.processing_class)
        scores = [{name: values[row] for name, values in seen.scores.items()} for row in range(len(found))]
        table = pd.DataFrame(
            [
                {"step": trainer.state.global_step, "prompt": row.pop("prompt"), "response": row.pop("response")}
                | given
                | row
                for row, given in zip(found, scores, strict=True)
            ]
        )
        with whole_file(self.file_of(seen, ".parquet")) as temporary:
            table.to_parquet(temporary)
        trainer.trackers.send_table(seen.called("trajectories"), table)


def log_trajectories(trainer: DTRPOTrainer, rows: int) -> None:
    """Adds the callbacks of `log_trajectories`: tables of that many responses and, with matplotlib, a picture at evaluations."""
    trainer.add_callback(TrajectoryTableCallback(trainer, rows))
    if find_spec("matplotlib") is not None:
        trainer.add_callback(TrajectoryCallback(trainer))
    elif trainer.args.eval_strategy != "no":
        logger.warning("Evaluations draw no response without matplotlib: pip install 'trl-diffusion[viz]'")


class MetricCallback(TrainerCallback):
    """
    Computes an `evaluate` metric at every evaluation. The current policy responds to prompts, and the metric gets all
    responses. Results are logged and added to those of the evaluation as `eval_NAME_KEY`, so `metric_for_best_model` can
    name one. Processes share the prompts. The main process computes the metric once.

    Example:

    ```python
    from trl_diffusion.metrics import SudokuSolved

    args = DTRPOConfig(
        ...,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_sudoku_solved",
        greater_is_better=True,
    )
    trainer = DTRPOTrainer(..., args=args, eval_dataset=puzzles)
    prompts, references = puzzles["prompt"], puzzles["puzzle"]
    metric = SudokuSolved()
    callback = MetricCallback(trainer, metric, "sudoku", prompts, references)
    trainer.add_callback(callback)
    ```

    Args:
        trainer ([`DTRPOTrainer`]):
            The trainer that this callback is added to. Add it before an `EarlyStoppingCallback` that uses the metric.
        metric (`evaluate.EvaluationModule`):
            The metric, set up for one process (see `trl_diffusion.metrics`).
        name (`str`):
            Name of the results in the log.
        prompts (`str` or `list`):
            Standard or conversational prompts, one or more, the same on every process.
        references (`list`, *optional*):
            The references of the metric, one for each prompt.
        decoding ([`DecodingConfig`], *optional*):
            Decoding settings. Defaults to those of the rollouts, with temperature 0.
        prepare (`Callable[[list[str]], list]`, *optional*):
            Computes the metric's predictions from the responses, such as rewards for [`~metrics.PassAtK`].
        options (`dict`, *optional*):
            Further arguments of the metric's `compute`.

    Raises:
        ValueError: if there is no prompt, or if the number of references is not the number of prompts.
    """

    def __init__(
        self,
        trainer: DTRPOTrainer,
        metric: EvaluationModule,
        name: str,
        prompts: str | list,
        references: list | None = None,
        decoding: DecodingConfig | None = None,
        prepare: Callable[[list[str]], list] | None = None,
        options: dict[str, Any] | None = None,
    ):
        self.trainer, self.metric, self.name = trainer, metric, name
        self.prompts, self.references = as_prompts(prompts), None if references is None else list(references)
        self.decoding, self.prepare, self.options = decoding, prepare, options or {}
        if self.references is not None and len(self.references) != len(self.prompts):
            raise ValueError(f"There are {len(self.prompts)} prompts but {len(self.references)} references.")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        answers, _ = self.trainer.answer(self.prompts, self.decoding)
        results: list[dict[str, Any]] = [{}]
        if state.is_world_process_zero:
            inputs = {"predictions": answers if self.prepare is None else self.prepare(answers), **self.options}
            if self.references is not None:
                inputs["references"] = self.references
            results = [self.metric.compute(**inputs)]
        broadcast_object_list(results)
        found = {f"eval_{self.name}_{key}": value for key, value in results[0].items()}
        if metrics is not None:
            metrics.update(found)
        self.trainer.log(dict(found))
