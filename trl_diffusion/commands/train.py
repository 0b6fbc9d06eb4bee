r"""
Trains a diffusion language model with dTRPO and shows what it gained.

    trl-diffusion train                                                           # embedded policy, 4x4 sudoku
    trl-diffusion train --eval_file puzzles.csv                                   # measured on your puzzles
    trl-diffusion train --config tiny_countdown
    trl-diffusion train --config llada --task reasoning_gym:mini_sudoku            # or my_task.py:make_task
    trl-diffusion train --config llada --train_file rows.jsonl --reward_funcs math_accuracy ./rewards.py:brief
    trl-diffusion train --config tiny_offline --trajectories outputs/trajectories
    trl-diffusion train --config gsm8k_preferences --train_file pairs.jsonl --tokenizer_name_or_path DIR
    trl-diffusion train --config tiny_sudoku --use_peft --learning_rate 3e-3 --output_dir outputs/lora
    trl-diffusion train --model_name_or_path outputs/tiny_sudoku                  # goes on from what was trained there

`accelerate launch recipes/train.py` takes the same options, and paths of YAML files.

Options are those of `DTRPOConfig`, `trl.ModelConfig` and the ones below; a YAML file given by `--config` sets them too,
and the command line wins. Without a model and without a config, `recipes/tiny_sudoku.yaml` applies. A directory that
`train` has written holds its options in `train.yaml`: as `--model_name_or_path`, it goes on with them, and what it becomes
is saved beside it, in DIRECTORY_continued. An adapter is trained further. The first line of a run says what is taken from where.

The policy is measured before and after training, greedily, on rows that training never sees. In the output directory
it leaves the trained model with its card, `run.png` (the run in six panels), `denoising.png` (one answer, positions against
steps), `results.json`, and every metric of the run in `trainer_state.json`. With preference pairs (`task: preferences`) nothing is
generated; the policy is measured on pairs that training never sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, concatenate_datasets
from trl import ModelConfig, get_quantization_config

from ..fields import Suggestions, check_fields
from ..tasks import OTHERS, TASKS, check_task_name, preference_rows
from ..trainer.checkpoints import check_start
from ..trainer.config import DTRPOConfig, is_refused
from ..trainer.trainer import DTRPOTrainer
from ..trajectories.dataset import load_trajectories
from ..utils import check_writable, errors_in_a_line, use_all_cores, wilson
from .data import DEFAULT, OwnData
from .dry import DryRun, is_dry
from .groups import INHERITED, TRAIN
from .interrupt import is_part
from .lines import RunLines, describe_output, describe_policy, next_command, start
from .opening import find_policy, new_adapter
from .options import OptionParser
from .results import draw, measure, most_telling, report_task, say_next, train_and_save, write_results
from .settings import TRAINING, Settings, read_options


if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["KINDS", "ScriptArguments", "draw", "find_policy", "main", "most_telling", "parse", "run"]

PREFERENCES = "preferences"  # as a task: pairs of a better and a worse response instead of prompts and rewards


@dataclass
class ScriptArguments(OwnData, DryRun):
    """What to train on."""

    task: str | None = field(
        default=None,
        metadata={
            "help": f"What to train on: {', '.join(sorted(TASKS))}, {PREFERENCES}, {OTHERS}. Without rows and rewards of your own, "
            f"{DEFAULT}.",
            "choices": Suggestions((*sorted(TASKS), PREFERENCES)),
            "metavar": "TASK",
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows to train on (.csv, .jsonl or .json). Puzzles are generated without it. For `preferences`: rows "
            "with `chosen` and `rejected`, and perhaps `prompt`."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Rows to measure on, before and after. Training rows among them are dropped."}
    )
    trajectories: list[str] | None = field(
        default=None,
        metadata={"help": "Directories that `collect` has written, to train on instead of fresh responses."},
    )
    train_size: int = field(default=10_000, metadata={"help": "Most rows to train on."})
    eval_size: int = field(default=500, metadata={"help": "Most rows to measure on."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not in the model's directory."}
    )
    random_policy: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a model: fields of a config, as JSON, for a randomly initialised policy (a Qwen3 if they "
            "name no `model_type`) with the vocabulary of `tokenizer_name_or_path`. For trying a pipeline, not for results."
        },
    )
    settings: Settings | None = field(default=None, init=False)  # where the options come from

    def __post_init__(self):
        if isinstance(self.trajectories, str):  # a YAML file may name a single one
            self.trajectories = [self.trajectories]
        check_fields(self)
        self.take_task()
        if self.task is not None:
            check_task_name(self.task, [PREFERENCES])


def load_preferences(script_args: ScriptArguments) -> tuple[Dataset, Dataset]:
    """Pairs to train on and pairs to measure on: those of `eval_file`, or else the last ones of `train_file`."""
    if script_args.trajectories:
        raise ValueError(
            "`task: preferences` reads pairs from `--train_file`; `--trajectories` is for the other tasks."
        )
    if not script_args.train_file:
        raise ValueError("`task: preferences` needs `--train_file`, rows with `chosen` and `rejected`.")
    rows = preference_rows(script_args.train_file)
    if script_args.eval_file:
        held_out = preference_rows(script_args.eval_file)[: script_args.eval_size]
    else:
        size = min(script_args.eval_size, len(rows) // 2)
        rows, held_out = rows[: len(rows) - size], rows[len(rows) - size :]
    if not held_out:
        raise ValueError(f"{script_args.train_file} has a single pair: nothing is left to measure on.")
    return Dataset.from_list(rows[: script_args.train_size]), Dataset.from_list(held_out)


def make_trainer(
    script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig, lines: RunLines, **data: Any
) -> DTRPOTrainer:
    """The trainer of the policy that the arguments name. Says what it trains and where it writes."""
    model, tokenizer = find_policy(script_args, training_args, model_args)
    opened = not isinstance(model, str)  # an adapter, which is trained further
    trainer = DTRPOTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        quantization_config=None if opened else get_quantization_config(model_args),
        peft_config=None if opened else new_adapter(model_args),
        **data,
    )
    lines.follow(trainer, stored=bool(script_args.trajectories) or script_args.task == PREFERENCES)
    if script_args.settings is not None and not is_part():  # of a round, the whole command has said it
        trainer.accelerator.print(script_args.settings.line)
    trainer.accelerator.print(describe_policy(trainer, str(model_args.model_name_or_path) if opened else model))
    trainer.accelerator.print(describe_output(training_args))
    return trainer


def say_if_idle(trainer: DTRPOTrainer) -> None:
    """Says in the summary, too, if nothing could be learnt from some rollouts."""
    if (said := trainer.learning.summary()) is not None:
        trainer.accelerator.print(said)


def run(
    script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig, lines: RunLines | None = None
) -> None:
    """Trains, and measures before and after."""
    lines = lines or RunLines()
    with errors_in_a_line():
        use_all_cores()
        script_args.check_wet()
        check_writable(training_args.output_dir, "--output_dir")
        check_start(training_args)
    if script_args.task == PREFERENCES:
        train_on_preferences(script_args, training_args, model_args, lines)
    else:
        train_on_task(script_args, training_args, model_args, lines)


def train_on_preferences(
    script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig, lines: RunLines
) -> None:
    with errors_in_a_line():
        pairs, held_out = load_preferences(script_args)
        trainer = make_trainer(
            script_args, training_args, model_args, lines, train_dataset=pairs, eval_dataset=held_out
        )
    say = trainer.accelerator.print
    say(f"Measuring the policy on {len(held_out)} pairs that training never sees ...")
    with lines.timed("measuring_before"):
        before = trainer.evaluate()["eval_loss"]
    train_and_save(trainer, lines, script_args.settings)
    with lines.timed("measuring_after"):
        after = trainer.evaluate()
    accuracy = after.get("eval_rewards/accuracies")  # none without a reference
    results = {
        "task": PREFERENCES,
        "rows": len(held_out),
        "seed": training_args.seed,
        "loss_before": before,
        "loss_after": after["eval_loss"],
        "accuracy_after": accuracy,
        "accuracy_interval": None if accuracy is None else wilson(accuracy, len(held_out)),
    }
    say_if_idle(trainer)
    order = "" if accuracy is None else f", {accuracy:.1%} in the order of the data"
    say(f"loss {before:.4f} -> {after['eval_loss']:.4f}{order} ({len(held_out)} pairs, seed {training_args.seed})")
    if trainer.is_world_process_zero():
        row = held_out[0]
        prompt = row.get("prompt") or (row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][:-1])
        following = next_command(trainer, prompt)
        write_results(trainer, results, lines, following)
        say_next(trainer, lines, following, draw(trainer, results))


def train_on_task(
    script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig, lines: RunLines
) -> None:
    with errors_in_a_line():
        if script_args.trajectories and training_args.eval_strategy != "no":
            raise ValueError(
                "`eval_strategy` has the policy answer during training, and with `trajectories` it only answers before and after it. "
                "Set `eval_strategy` to 'no'."
            )
        task = script_args.load_task(script_args.train_size, script_args.eval_size, training_args.seed)
        train_dataset = task.train
        reward_funcs: list[Callable] | None = task.reward_funcs
        if script_args.trajectories:
            stored = concatenate_datasets([load_trajectories(path) for path in script_args.trajectories])
            train_dataset = stored.select(range(min(len(stored), script_args.train_size)))
            reward_funcs = None  # the stored rewards
        data = {"train_dataset": train_dataset, "reward_funcs": reward_funcs}
        if training_args.eval_strategy != "no":
            data["eval_dataset"] = task.evaluation
        trainer = make_trainer(script_args, training_args, model_args, lines, **data)
    say = trainer.accelerator.print

    say(f"Measuring the policy on {len(task.evaluation)} {task.unit} that training never sees ...")
    with lines.timed("measuring_before"):
        before = measure(task, trainer.answer)
    say(f"{before.name} before training: {before.said}")

    train_and_save(trainer, lines, script_args.settings)

    with lines.timed("measuring_after"):
        after = measure(task, trainer.answer)
    say_if_idle(trainer)
    report_task(trainer, lines, task, before, after, partial(next_command, trainer))


KINDS = (ScriptArguments, DTRPOConfig, ModelConfig)  # which have the options


def parse(arguments: list[str] | None = None) -> tuple[ScriptArguments, DTRPOConfig, ModelConfig]:
    """Reads options, those of the command line by default, after [`~commands.settings.find_settings`] has found the recipe that applies."""
    return cast("tuple[ScriptArguments, DTRPOConfig, ModelConfig]", read_options(_parser(), TRAINING, arguments))


def _parser() -> OptionParser:
    hidden = [one.name for one in fields(DTRPOConfig) if is_refused(one.name)]
    parser = OptionParser("train", KINDS, __doc__, TRAIN, INHERITED, hidden)
    parser.set_defaults(lora_dropout=0.0)  # updates and rollouts need the same network, so it would be switched off
    return parser


@errors_in_a_line()
def main(arguments: list[str] | None = None) -> None:
    """Runs the command, with the options of the command line by default."""
    if is_dry(arguments):
        from . import dry_run  # here, since it knows this command

        raise SystemExit(dry_run.main("train", arguments))
    start(RunLines(), parse, run, arguments)


if __name__ == "__main__":
    main()
