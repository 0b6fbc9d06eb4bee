r"""
Trains a diffusion language model with dTRPO and shows what it gained.

    trl-diffusion train                                                           # embedded policy, 4x4 sudoku
    trl-diffusion train --eval_file puzzles.csv                                   # measured on your puzzles
    trl-diffusion train --config tiny_countdown
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

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..evaluation.run import wilson
from ..fields import check_fields
from ..links import link
from ..policies.files import policy_in
from ..policies.loading import load_tokenizer
from ..policies.policy import open_adapter
from ..policies.tiny import resolve_embedded, tiny_policy_path
from ..quiet import hush_commands
from ..tasks import TASKS, load_task, preference_rows
from ..trainer.checkpoints import check_start
from ..trainer.config import DTRPOConfig, is_refused
from ..trainer.trainer import DTRPOTrainer
from ..trajectories.dataset import load_trajectories
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import check_writable, errors_in_a_line, read_mapping, use_all_cores, versions, write_text
from ..viz.runs import Run
from .groups import INHERITED, TRAIN
from .interrupt import ending_in_a_line, is_part, typed
from .lines import RunLines, describe_output, describe_policy, next_command, one_line, prompt_text
from .options import OptionParser
from .settings import Settings, check_adapter_options, find_settings, given_options, keep_settings


if TYPE_CHECKING:
    from collections.abc import Callable

    from ..trajectories.trajectory import TrajectoryBatch


PREFERENCES = "preferences"  # as a task: pairs of a better and a worse response instead of prompts and rewards


@dataclass
class ScriptArguments:
    """What to train on."""

    task: str = field(
        default="sudoku", metadata={"help": "What to train on.", "choices": [*sorted(TASKS), PREFERENCES]}
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


def random_policy(fields: str, tokenizer, directory: Path, seed: int) -> str:
    """Makes a small randomly initialised policy for a tokenizer, and saves it: a reference is loaded from there. The
    global random state is afterwards what it was before."""
    options = read_mapping(fields, "random_policy")
    config = AutoConfig.for_model(
        options.pop("model_type", "qwen3"),
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{"tie_word_embeddings": True, **options},
    )
    state = PartialState()
    if state.is_main_process:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.generation_config = GenerationConfig.from_model_config(config)
        model.save_pretrained(directory)
    state.wait_for_everyone()
    return str(directory)


def find_policy(script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig):
    """The path of the model (made here if it is a random one), or an adapter to train further, and its tokenizer."""
    if script_args.random_policy and not model_args.model_name_or_path:
        if not script_args.tokenizer_name_or_path:
            raise ValueError("`--random_policy` needs `--tokenizer_name_or_path`.")
        tokenizer = load_tokenizer(script_args.tokenizer_name_or_path)
        directory = Path(training_args.output_dir) / "random_policy"
        return random_policy(script_args.random_policy, tokenizer, directory, training_args.seed), tokenizer
    path = resolve_embedded(model_args.model_name_or_path or tiny_policy_path())
    tokenizer = load_tokenizer(script_args.tokenizer_name_or_path or path)
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **training_args.model_options(),
    }
    if "an adapter" in policy_in(path):
        return open_adapter(path, training_args.device, get_quantization_config(model_args), **options), tokenizer
    training_args.model_init_kwargs = options
    return path, tokenizer


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
        peft_config=None if opened else get_peft_config(model_args),
        **data,
    )
    lines.follow(trainer, stored=bool(script_args.trajectories) or script_args.task == PREFERENCES)
    if script_args.settings is not None:
        trainer.accelerator.print(script_args.settings.line)
    trainer.accelerator.print(describe_policy(trainer, str(model_args.model_name_or_path) if opened else model))
    trainer.accelerator.print(describe_output(training_args))
    return trainer


def train(trainer: DTRPOTrainer, lines: RunLines, settings: Settings | None) -> None:
    """Trains and saves."""
    resume = trainer.args.resume_from_checkpoint
    with lines.timed("training"):
        trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    trainer.create_model_card()  # after saving an adapter, which brings a card of peft's
    if settings is not None and trainer.is_world_process_zero():
        keep_settings(settings.options, str(trainer.args.output_dir))
    lines.is_saved = True


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
    train(trainer, lines, script_args.settings)
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
        write_results(trainer, results, lines, prompt)
        say_next(trainer, prompt, draw(trainer, results))


def train_on_task(
    script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig, lines: RunLines
) -> None:
    with errors_in_a_line():
        task = load_task(
            script_args.task,
            script_args.train_file,
            script_args.eval_file,
            script_args.train_size,
            script_args.eval_size,
            training_args.seed,
        )
        train_dataset = task.train
        reward_funcs: list[Callable] | None = task.reward_funcs
        if script_args.trajectories:
            stored = concatenate_datasets([load_trajectories(path) for path in script_args.trajectories])
            train_dataset = stored.select(range(min(len(stored), script_args.train_size)))
            reward_funcs = None  # the stored rewards
        trainer = make_trainer(
            script_args, training_args, model_args, lines, reward_funcs=reward_funcs, train_dataset=train_dataset
        )
    say = trainer.accelerator.print

    say(f"Measuring the policy on {len(task.evaluation)} {task.unit} that training never sees ...")
    with lines.timed("measuring_before"):
        before, _ = trainer.answer(task.evaluation["prompt"])
        was = task.scores(before)
    say(f"solve rate before training: {mean(was):.1%}")

    train(trainer, lines, script_args.settings)

    with lines.timed("measuring_after"):
        after, trajectories = trainer.answer(task.evaluation["prompt"])
        now = task.scores(after)
    say_if_idle(trainer)
    rows, interval = len(now), wilson(mean(now), len(now))
    say(
        f"solve rate {mean(was):.1%} -> {mean(now):.1%} "
        f"({rows} {task.unit}, 95 % interval {interval[0]:.1%} to {interval[1]:.1%}, seed {training_args.seed})"
    )
    if trainer.is_world_process_zero():
        results = {
            "task": task.name,
            "rows": rows,
            "seed": trainer.args.seed,
            "solve_rate_before": mean(was),
            "interval_before": wilson(mean(was), rows),
            "solve_rate_after": mean(now),
            "interval_after": interval,
        }
        row = most_telling(was, now)
        prompt = task.evaluation[row]["prompt"]
        write_results(trainer, results, lines, prompt)
        pictures = draw(trainer, results, trajectories, task.evaluation[0]["prompt"])
        print(
            f"One of the {task.unit} that it solves now:"
            if now[row]
            else f"It solves none of the {task.unit} yet. The first:"
        )
        for name, text in (("prompt", prompt_text(prompt)), ("before", before[row]), ("after", after[row])):
            print(f"  {name:7}{one_line(text)}")
        say_next(trainer, prompt, pictures)


def write_results(trainer: DTRPOTrainer, results: dict[str, Any], lines: RunLines, prompt: Any) -> None:
    """Leaves the figures of the run beside the trained policy, and what is needed to get them again. `prompt`: one to try."""
    results |= {
        "steps": trainer.state.global_step,
        "seconds": lines.seconds,
        "command": typed(),
        "versions": versions(),
        "next_commands": [next_command(trainer, prompt)],
    }
    write_text(Path(trainer.args.output_dir) / "results.json", json.dumps(results, indent=2) + "\n")


def most_telling(was: list[float], now: list[float]) -> int:
    """The first row that is solved and was not, or else the first that is solved, or else the first."""
    solved = [row for row, score in enumerate(now) if score]
    return next((row for row in solved if not was[row]), solved[0] if solved else 0)


def draw(
    trainer: DTRPOTrainer, results: dict[str, Any], answers: TrajectoryBatch | None = None, prompt: Any = ""
) -> list[str]:
    """Draws the run, and the first of some answers. Returns the names of the pictures."""
    directory = Path(trainer.args.output_dir)
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


def say_next(trainer: DTRPOTrainer, prompt: Any, pictures: list[str]) -> None:
    """Prints what was written where, and the next command."""
    written = ", ".join(["the trained policy", "its card", "results.json", "trainer_state.json", *pictures])
    print(f"{trainer.args.output_dir} has {written}.")
    if not is_part():
        print(f"Next: {next_command(trainer, prompt)}")
        print(f"Your own task and your own model: {link('docs/quickstart.md#5-train-it-on-your-task')}")


KINDS = (ScriptArguments, DTRPOConfig, ModelConfig)  # which have the options


def parse(arguments: list[str] | None = None) -> tuple[ScriptArguments, DTRPOConfig, ModelConfig]:
    """Reads options, those of the command line by default, after [`find_settings`] has found the recipe that applies."""
    settings = find_settings(sys.argv[1:] if arguments is None else arguments)
    found = cast("tuple[ScriptArguments, DTRPOConfig, ModelConfig]", _parser().read(settings.arguments))
    check_adapter_options(found[2].model_name_or_path or "", given_options(settings.arguments))
    found[0].settings = settings
    return found


def _parser() -> OptionParser:
    hidden = [one.name for one in fields(DTRPOConfig) if is_refused(one.name)]
    parser = OptionParser("train", KINDS, __doc__, TRAIN, INHERITED, hidden)
    parser.set_defaults(lora_dropout=0.0)  # updates and rollouts need the same network, so it would be switched off
    return parser


@errors_in_a_line()
def main(arguments: list[str] | None = None) -> None:
    """Runs the command, with the options of the command line by default."""
    hush_commands()
    lines = RunLines()
    with ending_in_a_line(lines.kept):
        with errors_in_a_line():
            given = parse(arguments)
        run(*given, lines)


if __name__ == "__main__":
    main()
