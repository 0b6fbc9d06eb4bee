r"""
Fine-tunes a diffusion language model on documents, with some of their tokens masked.

    trl-diffusion sft                                                             # embedded policy, 4x4 sudoku
    trl-diffusion sft --task sparse_sudoku
    trl-diffusion sft --config llada_sft --train_file data/conversations.jsonl    # messages, prompt and completion, or text
    trl-diffusion sft --trajectories outputs/trajectories --task sudoku           # the best responses of a collection
    trl-diffusion sft --use_peft --lora_target_modules all-linear --learning_rate 5e-3 --output_dir outputs/lora
    trl-diffusion sft --model_name_or_path outputs/tiny_sft                       # goes on from what was trained there

`accelerate launch recipes/sft.py` takes the same options, and paths of YAML files.

Options are those of `DiffusionSFTConfig`, `trl.ModelConfig` and the ones below; a YAML file given by `--config` sets them too,
and the command line wins. Without a model and without a config, `recipes/tiny_sft.yaml` applies. A directory that `sft` has
written holds its options in `sft.yaml`: as `--model_name_or_path`, it goes on with them, and what it becomes is saved beside it,
in DIRECTORY_continued. An adapter is trained further.

The loss is measured before and after training, on documents that training never sees. With `--task`, so is the share of solved
rows, greedily. In the output directory it leaves the trained model with its card, `run.png` (the run in six panels),
`results.json`, and every metric of the run in `trainer_state.json`; with a task `denoising.png`, too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Annotated, Any, cast

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from ..decoding.config import DecodingConfig, RolloutSettings
from ..fields import AtLeast, Suggestions, check_fields
from ..policies.prompts import as_prompts, tokenize_prompts
from ..sft.best import best_responses
from ..sft.config import DiffusionSFTConfig, is_refused
from ..sft.trainer import DiffusionSFTTrainer
from ..tasks import OTHERS, TASKS, Task, check_task_name, load_task, sft_rows
from ..trainer.answering import answer_together, decode_on_all
from ..trainer.checkpoints import check_start
from ..trajectories.dataset import load_trajectories
from ..trajectories.fingerprint import fingerprint_tokenizer
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import check_writable, errors_in_a_line, use_all_cores
from .dry import DryRun, is_dry
from .groups import INHERITED, SFT
from .lines import TuningLines, describe_output, describe_policy, next_command, start
from .opening import find_policy, new_adapter
from .options import NO_TASK, OptionParser
from .results import draw, measure, report_task, say_next, train_and_save, write_results
from .settings import TUNING, Settings, read_options


ROWS = 10_000  # that are made for a task, if nothing is said


@dataclass
class ScriptArguments(RolloutSettings, DryRun):
    """What to train on, and how a task is measured."""

    task: str | None = field(
        default=None,
        metadata={
            "help": "A task: its right answers are trained, and the share of solved rows is measured before and after. With "
            f"`trajectories`, it is measured only. There are {', '.join(sorted(TASKS))}, {OTHERS}.",
            "choices": Suggestions(sorted(TASKS)),
            "metavar": "TASK",
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Documents to train on (.csv, .jsonl or .json), with `messages`, `prompt` and `completion`, or `text`. With a "
            "task: its rows, as for `train`."
        },
    )
    eval_file: str | None = field(
        default=None,
        metadata={"help": "Documents to measure on, or rows of the task. Without it, the last rows of `train_file`."},
    )
    trajectories: list[str] | None = field(
        default=None,
        metadata={
            "help": "Directories that `collect` has written: the best response of each group is trained, if its reward is "
            "above the mean of the group."
        },
    )
    train_size: Annotated[int, AtLeast(1)] | None = field(
        default=None,
        metadata={"help": f"Most documents to train on. All of a file; {ROWS} are made for a task that has none."},
    )
    eval_size: Annotated[int, AtLeast(1)] = field(default=500, metadata={"help": "Most documents to measure on."})
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
    max_completion_length: Annotated[int, AtLeast(1)] = field(
        default=256, metadata={"help": "Most tokens of a response when a task is measured."}
    )
    settings: Settings | None = field(default=None, init=False)  # where the options come from

    def __post_init__(self):
        if isinstance(self.trajectories, str):  # a YAML file may name a single one
            self.trajectories = [self.trajectories]
        check_fields(self)
        if self.task == NO_TASK:
            self.task = None
        if self.task is not None:
            check_task_name(self.task)
        self.check_rollout_settings()
        self.decoding()  # checks its settings

    def decoding(self) -> DecodingConfig:
        """Settings with which a task is measured, greedily."""
        settings = self.rollout_settings()
        if self.steps_per_block is not None:  # which is given then, and `tokens_per_step` is not
            del settings["tokens_per_step"]
        return DecodingConfig(self.max_completion_length, 0.0, **settings)


@dataclass
class Data:
    """
    What a run trains and measures on.

    Attributes:
        train, held_out (`Dataset`): documents.
        prompt (`str` or `list`): one to try afterwards.
        task ([`Task`], *optional*): what is measured beside the loss.
    """

    train: Dataset
    held_out: Dataset
    prompt: Any
    task: Task | None = None


def load_data(script_args: ScriptArguments, seed: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Data:
    """
    Reads or makes the documents. A collection needs the `tokenizer`.

    Raises:
        ValueError, FileNotFoundError: if nothing is named, too much is named, or a file is not as it should be.
    """
    task = None
    if script_args.task:
        size = script_args.train_size or (sys.maxsize if script_args.train_file else ROWS)
        size = 1 if script_args.trajectories and not script_args.train_file else size  # it is not trained on
        task = load_task(
            script_args.task, script_args.train_file, script_args.eval_file, size, script_args.eval_size, seed
        )
    if script_args.trajectories:
        return _best_of(script_args, script_args.trajectories, task, cast(PreTrainedTokenizerBase, tokenizer))
    if task is not None:
        return Data(task.documents(task.train), task.documents(task.evaluation), task.evaluation[0]["prompt"], task)
    if not script_args.train_file:
        raise ValueError(
            "There is nothing to train on. Give documents with `--train_file`, a task with `--task`, or the responses of a "
            "collection with `--trajectories`."
        )
    rows = sft_rows(script_args.train_file)
    held_out = sft_rows(script_args.eval_file)[: script_args.eval_size] if script_args.eval_file else None
    if held_out is not None and held_out[0].keys() != rows[0].keys():
        raise ValueError(
            f"{script_args.eval_file} has {sorted(held_out[0])}, but {script_args.train_file} has {sorted(rows[0])}. Write both "
            "in the same format."
        )
    train, held_out = _split(rows, held_out, script_args, script_args.train_file)
    return Data(Dataset.from_list(train), Dataset.from_list(held_out), _prompt_of(held_out[0]))


def _split(rows: list, held_out: list | None, script_args: ScriptArguments, source: str) -> tuple[list, list]:
    """Rows to train on and rows to measure on: the last ones, unless there are some. Rows to measure on are not trained."""
    if held_out is None:
        size = min(script_args.eval_size, len(rows) // 2)
        rows, held_out = rows[: len(rows) - size], rows[len(rows) - size :]
        if not held_out:
            raise ValueError(f"{source} has a single document: nothing is left to measure on. Give `--eval_file`.")
    seen = {repr(row) for row in held_out}
    train = [row for row in rows if repr(row) not in seen][: script_args.train_size]
    if not train:
        raise ValueError(f"Every document of {source} is among those to measure on: nothing is left to train on.")
    return train, held_out


def _best_of(
    script_args: ScriptArguments, directories: list[str], task: Task | None, tokenizer: PreTrainedTokenizerBase
) -> Data:
    """The best responses of collections."""
    if task is None and script_args.train_file:
        raise ValueError("`--train_file` and `--trajectories` are both to be trained on. Give one of them.")
    if task is None and script_args.eval_file:
        raise ValueError("`--eval_file` beside `--trajectories` needs `--task`, which says what its rows are.")
    stored = concatenate_datasets([load_trajectories(path) for path in directories])
    best = best_responses(stored, fingerprint_tokenizer(tokenizer)).to_list()
    if task is not None:
        train = Dataset.from_list(best[: script_args.train_size])
        return Data(train, task.documents(task.evaluation), task.evaluation[0]["prompt"], task)
    train, held_out = _split(best, None, script_args, ", ".join(directories))
    return Data(Dataset.from_list(train), Dataset.from_list(held_out), stored[0]["prompt"])


def _prompt_of(row: dict[str, Any]) -> Any:
    """A prompt to try, from a document."""
    if "messages" in row:
        last = max((place for place, one in enumerate(row["messages"]) if one["role"] != "assistant"), default=0)
        return row["messages"][: last + 1]
    return row.get("prompt") or row["text"][: max(len(row["text"]) // 4, 1)]


def make_trainer(
    script_args: ScriptArguments,
    training_args: DiffusionSFTConfig,
    model_args: ModelConfig,
    lines: TuningLines,
) -> tuple[DiffusionSFTTrainer, Data]:
    """The trainer of the policy that the arguments name, and its data. Says what it trains and where it writes."""
    model, tokenizer = find_policy(script_args, training_args, model_args)
    data = load_data(script_args, training_args.seed, tokenizer)
    if "labels" in data.train.column_names and "prompt" in data.held_out.column_names:
        training_args.completion_only_loss = True  # TRL looks at the first row for training, which has labels already
    opened = not isinstance(model, str)  # an adapter, which is trained further
    trainer = DiffusionSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
        quantization_config=None if opened else get_quantization_config(model_args),
        peft_config=None if opened else new_adapter(model_args),
    )
    lines.follow(trainer, stored=True)
    if script_args.settings is not None:
        trainer.accelerator.print(script_args.settings.line)
    trainer.accelerator.print(describe_policy(trainer, str(model_args.model_name_or_path) if opened else model))
    trainer.accelerator.print(describe_output(training_args))
    return trainer, data


def answer(trainer: DiffusionSFTTrainer, decoding: DecodingConfig, prompts: list) -> tuple[list[str], TrajectoryBatch]:
    """Responses of the policy in training. Processes share the work."""
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    decode = partial(
        decode_on_all, trainer, batch_size=trainer.args.per_device_eval_batch_size, sharded=trainer.is_fsdp_enabled
    )
    prompt_ids = tokenize_prompts(tokenizer, as_prompts(prompts))
    return answer_together(trainer, tokenizer, prompt_ids, decoding, 0, decode)


def fine_tune(
    script_args: ScriptArguments,
    training_args: DiffusionSFTConfig,
    model_args: ModelConfig,
    lines: TuningLines | None = None,
) -> DiffusionSFTTrainer:
    """
    Trains, and measures before and after.

    Args:
        script_args ([`ScriptArguments`]): what to train on.
        training_args ([`DiffusionSFTConfig`]): how to train.
        model_args ([`~trl.ModelConfig`]): what to train.
        lines ([`TuningLines`], *optional*): what is said about the run.

    Returns:
        [`DiffusionSFTTrainer`], after training.
    """
    lines = lines or TuningLines()
    with errors_in_a_line():
        use_all_cores()
        script_args.check_wet()
        check_writable(training_args.output_dir, "--output_dir")
        check_start(training_args)
        trainer, data = make_trainer(script_args, training_args, model_args, lines)
    say, task = trainer.accelerator.print, data.task
    answering = partial(answer, trainer, script_args.decoding())
    what = f"{len(data.held_out)} {task.unit if task else 'documents'}"
    say(f"Measuring the policy on {what} that training never sees ...")
    with lines.timed("measuring_before"):
        loss_before = trainer.evaluate()["eval_loss"]
        before = measure(task, answering) if task else None
    say(
        f"{before.name} before training: {before.said}, loss {loss_before:.4f}"
        if before
        else f"loss before training: {loss_before:.4f}"
    )
    train_and_save(trainer, lines, script_args.settings)
    with lines.timed("measuring_after"):
        loss_after = trainer.evaluate()["eval_loss"]
        after = measure(task, answering) if task else None
    say(f"loss {loss_before:.4f} -> {loss_after:.4f} per token ({what}, seed {training_args.seed})")
    losses = {"loss_before": loss_before, "loss_after": loss_after, "documents": len(data.train)}
    following = partial(next_command, trainer, settings=script_args.decoding())
    if task is not None and before is not None and after is not None:
        report_task(trainer, lines, task, before, after, following, losses)
    elif trainer.is_world_process_zero():
        results = {"rows": len(data.held_out), "seed": training_args.seed, **losses}
        write_results(trainer, results, lines, following(data.prompt))
        say_next(trainer, lines, following(data.prompt), draw(trainer, results))
    return trainer


KINDS = (ScriptArguments, DiffusionSFTConfig, ModelConfig)  # which have the options


def parse(arguments: list[str] | None = None) -> tuple[ScriptArguments, DiffusionSFTConfig, ModelConfig]:
    """Reads options, those of the command line by default, after [`~commands.settings.find_settings`] has found the recipe that applies."""
    return cast("tuple[ScriptArguments, DiffusionSFTConfig, ModelConfig]", read_options(_parser(), TUNING, arguments))


def _parser() -> OptionParser:
    hidden = [one.name for one in fields(DiffusionSFTConfig) if is_refused(one.name)]
    return OptionParser("sft", KINDS, __doc__, SFT, INHERITED, hidden)


@errors_in_a_line()
def main(arguments: list[str] | None = None) -> None:
    """Runs the command, with the options of the command line by default."""
    if is_dry(arguments):
        from . import dry_run  # here, since it knows this command

        raise SystemExit(dry_run.main("sft", arguments))
    start(TuningLines(), parse, fine_tune, arguments)


if __name__ == "__main__":
    main()
