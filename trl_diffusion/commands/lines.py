"""What `train` and `sft` print about a run: what is trained and where it goes, how long it takes, and what it gained."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback

from ..decoding.config import DecodingConfig
from ..policies.forward import unwrap
from ..policies.tiny import tiny_policy_path
from ..quiet import hush_commands
from ..trainer.checkpoints import last_complete_checkpoint
from ..utils import errors_in_a_line, printable
from .interrupt import ending_in_a_line, how_to_go_on
from .parser import PROG


if TYPE_CHECKING:
    from ..sft.config import DiffusionSFTConfig
    from ..sft.trainer import DiffusionSFTTrainer
    from ..trainer.config import DTRPOConfig
    from ..trainer.trainer import DTRPOTrainer

    Trainer: TypeAlias = DTRPOTrainer | DiffusionSFTTrainer

LONGEST = 100  # characters of a text that is shown in one line


# ---------------------------------------------------------------------------------------------------------- in words


def in_words(number: int) -> str:
    """A large number as it is spoken."""
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if number >= size / 2:
            return f"{number / size:.2f} {name}"
    return f"{number:,}"


def duration(seconds: float) -> str:
    """A duration as it is spoken."""
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}" if seconds < 10 * size else f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"


def one_line(text: str) -> str:
    """A text in one line of a terminal, cut if it is long."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def prompt_text(prompt: Any) -> str:
    """The text of a prompt: of a conversation, that of its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


# ------------------------------------------------------------------------------------------------------- at the start


def count_weights(model: nn.Module, trained: bool = False) -> int:
    """The number of weights, or of those that are trained. Weights that processes share and rounded ones count as what they are."""
    if any(hasattr(weight, "ds_numel") for weight in model.parameters()):  # shared by ZeRO-3
        weights = [weight for weight in model.parameters() if weight.requires_grad or not trained]
        return sum(getattr(weight, "ds_numel") for weight in weights)  # noqa: B009
    return unwrap(model).num_parameters(only_trainable=trained)


def describe_policy(trainer: Trainer, path: str) -> str:
    """The policy and its size, in a line."""
    spec, model = trainer.spec, trainer.model
    name = "the embedded policy" if path == tiny_policy_path() else path
    size = f"{in_words(count_weights(model))} weights"
    if isinstance(unwrap(model), PeftModel):
        size += f", of which the adapter's {in_words(count_weights(model, trained=True))} are trained"
    clean = ", causal over clean tokens" if spec.clean_attention == "causal" else ""
    return f"Policy: {name}, {size}; {spec.attention} attention{clean}, blocks of {spec.block_size} tokens."


def describe_updates(trainer: DTRPOTrainer, stored: bool) -> str:
    """How many updates there are, and of how many responses, in a line. `stored`: whether these are stored ones."""
    args, state = trainer.args, trainer.state
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    done = f"; {state.global_step} are done" if state.global_step else ""
    return (
        f"Training: {state.max_steps} updates, each on {size} {'stored ' if stored else ''}responses "
        f"to {size // trainer.num_generations} prompts{done}."
    )


def describe_tuning(trainer: DiffusionSFTTrainer) -> str:
    """How many updates there are, and of how many documents, in a line."""
    args, state = trainer.args, trainer.state
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    done = f"; {state.global_step} are done" if state.global_step else ""
    what = "rows of packed documents" if args.packing else "documents"
    dataset = trainer.train_dataset
    of = f", of {len(dataset):,} in all" if isinstance(dataset, Sized) else ""
    return f"Training: {state.max_steps} updates, each on {size} {what}{of}{done}."


def describe_output(args: DTRPOConfig | DiffusionSFTConfig) -> str:
    """Where the run writes, in a line."""
    where = f"Output: {args.output_dir}, with the trained policy at the end"
    if args.save_strategy == "no":
        return f"{where} (`save_strategy` is no: nothing is kept of an interrupted run)."
    if args.save_strategy == "steps" and args.save_steps >= 1:
        return f"{where}, and a checkpoint every {args.save_steps:g} updates."
    return f"{where}, and checkpoints on the way."


class RunLines(TrainerCallback):
    """
    Prints how many updates a run has, and, after the first ones, how long the others take. Knows how long the parts of the run
    took, and what is kept when it is interrupted.
    """

    page = "docs/quickstart.md#5-train-it-on-your-task"  # to read next

    def __init__(self) -> None:
        self.trainer: Any = None  # a trainer, once there is one
        self.stored = False  # whether it trains on stored responses
        self.checkpoint: str | None = None  # the newest one of this run
        self.is_saved = False
        self.seconds: dict[str, float] = {}
        self._begun: tuple[int, float] | None = None  # the update after which time is measured, and the time then

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measures a part of the run."""
        begun = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - begun, 3)

    def follow(self, trainer: Trainer, stored: bool) -> None:
        """From now on this is the trainer of the run. `stored`: whether it trains on stored responses."""
        self.trainer, self.stored = trainer, stored
        trainer.add_callback(self)
        if trainer.args.resume_from_checkpoint:
            self.checkpoint = last_complete_checkpoint(trainer.args.output_dir)

    def on_train_begin(self, args, state, control, **kwargs):
        assert self.trainer is not None
        if state.is_world_process_zero:
            tqdm.write(self.updates())  # above the bar

    def updates(self) -> str:
        """How many updates there are, in a line."""
        return describe_updates(self.trainer, self.stored)

    def whole(self, args: Any) -> int:
        """Updates of a whole rollout."""
        return args.steps_per_generation * self.trainer.num_iterations // args.gradient_accumulation_steps or 1

    def on_step_end(self, args, state, control, **kwargs):
        """Measures a whole rollout and its updates, after a first one, which also warms up."""
        assert self.trainer is not None
        whole = self.whole(args)
        if self._begun is None:
            self._begun = (state.global_step, time.perf_counter())
            return
        first, begun = self._begun
        left = state.max_steps - state.global_step
        if state.global_step == first + whole and left and state.is_world_process_zero:
            seconds = (time.perf_counter() - begun) / whole
            tqdm.write(
                f"An update takes about {duration(seconds)}, the {left} that are left about {duration(seconds * left)}."
            )

    def on_save(self, args, state, control, **kwargs):
        self.checkpoint = str(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def close_bars(self) -> None:
        """Ends the lines of progress bars."""
        for callback in self.trainer.callback_handler.callbacks if self.trainer else ():
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.close()

    def kept(self) -> str:
        """What is kept of an interrupted run, and how to go on."""
        self.close_bars()
        resume = how_to_go_on("--resume_from_checkpoint", "true")
        if self.trainer is None or not (state := self.trainer.state).max_steps:
            begun = "The run had not begun"
            return f"{begun}: {self.checkpoint} is kept. {resume}" if self.checkpoint else f"{begun}: nothing is kept."
        done = f"{state.global_step} of {state.max_steps} updates were made"
        if self.is_saved:
            return f"{done}, and the trained policy is in {self.trainer.args.output_dir}. It was not measured."
        if self.checkpoint:
            return f"{done}, {self.checkpoint} is kept. {resume}"
        return f"{done}, and nothing is kept: there was no checkpoint yet."


class TuningLines(RunLines):
    """As [`RunLines`], for a run of `sft`."""

    page = "docs/howto/sft.md#your-documents"

    def updates(self) -> str:
        return describe_tuning(self.trainer)

    def whole(self, args: Any) -> int:
        return 1


# --------------------------------------------------------------------------------------------------------- at the end


def next_command(trainer: Trainer, prompt: Any, settings: DecodingConfig | None = None) -> str:
    """
    The command that lets the trained policy answer a prompt.

    Args:
        trainer: the trainer.
        prompt (`str` or `list`): the prompt.
        settings ([`DecodingConfig`], *optional*): settings of the decoder. Defaults to those of the rollouts, greedily.
    """
    directory, text = str(trainer.args.output_dir), prompt_text(prompt)
    words = [PROG, "generate", text if len(text) <= LONGEST and text.isprintable() else "YOUR PROMPT"]
    if isinstance(unwrap(trainer.model), PeftModel):
        words += ["--adapter", directory, "--tokenizer", directory]
        if trainer.args.spec_overrides():  # which the directory of an adapter does not hold
            words += ["--diffusion_spec", json.dumps(trainer.args.spec_overrides())]
    else:
        words += ["--model", directory]
    if not isinstance(prompt, str):
        words.append("--chat")
        template = getattr(trainer, "chat_template_kwargs", None)  # of rollouts
        if template:
            words += ["--chat_template_kwargs", json.dumps(template)]
    if settings is None:
        settings = cast("DTRPOTrainer", trainer).args.decoding(temperature=0.0)
    defaults = DecodingConfig()
    for one in fields(DecodingConfig):
        value = getattr(settings, one.name)
        if value is True:
            words.append(f"--{one.name}")
        elif value != getattr(defaults, one.name) or one.name == "max_new_tokens":
            words += [f"--{one.name}", str(value)]
    return shlex.join(words)


def start(
    lines: RunLines,
    parse: Callable[[list[str] | None], tuple[Any, ...]],
    run: Callable[..., object],
    arguments: list[str] | None,
) -> None:
    """
    Runs a command that trains. A wrong option ends it in a line, and so does Ctrl-C.

    Args:
        lines ([`RunLines`]): what is said about the run.
        parse (`Callable`): makes the options of the arguments.
        run (`Callable`): runs the command with the options and `lines`.
        arguments (`list[str]`, *optional*): the arguments. Defaults to those of the command line.
    """
    hush_commands()
    with ending_in_a_line(lines.kept):
        with errors_in_a_line():
            given = parse(arguments)
        run(*given, lines)
