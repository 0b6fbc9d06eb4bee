"""
The command `trl-diffusion`, which starts those of `trl_diffusion.commands`. Its own help, its version and a mistyped option
of its own come at once: nothing is imported for them.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from . import __version__
from .commands import PACKAGE, recipes_path


PROG = "trl-diffusion"
COMMANDS = f"{__package__}.commands"
# Commands that `accelerate launch` starts, on one process or several.
LAUNCHED = {
    "train": "teach a policy a task, from fresh or stored answers or from preferences (without options: the embedded "
    "policy, 4x4 sudoku, four minutes on 2 cores)",
    "collect": "let a policy answer, score the answers, and store how they were denoised, to train on them as often as "
    "you like",
    "evaluate": "measure a policy, or an adapter, on benchmarks",
}
# Commands that run in this process.
DIRECT = {
    "iterate": "collect and train in rounds, each with the policy of the one before",
    "generate": "answer a prompt, and watch it being denoised",
    "plan": "say what fits on which GPU, and how long it takes, from the config of a model alone",
    "view": "draw a stored answer being denoised, or how a run went",
}
EXAMPLES = f"""
from the embedded policy, which is bad at 4x4 sudoku before it is trained, to a model of your own:
  {PROG} generate "sudoku 3102200002100320" --max_new_tokens 17 --tokens_per_step 2
  {PROG} train
  {PROG} generate "sudoku 3102200002100320" --max_new_tokens 17 --tokens_per_step 2 --model outputs/tiny_sudoku
  {PROG} collect --task sudoku --train_size 320
  {PROG} view outputs/trajectories 0 --output answer.html
  {PROG} train --config tiny_offline
  {PROG} iterate --rounds 2
  {PROG} plan GSAI-ML/LLaDA-8B-Instruct --gpus 8 --memory 80
  {PROG} train --accelerate_config zero3 --config llada_8gpu --train_file data/gsm8k/train.jsonl
  {PROG} evaluate --model_name_or_path outputs/llada_8gpu --tasks gsm8k math500

{PROG} COMMAND --help lists the options of a command.
"""


def main(arguments: list[str] | None = None) -> int:
    """
    Runs the command. One that `accelerate launch` starts takes the place of this process.

    Args:
        arguments (`list[str]`, *optional*): what follows the name of the command. Defaults to `sys.argv`.

    Returns:
        `int`: exit code.

    Raises:
        SystemExit: with code 2, after a line on stderr that says what is wrong with the arguments.
    """
    parser, commands = _parsers()
    options, rest = parser.parse_known_args((sys.argv[1:] if arguments is None else arguments) or ["--help"])
    name = options.command
    if vars(options).get("config"):
        rest = ["--config", options.config, *rest]
    if name in DIRECT:
        return import_module(f"{COMMANDS}.{name}").main(rest)
    if {"-h", "--help"} & set(rest):
        commands[name].print_help()
        print("\nOptions of the command itself:\n")
        return _help(name)
    command = launch_command(name, rest, options.accelerate_config, options.num_processes)
    sys.stdout.flush()
    os.execv(command[0], command)


def launch_command(
    name: str, arguments: list[str], accelerate_config: str | None = None, num_processes: int | None = None
) -> list[str]:
    """The words of an `accelerate launch` that starts a command."""
    words = [sys.executable, "-m", f"{COMMANDS}.launch", "--quiet"]  # the command has said what is wrong
    if accelerate_config is not None:
        words += ["--config_file", accelerate_config]
    if num_processes is not None:
        words += ["--num_processes", str(num_processes)]
    return [*words, "--module", f"{COMMANDS}.{name}", *arguments]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command, which leaves the options that are not for starting it."""
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    purpose = "Reinforcement learning for diffusion language models, on TRL."
    parser = argparse.ArgumentParser(PROG, description=purpose, epilog=EXAMPLES, **style)
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, purpose in {**LAUNCHED, **DIRECT}.items():
        about = _about(name) if name in LAUNCHED else None
        command = commands.add_parser(name, help=purpose, description=about, add_help=False, **style)
        if name in ("train", "plan", "iterate"):
            command.add_argument(
                "--config", type=file_or_name(recipes_path()), metavar="NAME_OR_PATH",
                help="options from a YAML file, or from a recipe that comes with the package, such as llada",
            )  # fmt: skip
        if name in LAUNCHED:
            command.add_argument(
                "--accelerate_config", type=file_or_name(recipes_path() / "accelerate"), metavar="NAME_OR_PATH",
                help="engine: ddp, zero2, zero3, zero3_offload or fsdp2, for 8 GPUs, or a config file of accelerate's",
            )  # fmt: skip
            command.add_argument("--num_processes", type=_count, metavar="N", help="instead of one for each GPU")
    return parser, commands.choices


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def file_or_name(folder: Path) -> Callable[[str], str]:
    """Type of an option for argparse: the path of an existing YAML file, or of `folder/NAME.yaml`."""

    def find(name: str) -> str:
        for path in (Path(name), recipes_path().parent / name, folder / f"{name}.yaml"):
            if path.is_file():
                return str(path)
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise argparse.ArgumentTypeError(f"there is no file {name}, and what comes with the package is {names}")

    return find


def _about(name: str) -> str:
    """The docstring of a command, which is read without importing it."""
    code = (PACKAGE / "commands" / f"{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(code)) or ""


def _help(name: str) -> int:
    """Prints the help of a command that is otherwise launched."""
    before, sys.argv = sys.argv, [f"{PROG} {name}", "--help"]
    try:
        import_module(f"{COMMANDS}.{name}").main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0
