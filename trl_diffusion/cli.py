"""
The command `trl-diffusion`, which starts those of `trl_diffusion.commands`. Its own help, its version and a mistyped option
of its own come at once: nothing is imported for them.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module
from typing import NoReturn

from . import __version__
from .commands.dry import REHEARSED, is_dry
from .commands.interrupt import TYPED, ending_in_a_line
from .commands.parser import MACHINES, PROG, Parser, check_machines, starting_parser
from .fields import nearest


COMMANDS = f"{__package__}.commands"
# Commands that `accelerate launch` starts, on one process or several.
LAUNCHED = {
    "train": "teach a policy a task, from fresh or stored answers or from preferences (without options: the embedded "
    "policy, 4x4 sudoku, four minutes on 2 cores)",
    "sft": "fine-tune a policy on documents, on the right answers of a task, or on the best responses of a collection",
    "adapt": "make a diffusion policy of an autoregressive checkpoint, and train it to fill in masked tokens",
    "collect": "let a policy answer, score the answers, and store how they were denoised, to train on them as often as "
    "you like",
    "evaluate": "measure a policy, or an adapter, on benchmarks",
}
# Commands that run in this process.
DIRECT = {
    "iterate": "collect and train in rounds, each with the policy of the one before",
    "compare": "compare autoregressive and diffusion policies on equal terms, in a queue of runs that can be interrupted",
    "generate": "answer a prompt, and watch it being denoised",
    "serve": "answer over HTTP, as the OpenAI API does, and say how each answer was denoised",
    "doctor": "look at this machine, and try a run on random weights of the real shapes, with a few layers",
    "plan": "say what fits on which GPU, and how long it takes, from the config of a model alone",
    "view": "draw a stored answer being denoised, or how a run went",
    "completion": "print a script that completes commands and options in a shell",
}
EXAMPLES = f"""
from the embedded policy, which is bad at 4x4 sudoku before it is trained, to a model of your own:
  {PROG} generate "sudoku 3102200002100320" --max_new_tokens 17 --tokens_per_step 2
  {PROG} train
  {PROG} generate "sudoku 3102200002100320" --max_new_tokens 17 --tokens_per_step 2 --model outputs/tiny_sudoku
  {PROG} sft
  {PROG} collect --task sudoku --train_size 320
  {PROG} view outputs/trajectories 0 --output answer.html
  {PROG} train --config tiny_offline
  {PROG} iterate --rounds 2
  {PROG} compare --quick
  {PROG} adapt Qwen/Qwen3-0.6B --train_file data/chats.jsonl --output_dir outputs/qwen3_policy
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
        SystemExit: with code 2, after a line on stderr that says what is wrong with the arguments, or with code 130 after
            Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    name, rest = words[0], words[1:]
    with ending_in_a_line():
        if name in DIRECT:
            return import_module(f"{COMMANDS}.{name}").main(rest)
        if name not in LAUNCHED:
            _without_a_command(words)
        starting = starting_parser(name)
        options, rest = starting.parse_own_args(rest)
        if options.config:
            rest = ["--config", options.config, *rest]
        if {"-h", "--help", "--help-all", "--help_all"} & set(rest):
            import_module(f"{COMMANDS}.{name}").main(rest)
        if name in REHEARSED and is_dry(rest):  # in this process, whatever would be started
            rehearse = import_module(f"{COMMANDS}.dry_run").main
            return rehearse(name, rest, options.accelerate_config, options.num_processes)
        check_machines(starting, options)
        machines = {one: getattr(options, one) for one in MACHINES}
        command = launch_command(name, rest, options.accelerate_config, options.num_processes, **machines)
        sys.stdout.flush()
        os.execve(command[0], command, {**os.environ, TYPED: shlex.join([PROG, *words])})


def launch_command(
    name: str,
    arguments: list[str],
    accelerate_config: str | None = None,
    num_processes: int | None = None,
    **machines: int | str | None,
) -> list[str]:
    """The words of an `accelerate launch` that starts a command. `machines`: the options of `MACHINES`."""
    words = [sys.executable, "-m", f"{COMMANDS}.launch"]
    if accelerate_config is not None:
        words += ["--config_file", accelerate_config]
    for option, value in {"num_processes": num_processes, **machines}.items():
        if value is not None:
            words += [f"--{option}", str(value)]
    return [*words, "--module", f"{COMMANDS}.{name}", *arguments]


def _without_a_command(words: list[str]) -> NoReturn:
    """Prints the help or the version, or says which command may be meant."""
    parser = Parser(
        PROG,
        description="Reinforcement learning and fine-tuning for diffusion language models, on TRL.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}", help="prints the version")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, purpose in {**LAUNCHED, **DIRECT}.items():
        commands.add_parser(name, help=purpose)
    if words[0].startswith("-"):
        parser.parse_args(words)
    near = nearest(words[0], commands.choices)
    hint = f" Is it meant to be {' or '.join(near)}?" if near else ""
    parser.error(f"there is no command {words[0]!r}; there are {', '.join(commands.choices)}.{hint}")
