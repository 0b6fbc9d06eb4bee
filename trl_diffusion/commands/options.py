"""The parser of the commands whose options are the fields of dataclasses, as in TRL's scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from typing import Any

from trl import TrlParser

from ..utils import check_config_file
from .parser import MACHINES, PROG, Groups, Parser, starting_parser


NO_TASK = "none"  # as `--task`: rows and rewards, or documents, of the user's own
OWN_DATA = frozenset(("dataset_name", "reward_funcs"))
DOCUMENTS = frozenset(("train_file",))  # of `sft` and `adapt`


def without_task(words: list[str], own: Collection[str] = OWN_DATA) -> list[str]:
    """A command line that names data of the user's own, with one of the options `own`, takes the place of the task of a YAML file:
    it says `--task none`."""
    names = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return [*words, "--task", NO_TASK] if names & {*own} and "task" not in names else words


class OptionParser(Parser, TrlParser):
    """
    TRL's parser, with the manners of [`~commands.parser.Parser`].

    Args:
        name (`str`): name of the command.
        kinds (`Collection[type]`): the dataclasses whose fields are the options.
        description (`str`, *optional*): what the command does.
        groups (`Mapping[str, Mapping[str, str | None]]`): what `--help` lists, see [`~commands.parser.Parser`].
        others (`str`): heading of the options that only `--help-all` lists.
        hidden (`Collection[str]`, *optional*): options that no help lists, since the command refuses them.
    """

    def __init__(
        self,
        name: str,
        kinds: Collection[type],
        description: str | None,
        groups: Groups,
        others: str,
        hidden: Collection[str] = (),
    ):
        self.kinds, self.starting = kinds, starting_parser(name).options()
        super().__init__(
            prog=f"{PROG} {name}",
            dataclass_types=kinds,
            description=description,
            groups=groups,
            others=others,
            elsewhere=[action.dest for action in self.starting],
        )
        for action in self._actions:
            if action.dest in hidden:
                action.help = argparse.SUPPRESS
            if action.dest == "report_to":  # transformers takes several, its parser only one
                action.nargs = "+"

    def _sections(self, full: bool) -> list[tuple[str | None, list[argparse.Action]]]:
        listed = [action for action in self.starting if full or action.dest not in MACHINES]
        return [("start", listed), *super()._sections(full)]

    def names_left_out(self) -> set[str]:
        return {*super().names_left_out(), *MACHINES}

    def read(self, arguments: list[str] | None = None) -> tuple[Any, ...]:
        """
        The options as instances of the dataclasses. They may be in a YAML file that `--config` names.

        Args:
            arguments (`list[str]`, *optional*): the arguments. Defaults to those of the command line.

        Raises:
            ValueError: if the file is not as it should be, or an option has a value that it cannot have.
            SystemExit: with code 2, after a line on stderr, if an argument is unknown or of another type.
        """
        words = list(sys.argv[1:] if arguments is None else arguments)
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        words = without_task(words) if {"reward_funcs", "task"} <= {*self.option_names()} else words
        return self.parse_args_and_config(args=check_config_file(words, self.kinds))
