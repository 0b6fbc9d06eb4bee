"""Callbacks that show the progress of a run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import ProgressCallback, TrainerCallback

from ..decoding.config import DecodingConfig
from ..fields import check_at_least
from ..policies.prompts import as_prompts
from ..viz.plots import fitting_positions, plot_trajectory


if TYPE_CHECKING:  # not at run time: a recipe named `evaluate` may be in the same folder as the script
    from evaluate import EvaluationModule

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
        shown = {name: f"{value:.3f}" for name, value in _rewards(logs, "").items()}
        if shown:
            self.training_bar.set_postfix(shown)
        own = {name: value for name, value in logs.items() if name.startswith("eval_") and "/" not in name}
        measured = {name.removeprefix("eval_"): value for name, value in own.items() if isinstance(value, float)}
        measured = {name: value for name, value in measured.items() if name not in _COSTS} | _rewards(logs, "eval_")
        if measured:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            self.training_bar.write(f"Evaluation after {state.global_step} updates: {figures}")


def _rewards(logs: dict[str, Any], prefix: str) -> dict[str, float]:
    """The mean rewards in a log, by the names of their functions, and the share of pairs in the right order."""
    found = {}
    for name, value in logs.items():
        if value is not None and name.startswith(f"{prefix}rewards/") and name.endswith(("/mean", "/accuracies")):
            found[name.removeprefix(f"{prefix}rewards/").removesuffix("/mean")] = value
    return found


def show_rewards(trainer: DTRPOTrainer) -> None:
    """Replaces transformers' progress bar by one that shows the rewards. Another bar, such as that of a notebook, stays."""
    callbacks = trainer.callback_handler.callbacks
    plain = [one for one in callbacks if type(one) is ProgressCallback]
    for one in plain:
        trainer.remove_callback(one)
    if plain and not any(isinstance(one, RewardProgressCallback) for one in callbacks):
        trainer.add_callback(RewardProgressCallback())


class TrajectoryCallback(TrainerCallback):
    """
    Draws responses of the latest rollout during training. Pictures are written to files, and sent to Weights & Biases or
    TensorBoard if `report_to` names them. Only the main process draws.

    Example:

    ```python
    trainer = DTRPOTrainer(...)
    trainer.add_callback(TrajectoryCallback(trainer, every=50))
    ```

    Args:
        trainer ([`DTRPOTrainer`]):
            The trainer that this callback is added to.
        every (`int`):
            Draw every this many optimizer steps.
        directory (`str` or `Path`, *optional*):
            Directory of the pictures: `step_000123.png` and, for further responses, `step_000123_1.png`. Defaults to
            `trajectories` in the output directory.
        rows (`int`, *optional*, defaults to `1`):
            Number of responses to draw, from the first of the rollout on.
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
        every: int,
        directory: str | Path | None = None,
        rows: int = 1,
        max_positions: int = 64,
    ):
        for name, value in (("every", every), ("rows", rows), ("max_positions", max_positions)):
            check_at_least(name, value)
        if find_spec("matplotlib") is None:
            raise ImportError("TrajectoryCallback needs matplotlib: pip install 'trl-diffusion[viz]'")
        self.trainer, self.every, self.rows, self.max_positions = trainer, every, rows, max_positions
        self.directory = directory

    def on_step_end(self, args, state, control, **kwargs):
        rollouts = self.trainer.last_rollouts
        if not state.is_world_process_zero or state.global_step % self.every or rollouts is None:
            return
        directory = Path(args.output_dir, "trajectories") if self.directory is None else Path(self.directory)
        paths = []
        for row in range(min(self.rows, len(rollouts))):
            path = directory / f"step_{state.global_step:06d}{f'_{row}' if row else ''}.png"
            title = f"response {row} at optimizer step {state.global_step}"
            shown = fitting_positions(rollouts, self.trainer.spec, row, self.max_positions)
            paths.append(
                plot_trajectory(
                    rollouts, self.trainer.spec, self.trainer.processing_class, path, row, title, max_positions=shown
                )
            )
        if "wandb" in args.report_to:
            self._log_to_wandb(paths, state.global_step)
        if "tensorboard" in args.report_to:
            self._log_to_tensorboard(paths, state.global_step)

    @staticmethod
    def _log_to_wandb(paths: list[Path], step: int) -> None:
        import wandb

        if wandb.run is None:
            return
        images = [wandb.Image(str(path)) for path in paths]
        # As transformers logs. With `step=`, wandb drops entries whose step is below its own count of calls.
        wandb.log({"trajectory": images[0] if len(images) == 1 else images, "train/global_step": step})

    def _log_to_tensorboard(self, paths: list[Path], step: int) -> None:
        from matplotlib.image import imread

        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                for row, path in enumerate(paths):
                    name = f"trajectory/{row}" if row else "trajectory"
                    writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")


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
