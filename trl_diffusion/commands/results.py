"""Training, and what is left of it: files, pictures, and the last lines of a run of `train` or `sft`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING, Any, TypeAlias

from ..links import link
from ..tasks.task import SOLVE_RATE, interval_of
from ..utils import versions, write_text
from ..viz.runs import Run
from .interrupt import is_part, typed
from .lines import RunLines, one_line, prompt_text
from .settings import Settings


if TYPE_CHECKING:
    from collections.abc import Callable

    from ..sft.trainer import DiffusionSFTTrainer
    from ..tasks import Task
    from ..trainer.trainer import DTRPOTrainer
    from ..trajectories.trajectory import TrajectoryBatch

    Trainer: TypeAlias = DTRPOTrainer | DiffusionSFTTrainer
    Answering = Callable[[list], tuple[list[str], TrajectoryBatch]]


@dataclass
class Measured:
    """
    What a policy answers to the evaluation rows of a task.

    Attributes:
        answers (`list[str]`): its answers.
        scores (`list[float | None]`): 1 for each right one, 0 for each other; or the first reward, for a task without a checker. `None`
            for a row to which the function does not apply, which does not count.
        trajectories ([`TrajectoryBatch`]): how the answers were denoised that this process decoded.
        name (`str`): what the mean of the scores is called.
    """

    answers: list[str]
    scores: list[float | None]
    trajectories: TrajectoryBatch
    name: str = SOLVE_RATE

    @property
    def known(self) -> list[float]:
        """The scores that there are."""
        return [score for score in self.scores if score is not None]

    @property
    def solve_rate(self) -> float:
        """Share of the rows that are solved, or the mean reward."""
        return mean(self.known)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean: Wilson's of a share, and that of the normal distribution otherwise."""
        return interval_of(self.known, self.name)

    @property
    def key(self) -> str:
        """The name as it is in `results.json`."""
        return self.name.replace(" ", "_")

    @property
    def said(self) -> str:
        """The mean, as it is printed."""
        return spell(self.solve_rate, self.name)


def spell(value: float, name: str) -> str:
    """A mean of scores of that name, as it is printed: a share in percent, a reward as a number."""
    return f"{value:.1%}" if name == SOLVE_RATE else f"{round(value, 6) + 0.0:.4g}"


def measure(task: Task, answer: Answering) -> Measured:
    """
    Lets a policy answer the evaluation rows of a task. `answer` gives texts and trajectories for prompts. Raises a `ValueError` if no
    row has a score.
    """
    answers, trajectories = answer(task.evaluation["prompt"])
    scores = task.scores(answers)
    task.known(scores)
    return Measured(answers, scores, trajectories, task.measured)


def train_and_save(trainer: Trainer, lines: RunLines, settings: Settings | None) -> None:
    """Trains and saves."""
    resume = trainer.args.resume_from_checkpoint
    with lines.timed("training"):
        trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    trainer.create_model_card()  # after saving an adapter, which brings a card of peft's
    if settings is not None and trainer.is_world_process_zero():
        settings.keep(str(trainer.args.output_dir))
    lines.is_saved = True


