"""
The parser of every command. Options are written in full: an unknown option is answered with the nearest known one. An error is
one line. `--help` is short, and `--help-all` lists and explains all options.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NoReturn

from ..errors import say_error
from ..fields import nearest
from . import recipes_path


PROG = "trl-diffusion"
Groups = Mapping[str, Mapping[str, str | None]]
HELP = {"help": {"help": "shows this list", "help_all": "lists and explains all options"}}
WIDTH, COLUMN = 120, 36  # most columns of the help, and where its texts begin
MACHINES = (
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
)  # options, as accelerate names them
MANY = 8  # choices that are still listed beside their option


class Parser(argparse.ArgumentParser):
    """
    An `argparse.ArgumentParser` for this package's commands.

    Args:
        groups (`Mapping[str, Mapping[str, str | None]]`, *optional*):
            What `--help` lists: headings, and under each the names of options. A text replaces the option's own. `None`
            stands for the first sentence of that. `--help-all` lists the other options as well. Without groups, both list all
            options.
        others (`str`, *optional*): heading of the options that are in no group.
        elsewhere (`Iterable[str]`, *optional*): names of options that another parser has read, for suggestions.
        add_help (`bool`, *optional*, defaults to `True`): whether there are `--help` and `--help-all`.
        kwargs (`dict`): arguments of `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        *args: Any,
        groups: Groups | None = None,
        others: str = "other options",
        elsewhere: Iterable[str] = (),
        add_help: bool = True,
        **kwargs: Any,
    ):
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs |= {"add_help": False, "allow_abbrev": False}
        super().__init__(*args, **kwargs)
        self.groups = {**groups, **HELP} if groups else {}
        self.others, self.elsewhere = others, tuple(elsewhere)
        if add_help:
            self.add_argument("-h", "--help", action=_Help, help=HELP["help"]["help"])
            self.add_argument("--help-all", "--help_all", action=_Help, dest="help_all", help=HELP["help"]["help_all"])

    # ---------------------------------------------------------------------------------------------------- arguments

    def parse_known_args(self, args=None, namespace=None):
        """Parses arguments. Unlike the method of argparse, it refuses the ones that it does not know."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(rest))
        return found, rest

    def parse_own_args(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parses its own options. Returns them, and the arguments for another parser."""
        return super().parse_known_args(args)

    def error(self, message: str) -> NoReturn:
        """Ends the program with code 2 and one line on stderr."""
        line = " ".join(message.split())
        say_error("".join(one if one.isprintable() else repr(one)[1:-1] for one in line))
        self.exit(2)

    def option_names(self) -> list[str]:
        """The names of all options, without hyphens before them."""
        return sorted({_plain(name) for action in self._actions for name in action.option_strings})

    def options(self) -> list[argparse.Action]:
        """All arguments but those that ask for help."""
        return [action for action in self._actions if not isinstance(action, _Help)]

    def _unknown(self, words: list[str]) -> str:
        options = [word.partition("=")[0] for word in words if word.startswith("-") and word.strip("-")]
        if not options:
            return f"{words[0]!r} is no argument of `{self.prog}`; `{self.prog} --help` lists its options."
        near = [f"--{name}" for name in nearest(_plain(options[0]), [*self.option_names(), *self.elsewhere])]
        hint = f" Is it meant to be {' or '.join(near)}?" if near else ""
        return f"there is no option {options[0]}; `{self.prog} --help-all` lists those that there are.{hint}"

    # ----------------------------------------------------------------------------------------------------- the help

    def format_usage(self) -> str:
        places = [action for action in self._actions if not action.option_strings]
        names = [f"[{one.metavar}]" if one.nargs == "?" else f"{one.metavar or one.dest}" for one in places]
        return f"usage: {' '.join([self.prog, *names])} [--OPTION VALUE ...]\n"

    def format_help(self, full: bool = False) -> str:
        """
        The help.

        Args:
            full (`bool`, *optional*, defaults to `False`): whether all options are listed, with their whole explanations.
        """
        formatter = self._get_formatter()
        formatter.add_text(self.format_usage())
        formatter.add_text(self.description)
        for heading, actions in self._sections(full):
            formatter.start_section(heading)
            formatter.add_arguments(actions)
            formatter.end_section()
        left_out = len(self.names_left_out())
        if left_out and not full:
            formatter.add_text(f"{self.prog} --help-all lists {left_out} more options, and explains all of them.")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _sections(self, full: bool) -> list[tuple[str | None, list[argparse.Action]]]:
        """Headings, each with the options below it."""
        if not self.groups:
            groups = [(group.title, group._group_actions) for group in self._action_groups if group._group_actions]
            return [(title, [one if full else _short(one, None) for one in actions]) for title, actions in groups]
        by_name: dict[str, list[argparse.Action]] = {}
        for action in self._actions:
            by_name.setdefault(action.dest, []).append(action)
        if full:
            found = [(title, [one for name in names for one in by_name[name]]) for title, names in self.groups.items()]
            return [*found, (self.others, self._left_out())]
        return [
            (title, [_short(by_name[name][0], text) for name, text in names.items()])
            for title, names in self.groups.items()
        ]

    def names_left_out(self) -> set[str]:
        """The names of the options that only `--help-all` lists."""
        return {action.dest for action in self._left_out()}

    def _left_out(self) -> list[argparse.Action]:
        """The options that only `--help-all` lists."""
        named = {name for names in self.groups.values() for name in names}
        return [
            one for one in self._actions if self.groups and one.dest not in named and one.help != argparse.SUPPRESS
        ]


class _Help(argparse.Action):
    """Prints the help, short or in full, and ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(full=self.dest == "help_all"), end="")
        parser.exit()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """An option, what its value is, its explanation and its default, in one line if they fit."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns - 2, WIDTH)
        super().__init__(prog, max_help_position=min(COLUMN, width // 2), width=width)
        self._action_max_length = 14  # argparse forgets that the names of commands are indented

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        shown = copy(action)
        shown.metavar = kind_of(action)
        value = "" if action.nargs == 0 else f" {self._format_args(shown, shown.metavar)}"
        return ", ".join(without_twins(action.option_strings)) + value

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default in (None, False, argparse.SUPPRESS, "", [], ())
        if silent or not action.option_strings or "default" in text.lower():
            return text
        return f"{text} (default: %(default)s)"


def _plain(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def without_twins(options: Sequence[str]) -> list[str]:
    """Names of an option, without second ones that differ in hyphens, such as those that transformers gives."""
    return list({_plain(name): name for name in reversed(options)}.values())[::-1]


def _short(action: argparse.Action, text: str | None) -> argparse.Action:
    """A copy of an option with a short explanation: the first sentence, and the default if the explanation names it."""
    if not action.help or action.help == argparse.SUPPRESS:
        return action
    short = copy(action)
    if text is None:
        text = re.split(r"(?<=[.?!])\s+(?=[A-Z`'\"(])", action.help, maxsplit=1)[0].removesuffix(".")
        default = re.search(r" \(default: (?!None|False|\(\)).*\)$", action.help)
        text = re.sub(r" \(default: .*\)$", "", text) + (default[0] if default else "")
        text = re.sub(r"^[A-Z][a-z]*\b", lambda word: word[0].lower(), text)
    short.help = text
    return short


