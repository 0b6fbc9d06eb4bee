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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, ProgressCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..fields import check_fields
from ..links import link
from ..policies.files import policy_in
from ..policies.loading import load_tokenizer
from ..policies.policy import open_adapter
from ..policies.tiny import resolve_embedded, tiny_policy_path
from ..tasks import TASKS, load_task, preference_rows
from ..trainer.callbacks import RewardProgressCallback
from ..trainer.checkpoints import check_start
from ..trainer.config import DTRPOConfig
from ..trainer.trainer import DTRPOTrainer
from ..trajectories.dataset import load_trajectories
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import (
    USAGE,
    check_config_file,
    check_writable,
    errors_in_a_line,
    read_mapping,
    use_all_cores,
    write_text,
)
from ..viz.runs import Run
from .settings import Settings, check_adapter_options, find_settings, given_options, keep_settings


if TYPE_CHECKING:
    from collections.abc import Callable


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
    script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig, **data: Any
) -> DTRPOTrainer:
    """The trainer of the policy that the arguments name."""
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
    if not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(RewardProgressCallback)
    if script_args.settings is not None:
        trainer.accelerator.print(script_args.settings.line)
    trainer.accelerator.print(f"Policy: {trainer.spec}")
    return trainer


def train(trainer: DTRPOTrainer, settings: Settings | None) -> None:
    """Trains and saves."""
    resume = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()
    trainer.create_model_card()  # after saving an adapter, which brings a card of peft's
    if settings is not None and trainer.is_world_process_zero():
        keep_settings(settings.options, str(trainer.args.output_dir))


def say_if_idle(trainer: DTRPOTrainer) -> None:
    """Says in the summary, too, if nothing could be learnt from some rollouts."""
    if (said := trainer.learning.summary()) is not None:
        trainer.accelerator.print(said)


def run(script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig) -> None:
    """Trains, and measures before and after."""
    with errors_in_a_line():
        use_all_cores()
        check_writable(training_args.output_dir, "--output_dir")
        check_start(training_args)
    if script_args.task == PREFERENCES:
        train_on_preferences(script_args, training_args, model_args)
    else:
        train_on_task(script_args, training_args, model_args)


def train_on_preferences(script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig) -> None:
    with errors_in_a_line():
        pairs, held_out = load_preferences(script_args)
        trainer = make_trainer(script_args, training_args, model_args, train_dataset=pairs, eval_dataset=held_out)
    say = trainer.accelerator.print
    say(f"Measuring the policy on {len(held_out)} pairs that training never sees ...")
    before = trainer.evaluate()["eval_loss"]
    train(trainer, script_args.settings)
    after = trainer.evaluate()
    results = {
        "task": PREFERENCES,
        "rows": len(held_out),
        "seed": training_args.seed,
        "loss_before": before,
        "loss_after": after["eval_loss"],
        "accuracy_after": after.get("eval_rewards/accuracies"),  # none without a reference
        "steps": trainer.state.global_step,
    }
    if trainer.is_world_process_zero():
        directory = Path(training_args.output_dir)
        write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
        print(draw(trainer, directory, results))
    say_if_idle(trainer)
    accuracy = results["accuracy_after"]
    order = "" if accuracy is None else f", {accuracy:.1%} in the order of the data"
    say(f"loss {before:.4f} -> {after['eval_loss']:.4f}{order} ({len(held_out)} pairs, seed {training_args.seed})")


def train_on_task(script_args: ScriptArguments, training_args: DTRPOConfig, model_args: ModelConfig) -> None:
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
            script_args, training_args, model_args, reward_funcs=reward_funcs, train_dataset=train_dataset
        )
    say = trainer.accelerator.print

    say(f"Measuring the policy on {len(task.evaluation)} {task.unit} that training never sees ...")
    before, _ = trainer.answer(task.evaluation["prompt"])
    rate_before = task.solve_rate(before)
    say(f"solve rate before training: {rate_before:.1%}")

    train(trainer, script_args.settings)

    after, trajectories = trainer.answer(task.evaluation["prompt"])
    rate_after = task.solve_rate(after)
    if trainer.is_world_process_zero():
        report(trainer, trajectories, Path(training_args.output_dir), task, rate_before, rate_after)
    say_if_idle(trainer)
    say(
        f"solve rate {rate_before:.1%} -> {rate_after:.1%} "
        f"({len(task.evaluation)} {task.unit}, seed {training_args.seed})"
    )


def report(trainer, trajectories, directory: Path, task, rate_before: float, rate_after: float) -> None:
    """Leaves figures and pictures beside the trained model."""
    results = {
        "task": task.name,
        "rows": len(task.evaluation),
        "seed": trainer.args.seed,
        "solve_rate_before": rate_before,
        "solve_rate_after": rate_after,
        "steps": trainer.state.global_step,
    }
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"The trained model, its tokenizer and results.json are in {directory}.")
    print(draw(trainer, directory, results, trajectories, task.evaluation[0]["prompt"]))
    print(f"Next: your own task and your own model, {link('docs/quickstart.md#5-train-it-on-your-task')}.")


def draw(
    trainer, directory: Path, results: dict[str, Any], answers: TrajectoryBatch | None = None, prompt: Any = ""
) -> str:
    """Draws the run and the first of some answers beside the trained model. Says what was drawn."""
    try:
        from ..viz.plots import MOST_CELLS, PART, fitting_positions, num_cells, plot_runs, plot_trajectory

        run = Run(str(directory), trainer.state.log_history, results)
        said = f"The run in six panels: {plot_runs([run], directory / 'run.png')}."
        if answers is None:
            return said
        part = None
        if num_cells(answers, trainer.spec) > MOST_CELLS:
            part = fitting_positions(answers, trainer.spec, 0, PART)
        title = prompt if isinstance(prompt, str) else ""
        picture = plot_trajectory(
            answers,
            trainer.spec,
            trainer.processing_class,
            directory / "denoising.png",
            title=title,
            max_positions=part,
        )
    except ImportError as error:
        return f"No pictures were drawn: {error}"
    what = f"The first {part} positions of one answer" if part else "One answer"
    return f"{said} {what} being denoised: {picture}."


KINDS = (ScriptArguments, DTRPOConfig, ModelConfig)  # which have the options


def parse(arguments: list[str] | None = None) -> tuple[ScriptArguments, DTRPOConfig, ModelConfig]:
    """Reads options, those of the command line by default, after [`find_settings`] has found the recipe that applies."""
    settings = find_settings(sys.argv[1:] if arguments is None else arguments)
    parser = TrlParser(KINDS, usage=USAGE)  # type: ignore[arg-type]  # takes classes
    found = cast(
        "tuple[ScriptArguments, DTRPOConfig, ModelConfig]",
        parser.parse_args_and_config(args=check_config_file(settings.arguments, KINDS)),
    )
    check_adapter_options(found[2].model_name_or_path or "", given_options(settings.arguments))
    found[0].settings = settings
    return found


@errors_in_a_line()
def main(arguments: list[str] | None = None) -> None:
    """Runs the command, with the options of the command line by default."""
    with errors_in_a_line():
        given = parse(arguments)
    run(*given)


if __name__ == "__main__":
    main()
