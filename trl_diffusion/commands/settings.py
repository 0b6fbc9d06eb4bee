"""Where the options of `train` and `sft` come from: a recipe, the run that trained the policy, or the defaults."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..policies.files import policy_in
from ..sft.config import DiffusionSFTConfig
from ..trainer.config import DTRPOConfig
from ..utils import load_yaml, write_text
from . import recipes_path
from .options import DOCUMENTS, OWN_DATA, OptionParser, without_task


@dataclass(frozen=True)
class Command:
    """
    A command whose options may come from a recipe.

    Attributes:
        name (`str`): its name.
        recipe (`str`): the recipe of the embedded policy.
        config (`type`): the trainer's settings.
        told (`tuple[str, ...]`): which of their defaults are told.
        own_data (`Collection[str]`): which options name data of the user's own, in place of a recipe's task.
    """

    name: str
    recipe: str
    config: type
    told: tuple[str, ...]
    own_data: Collection[str] = OWN_DATA

    @property
    def file(self) -> str:
        """Beside a trained policy: the options that it was trained with, as `--config` takes them."""
        return f"{self.name}.yaml"


TRAINING = Command(
    "train", "tiny_sudoku", DTRPOConfig, ("learning_rate", "max_completion_length", "num_generations", "beta")
)
TUNING = Command(
    "sft",
    "tiny_sft",
    DiffusionSFTConfig,
    ("learning_rate", "num_train_epochs", "weighting", "max_length"),
    DOCUMENTS,
)
FILE = TRAINING.file
# Options of one run only: where it begins, where it writes, and what it continues.
_OF_ONE_RUN = (
    "config", "model_name_or_path", "output_dir", "random_policy", "resume_from_checkpoint", "dry_run", "gpu_memory",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """
    The options of a run.

    Attributes:
        arguments (`list[str]`): the words of the command line, with the `--config` that applies.
        line (`str`): what is taken from where, for the terminal.
        options (`dict[str, Any]`): the options that were given, in the file and on the command line.
        command ([`Command`]): the command.
    """

    arguments: list[str]
    line: str
    options: dict[str, Any]
    command: Command = TRAINING

    def keep(self, directory: str | Path) -> None:
        """Writes the options beside the policy that the run has trained."""
        keep_settings(self.options, directory, self.command)


def given_options(arguments: list[str]) -> dict[str, Any]:
    """The options on a command line, with their values as text: `True` for none, a list for several."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            name, has_value, value = word.removeprefix("--").partition("=")
            values = [value] if has_value else []
            found[name.replace("-", "_")] = values
        else:
            values.append(word)
    return {name: words if len(words) > 1 else (words[0] if words else True) for name, words in found.items()}


def find_settings(arguments: list[str], command: Command = TRAINING) -> Settings:
    """
    Finds the recipe that a command line leaves open. Without a model it is that of the embedded policy. A model that
    the command has trained goes on with the options that it was trained with, and is saved beside it. The command line wins.

    Args:
        arguments (`list[str]`): the words of the command line.
        command ([`Command`], *optional*): the command. Defaults to `train`.
    """
    given = given_options(arguments)
    model, config, before = given.get("model_name_or_path"), given.get("config"), []
    if config is True:  # without a name, which is for the parser to say
        return Settings(arguments, "", {}, command)
    kept = Path(str(model), command.file)
    if config is not None:
        source = str(config)
    elif model is not None and kept.is_file():
        config, source = str(kept), f"as {model} was trained ({kept})"
        before = ["--output_dir", f"{str(model).rstrip('/')}_continued"]
    elif model is None and "random_policy" not in given:
        config = str(recipes_path() / f"{command.recipe}.yaml")
        source = f"{config}, the recipe of the embedded policy"
    else:
        source = f"the defaults of {command.config.__name__} ({_defaults(given, command)}), as there is no --config"
    if config is not None and "config" not in given:
        before = ["--config", str(config), *before]
    own = [f"--{name}" for name in given if name != "config"]
    line = f"Settings: {source}" + (f"; {', '.join(own)} from the command line." if own else ".")
    words = without_task(arguments, command.own_data)
    return Settings([*before, *words], line, options_in(config) | given_options(words), command)


def read_options(parser: OptionParser, command: Command, arguments: list[str] | None) -> tuple[Any, ...]:
    """
    Reads the options of a command, those of the command line by default, after [`find_settings`] has found the recipe that applies.
    The first of the dataclasses that it returns gets the [`Settings`].
    """
    words = sys.argv[1:] if arguments is None else arguments
    check_one_beginning(given_options(words))
    settings = find_settings(words, command)
    found = parser.read(settings.arguments)
    model_args = found[-1]
    if not check_adapter_options(model_args.model_name_or_path or "", given_options(settings.arguments)):
        check_used(given_options(words), model_args)
    found[0].settings = settings
    return found


def check_one_beginning(given: Collection[str]) -> None:
    """Raises a `ValueError` if a command line names a model and asks for random weights. (A model wins over what a recipe says.)"""
    if {"model_name_or_path", "random_policy"} <= {*given}:
        raise ValueError(
            "`--model_name_or_path` and `--random_policy` both say what training begins with. Give one of them."
        )


def check_used(given: Collection[str], model_args: Any) -> None:
    """Raises a `ValueError` if a command line has an option of an adapter or of weights in 4 bits, and there is none of them."""
    for part, switch, what in (("lora_", "use_peft", "an adapter"), ("bnb_", "load_in_4bit", "weights in 4 bits")):
        unused = sorted(name for name in given if part in name)
        if unused and not getattr(model_args, switch):
            raise ValueError(f"`--{unused[0]}` is for {what}: add `--{switch}`, or leave it out.")


def options_in(config: Any) -> dict[str, Any]:
    """The options in a YAML file. What is wrong with the file is for the parser to say."""
    try:
        found = load_yaml(config) if config is not None else None
    except (OSError, ValueError):
        found = None
    return dict(found) if isinstance(found, dict) else {}


def _defaults(given: Collection[str], command: Command) -> str:
    values = {field.name: field.default for field in fields(command.config)}
    return ", ".join(f"{name} {values[name]}" for name in command.told if name not in given)


def keep_settings(options: dict[str, Any], directory: str | Path, command: Command = TRAINING) -> None:
    """Writes the options of a run beside the policy that it has trained, for `--model_name_or_path DIRECTORY`."""
    kept = {name: _kept(value) for name, value in sorted(options.items()) if name not in (*_OF_ONE_RUN, "env")}
    head = (
        "# The options that this policy was trained with. "
        f"`trl-diffusion {command.name} --model_name_or_path` reads them.\n"
    )
    write_text(Path(directory, command.file), head + yaml.safe_dump(kept, sort_keys=False))


def _kept(value: Any) -> Any:
    """A value for a YAML file: the numbers of a list that was typed are numbers there. argparse reads other values once more."""
    return [_number(one) for one in value] if isinstance(value, list) else value


def _number(word: Any) -> Any:
    for kind in (int, float):
        try:
            return kind(word) if isinstance(word, str) else word
        except ValueError:
            continue
    return word


def check_adapter_options(path: str, given: Collection[str]) -> bool:
    """
    Whether training continues an adapter.

    Raises:
        ValueError: if the options ask for a new adapter as well.
    """
    if "an adapter" not in policy_in(path):
        return False
    new = sorted(f"--{name}" for name in given if name == "use_peft" or name.startswith("lora_"))
    if new:
        raise ValueError(
            f"{path} is an adapter, which training continues; {', '.join(new)} would make another one. Leave out what is for a "
            "new adapter, or give the model below it as `--model_name_or_path`."
        )
    return True