def kind_of(action: argparse.Action) -> str:
    """What the value of an option is."""
    if action.metavar:
        return str(action.metavar)
    if action.choices:
        return f"{{{','.join(map(str, action.choices))}}}" if len(list(action.choices)) <= MANY else "NAME"
    kind = getattr(action.type, "__name__", "str")
    if kind == "str" and re.search(r"(_dir|_file|_path|^trajectories|^config)$", action.dest):
        return "PATH"
    return {"int": "N", "float": "X", "string_to_bool": "true|false"}.get(kind, "TEXT")


# ------------------------------------------------------------------------------------------------------------- starting


def starting_parser(name: str) -> Parser:
    """The parser of the options with which `accelerate launch` starts a command."""
    parser = Parser(f"{PROG} {name}", add_help=False)
    if name in ("train", "sft", "adapt"):
        add_config_option(parser)
    else:
        parser.add_argument("--config", metavar="PATH", help="options from a YAML file")
    add_engine_options(parser)
    add_machine_options(parser)
    return parser


def add_config_option(parser: Parser, default: str | None = None) -> None:
    """Adds the option that names a YAML file or a recipe."""
    parser.add_argument(
        "--config",
        type=file_or_name(recipes_path()),
        default=None if default is None else str(recipes_path() / f"{default}.yaml"),
        metavar="NAME_OR_PATH",
        help="options from a YAML file, or from a recipe that comes with the package, such as llada"
        + (f" (default: {default})" if default else ""),
    )


