"""
Prints a script that completes commands, options and paths in a shell.

    trl-diffusion completion bash > ~/.local/share/bash-completion/completions/trl-diffusion
    trl-diffusion completion zsh > "${fpath[1]}/_trl-diffusion"
    trl-diffusion completion fish > ~/.config/fish/completions/trl-diffusion.fish

It is for bash, zsh, fish, tcsh or powershell, and made by shtab: pip install 'trl-diffusion[completion]'. Make it again for another
version of this package.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any, cast

from ..cli import COMMANDS, DIRECT, LAUNCHED
from .direct import run_directly
from .options import OptionParser
from .parser import PROG, Parser, kind_of, without_twins


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, with the options of the command line by default; see [`run_directly`]."""
    return run_directly(_parser(), arguments, lambda options: print(script(options.shell)))


def script(shell: str) -> str:
    """
    The script of a shell.

    Raises:
        ImportError: if shtab is missing.
        ValueError: if it has no such script.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            "The script is made by shtab, which is missing: pip install 'trl-diffusion[completion]'."
        ) from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"There is no script for {shell!r}; there are those for {', '.join(shtab.SUPPORTED_SHELLS)}.")
    parser = all_commands()
    subparsers = cast(Any, parser._subparsers)._group_actions[0]
    for command in subparsers.choices.values():
        for action in command._actions:
            if kind_of(action).endswith("PATH"):
                action.complete = shtab.FILE
    return shtab.complete(parser, shell=shell)


def all_commands() -> argparse.ArgumentParser:
    """One parser with all commands and the names of their options, to look at, not to parse with."""
    parser = argparse.ArgumentParser(PROG)
    parser.add_argument("--version", action="version", version="")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, purpose in {**LAUNCHED, **DIRECT}.items():
        command = commands.add_parser(name, help=purpose)
        own: Parser = import_module(f"{COMMANDS}.{name}")._parser()
        starting = own.starting if isinstance(own, OptionParser) else []
        for action in [*starting, *own.options()]:
            _copy(action, command)
    return parser


def _copy(action: argparse.Action, parser: argparse.ArgumentParser) -> None:
    """Adds an option, or a positional argument, to another parser."""
    if action.help == argparse.SUPPRESS:
        return
    names = without_twins(action.option_strings)
    options: dict[str, Any] = {"help": action.help, "dest": action.dest, "default": argparse.SUPPRESS}
    if action.nargs == 0:
        parser.add_argument(*names, action="store_true", **options)
    elif names:
        parser.add_argument(*names, nargs=action.nargs, metavar=kind_of(action), choices=action.choices, **options)
    else:
        parser.add_argument(action.dest, nargs=action.nargs, help=action.help, choices=action.choices)


def _parser() -> Parser:
    parser = Parser(f"{PROG} completion", description=__doc__)
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh, fish, tcsh or powershell")
    return parser


if __name__ == "__main__":
    sys.exit(main())