def report_task(
    trainer: Trainer,
    lines: RunLines,
    task: Task,
    before: Measured,
    after: Measured,
    next_command: Callable[[Any], str],
    further: dict[str, Any] | None = None,
) -> None:
    """
    Says what training on a task has gained, writes it down, draws it, and shows an answer.

    Args:
        trainer: the trainer.
        lines ([`RunLines`]): what was said about the run.
        task ([`Task`]): the task.
        before, after ([`Measured`]): the policy before and after training.
        next_command (`Callable[[Any], str]`): the next command, given a prompt to try.
        further (`dict[str, Any]`, *optional*): more figures for `results.json`.
    """
    rows, seed = len(after.known), trainer.args.seed
    low, high = (spell(end, after.name) for end in after.interval)
    trainer.accelerator.print(
        f"{after.name} {before.said} -> {after.said} ({rows} {task.unit}, 95 % interval {low} to {high}, seed {seed})"
    )
    if not trainer.is_world_process_zero():
        return
    results = {
        "task": task.name,
        "rows": rows,
        "seed": seed,
        f"{before.key}_before": before.solve_rate,
        "interval_before": before.interval,
        f"{after.key}_after": after.solve_rate,
        "interval_after": after.interval,
        **(further or {}),
    }
    row = most_telling(before.scores, after.scores)
    prompt = task.evaluation[row]["prompt"]
    write_results(trainer, results, lines, next_command(prompt))
    pictures = draw(trainer, results, after.trajectories, task.evaluation[0]["prompt"])
    now = "now as before" if after.scores[row] == before.scores[row] else "now"
    if after.name != SOLVE_RATE:
        print(f"One of the {task.unit}, with a reward of {spell(after.scores[row] or 0.0, after.name)} {now}:")
    elif after.scores[row]:
        print(f"One of the {task.unit} that it solves {now}:")
    else:
        print(f"It solves none of the {task.unit} yet. The first:")
    for name, text in (
        ("prompt", prompt_text(prompt)),
        ("before", before.answers[row]),
        ("after", after.answers[row]),
    ):
        print(f"  {name:7}{one_line(text)}")
    say_next(trainer, lines, next_command(prompt), pictures)


def write_results(trainer: Trainer, results: dict[str, Any], lines: RunLines, next_command: str) -> None:
    """Leaves the figures of the run beside the trained policy, and what is needed to get them again."""
    results |= {
        "steps": trainer.state.global_step,
        "seconds": lines.seconds,
        "command": typed(),
        "versions": versions(),
        "next_commands": [next_command],
    }
    write_text(Path(str(trainer.args.output_dir)) / "results.json", json.dumps(results, indent=2) + "\n")


def most_telling(was: list[float | None], now: list[float | None]) -> int:
    """The first row that is solved and was not, or else the first that is solved, or else the first. Of other scores, the first of
    those that have risen most. Rows without a score come last."""
    if not {*was, *now} <= {0.0, 1.0, None}:
        return max(
            range(len(now)),
            key=lambda row: (
                None not in (was[row], now[row]),
                now[row] is not None,
                (now[row] or 0.0) - (was[row] or 0.0),
            ),
        )
    solved = [row for row, score in enumerate(now) if score]
    return next((row for row in solved if not was[row]), solved[0] if solved else 0)


def draw(
    trainer: Trainer, results: dict[str, Any], answers: TrajectoryBatch | None = None, prompt: Any = ""
) -> list[str]:
    """Draws the run, and the first of some answers. Returns the names of the pictures."""
    directory = Path(str(trainer.args.output_dir))
    try:
        from ..viz.plots import MOST_CELLS, PART, fitting_positions, num_cells, plot_runs, plot_trajectory

        run = Run(str(directory), trainer.state.log_history, results)
        names = [plot_runs([run], directory / "run.png").name]
        if answers is None:
            return names
        part = None
        if num_cells(answers, trainer.spec) > MOST_CELLS:
            part = fitting_positions(answers, trainer.spec, 0, PART)
        picture = plot_trajectory(
            answers,
            trainer.spec,
            trainer.processing_class,
            directory / "denoising.png",
            title=prompt if isinstance(prompt, str) else "",
            max_positions=part,
        )
    except ImportError as error:
        print(f"No pictures were drawn: {error}")
        return []
    return [*names, picture.name + (f" (the first {part} positions of an answer)" if part else "")]


def say_next(trainer: Trainer, lines: RunLines, next_command: str, pictures: list[str]) -> None:
    """Prints what was written where, and the next command."""
    written = ", ".join(["the trained policy", "its card", "results.json", "trainer_state.json", *pictures])
    print(f"{trainer.args.output_dir} has {written}.")
    if not is_part():
        print(f"Next: {next_command}")
        print(f"Your own task and your own model: {link(lines.page)}")