def add_engine_options(parser: Parser) -> None:
    """Adds the options that say on what a command runs."""
    parser.add_argument(
        "--accelerate_config",
        type=engine,
        metavar="NAME_OR_PATH",
        help="engine: ddp, zero2, zero3, zero3_offload or fsdp2, for 8 GPUs; zero3_2x8 or fsdp2_2x8, for 2 machines with 8 each; or "
        "a config file of accelerate's",
    )
    parser.add_argument(
        "--num_processes", type=_count, metavar="N", help="number of processes, instead of one for each GPU"
    )


def add_machine_options(parser: Parser) -> None:
    """Adds the options that say on which of several machines a command is given."""
    parser.add_argument(
        "--num_machines", type=_count, metavar="N", help="number of machines, each of which gets this command"
    )
    parser.add_argument("--machine_rank", type=_rank, metavar="N", help="number of this machine, from 0")
    parser.add_argument("--main_process_ip", metavar="HOST", help="name or address of machine 0")
    parser.add_argument(
        "--main_process_port", type=_count, metavar="N", help="a free port of machine 0, such as 29500"
    )


def check_machines(parser: Parser, options: argparse.Namespace) -> None:
    """
    Ends the program with a line on stderr if options and config do not say how many machines there are, which one this is, or where
    the first one is. accelerate would wait for the others, or end in an assertion.
    """
    if options.accelerate_config is None:
        if any(getattr(options, name) is not None for name in MACHINES):
            parser.error("several machines need an engine: add --accelerate_config, such as zero3_2x8.")
        return
    config = _load_engine(options.accelerate_config)
    machines = options.num_machines or config.num_machines
    given = [name for name in MACHINES[1:] if getattr(options, name) is not None]
    if machines == 1:
        if given:
            parser.error(
                f"--{given[0]} is for several machines, and this is for one. Add --num_machines, or leave it out."
            )
        return
    own = config.main_process_ip is not None  # a config for each machine, which names its rank, too
    missing = [name for name in MACHINES[1:3] if name not in given]
    if missing and not own:
        parser.error(
            f"{machines} machines train together: give the same command on each of them, with --machine_rank (0 to {machines - 1}) "
            f"and --main_process_ip (of machine 0); --{missing[0]} is missing."
        )
    if options.machine_rank is not None and options.machine_rank >= machines:
        parser.error(f"--machine_rank must be below the number of machines, {machines}, got {options.machine_rank}.")
    processes = options.num_processes or config.num_processes
    if processes % machines:
        parser.error(f"--num_processes must be a multiple of the number of machines, {machines}, got {processes}.")


def check_one_machine(parser: Parser, accelerate_config: str | None) -> None:
    """Ends the program with a line on stderr if a config is for several machines."""
    if accelerate_config is not None and (machines := _load_engine(accelerate_config).num_machines) > 1:
        parser.error(
            f"{accelerate_config} is for {machines} machines, and `{parser.prog}` runs on one. Choose another engine."
        )


def _count(text: str) -> int:
    return _whole(text, 1)


def _rank(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def engine(name: str) -> str:
    """Type of an option for argparse: as [`file_or_name`], for a file that accelerate can start from."""
    path = file_or_name(recipes_path() / "accelerate")(name)
    try:
        _load_engine(path)
    except Exception as error:  # of YAML, of names that it does not know, or because it is no mapping
        reason = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"{path} is no config of accelerate's ({reason})") from error
    return path


def _load_engine(path: str) -> Any:
    from accelerate.commands.config.config_args import load_config_from_file  # imports torch

    return load_config_from_file(path)


def file_or_name(folder: Path) -> Callable[[str], str]:
    """Type of an option for argparse: the path of an existing YAML file, or of `folder/NAME.yaml`."""

    def find(name: str) -> str:
        for path in (Path(name), recipes_path().parent / name, folder / f"{name}.yaml"):
            if path.is_file():
                return str(path)
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise argparse.ArgumentTypeError(f"there is no file {name}, and what comes with the package is {names}")

    return find


def read_api_key(variable: str | None) -> str | None:
    """
    The API key in a variable of the environment.

    Raises:
        ValueError: if it is not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(
            f"`--api_key_env`: the variable {variable} of the environment is not set. Set it, or leave the option out."
        )
    return os.environ[variable]
