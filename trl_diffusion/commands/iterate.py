"""
Trains in rounds: the policy answers prompts, the answers are scored and stored, it is trained on them, and so on with the
policy that it has become.

    trl-diffusion iterate                                # embedded policy, 4x4 sudoku, four rounds
    trl-diffusion iterate --config my_rounds.yaml --rounds 3
    trl-diffusion iterate --config my_rounds.yaml --accelerate_config zero3

The YAML file has the options of `collect` and of `train` in two sections, and those of `iterate` beside them. Rounds are
between offline and online: the old policy's log-probabilities are the ones that were recorded while it decoded. Best-of-n
rejection sampling is `train: {loss_type: dpo, dpo_loss_type: [sft]}`: the best answer of each group is imitated.

An interrupted run goes on where it stopped when the same command is given again. `round_N/trajectories` and
`round_N/policy` are what `collect` and `train` write; `results.json` has the figures of all rounds.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from ..cli import launch_command
from ..fields import AtLeast, check_fields, check_names
from ..policies.tiny import tiny_policy_path
from ..seeds import derive_seed
from ..utils import (
    check_options,
    check_writable,
    exit_code,
    load_yaml,
    read_mapping,
    read_record,
    versions,
    write_text,
)
from .data import DATA, DEFAULT
from .dry import DryRun
from .interrupt import INTERRUPTED, TYPED, ending_in_a_line, left_to_the_child
from .parser import PROG, Parser, add_config_option, add_engine_options, check_one_machine


# Options of the two commands that each round sets itself.
_OF_A_ROUND = {
    "collect": ("model_name_or_path", "output_dir", "seed"),
    "train": ("output_dir", "seed", "trajectories", "resume_from_checkpoint", "train_file"),
}
_ADAPTERS = ("use_peft", "adapter_name_or_path")
RESULTS = "results.json"
_MEASURED = ("solve_rate", "mean_reward")


@dataclass
class Rounds:
    """
    What to do in rounds.

    Args:
        output_dir (`str`): directory of the run.
        rounds (`int`, *optional*, defaults to `4`): times that the policy answers and is trained.
        mix_rounds (`int`, *optional*, defaults to `1`): collections that a round trains on, its own and those before it.
        seed (`int`, *optional*, defaults to `0`): source of randomness. Every round has other prompts and draws.
        collect, train (`dict[str, Any]`): options of the two commands.

    Raises:
        ValueError: for a value out of range, or an option that each round sets itself.
    """

    output_dir: str
    rounds: Annotated[int, AtLeast(1)] = 4
    mix_rounds: Annotated[int, AtLeast(1)] = 1
    seed: Annotated[int, AtLeast(0)] = 0
    collect: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_fields(self)
        for section, names in _OF_A_ROUND.items():
            options = getattr(self, section)
            if not isinstance(options, dict):
                raise ValueError(f"`{section}` must hold options of `{section}`, got {options!r}.")
            own = sorted(set(names) & set(options))
            if own:
                raise ValueError(f"`{section}` has {own}, which each round sets itself. Leave them out.")
            adapters = sorted(name for name in _ADAPTERS if options.get(name))
            if adapters:
                raise ValueError(
                    f"`{section}` has {adapters}: the next round opens what this one has saved, which must be a whole "
                    "model. Train without an adapter, or merge it and give the rounds one by one."
                )
        self._check_data()
        templates = [section.get("chat_template_kwargs") for section in (self.collect, self.train)]
        if read_mapping(templates[0], "chat_template_kwargs") != read_mapping(templates[1], "chat_template_kwargs"):
            raise ValueError(
                f"`collect` has `chat_template_kwargs` {templates[0]!r} and `train` {templates[1]!r}. Give both the same ones."
            )

    def _check_data(self) -> None:
        """Raises a `ValueError` if the two commands have other data; what one of them says is meant for both."""
        for name in ("server", "responses"):
            if self.collect.get(name):
                raise ValueError(
                    f"`collect` has `{name}`: a round trains on responses of its own policy. Leave it out."
                )
        own = [name for name in ("dataset_name", "reward_funcs") if self.collect.get(name)]
        default = None if own else DEFAULT
        if self.train.get("task", default) != self.collect.get("task", default):
            raise ValueError(
                f"`collect` answers {self.collect.get('task', default)!r} and `train` measures "
                f"{self.train.get('task', default)!r}. Give both the same `task`."
            )
        for name in DATA[1:]:
            if name in self.train and name not in self.collect and name not in ("eval_file", "eval_size"):
                raise ValueError(f"`train` has `{name}`, but `collect` has none. Move it there: it is meant for both.")
            if self.train.get(name, self.collect.get(name)) != self.collect.get(name, self.train.get(name)):
                raise ValueError(
                    f"`collect` has `{name}` {self.collect[name]!r} and `train` {self.train[name]!r}. Give both the same one."
                )

    def data(self) -> dict[str, Any]:
        """What both commands are told about tasks, rows and rewards."""
        return {name: one[name] for one in (self.train, self.collect) for name in DATA if name in one}

    def directory(self, number: int) -> Path:
        """Directory of a round; they are numbered from 1."""
        return Path(self.output_dir) / f"round_{number}"

    def policy(self, number: int) -> str:
        """What a round begins with: the policy of the one before. Always named, or `train` would take a recipe of its own."""
        if number > 1:
            return str(self.directory(number - 1) / "policy")
        return self.train.get("model_name_or_path") or tiny_policy_path()

    def collect_options(self, number: int) -> dict[str, Any]:
        """Options of `collect` in a round."""
        return {
            **self.data(),
            **self.collect,
            "model_name_or_path": self.policy(number),
            "output_dir": str(self.directory(number) / "trajectories"),
            "seed": derive_seed(self.seed, number) % 2**31,
        }

    def train_options(self, number: int) -> dict[str, Any]:
        """Options of `train` in a round."""
        first = max(number - self.mix_rounds + 1, 1)
        return {
            **self.data(),
            **self.train,
            "model_name_or_path": self.policy(number),
            "trajectories": [str(self.directory(one) / "trajectories") for one in range(first, number + 1)],
            "output_dir": str(self.directory(number) / "policy"),
            "seed": self.seed,
            "resume_from_checkpoint": (self.directory(number) / "policy").is_dir() or None,  # it was interrupted
        }


def run(rounds: Rounds, start: Callable[[str, list[str]], None], typed: str = "") -> list[dict[str, Any]]:
    """
    Does the rounds that are not done yet.

    Args:
        rounds ([`Rounds`]): what to do.
        start (callable): runs a command, given its name and its arguments, to its end.
        typed (`str`, *optional*): the command as it was typed, for the results.

    Returns:
        `list[dict[str, Any]]`: for each round, what `train` has left in its `results.json`.

    Raises:
        ValueError: if `output_dir` holds a run with other options; the message names them.
    """
    directory = Path(rounds.output_dir)
    check_writable(directory, "output_dir")
    _keep_plan(rounds, directory / "iterate.json")
    found = []
    for number in range(1, rounds.rounds + 1):
        path = rounds.directory(number) / "policy" / RESULTS
        if not path.is_file():  # `train` writes it last
            start("collect", arguments_of(rounds.collect_options(number)))
            start("train", arguments_of(rounds.train_options(number)))
        found.append({"round": number, **_results_of(path)})
        results = {"rounds": found, "command": typed, "versions": versions()}
        write_text(directory / RESULTS, json.dumps(results, indent=2) + "\n")
    return found


def _results_of(path: Path) -> dict[str, Any]:
    """The figures of a round: the solve rates, or the mean rewards of rows without a checker."""
    advice = "Delete it to have the round trained again."
    found = read_record(path, (), advice)
    name = next((one for one in _MEASURED if f"{one}_before" in found), _MEASURED[0])
    return read_record(path, (f"{name}_before", f"{name}_after"), advice)


def _keep_plan(rounds: Rounds, path: Path) -> None:
    """Writes down the options of a run, or checks that they are those of the run that goes on. It may get more rounds."""
    plan = {name: value for name, value in asdict(rounds).items() if name not in ("rounds", "output_dir")}
    if path.is_file():
        before = read_record(path, advice="Give the run another `output_dir`.")
        changed = sorted(name for name in plan if before.get(name) != plan[name])
        if changed:
            said = "; ".join(f"`{name}` was {before.get(name)!r} and is {plan[name]!r}" for name in changed)
            raise ValueError(f"{path.parent} holds a run with other options: {said}. Give it another `output_dir`.")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(plan, indent=2) + "\n")


def arguments_of(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(one) if isinstance(one, dict | bool) else str(one) for one in values)]
    return words


def table(results: list[dict[str, Any]]) -> str:
    """The solve rates of the rounds, or the mean rewards, for the terminal."""
    lines = ["round    before     after"]
    for row in results:
        name, form = ("solve_rate", "9.1%") if "solve_rate_before" in row else ("mean_reward", "9.4g")
        lines.append(f"{row['round']:5d} {row[f'{name}_before']:{form}} {row[f'{name}_after']:{form}}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """
    Runs the command.

    Args:
        arguments (`list[str]`, *optional*): what follows the name of the command. Defaults to `sys.argv`.

    Returns:
        `int`: exit code, 0, 2 after one line on stderr that says what is wrong, or that of the command that failed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(_parser().parse_args(words))
    engine = options.pop("accelerate_config"), options.pop("num_processes")
    check_one_machine(_parser(), engine[0])
    if options.pop("dry_run"):
        from . import dry_run  # here, since it knows this command

        return dry_run.main("iterate", words, *engine)
    if options.pop("gpu_memory") is not None:
        _parser().error("`--gpu_memory` is for `--dry_run`. Leave it out.")
    typed = shlex.join([PROG, "iterate", *words])

    def start(name: str, arguments: list[str]) -> None:
        command = launch_command(name, arguments, *engine)
        with left_to_the_child():
            subprocess.run(command, check=True, env={**os.environ, TYPED: typed})

    def work() -> None:
        rounds = rounds_of(options)
        print(f"Settings: {options['config']}. Output: {rounds.output_dir}, with {rounds.rounds} rounds.", flush=True)
        results = run(rounds, start, typed)
        print(table(results))
        print(
            f"{rounds.output_dir} has all rounds and {RESULTS}; the last policy is {rounds.directory(rounds.rounds)}/policy."
        )
        print("Next:", *results[-1].get("next_commands", []), _more_rounds(words, rounds.rounds + 2), sep="\n  ")

    try:
        with ending_in_a_line(lambda: f"The rounds that are whole are kept. To go on: {typed}"):
            return exit_code(work)
    except subprocess.CalledProcessError as error:
        # The command has said what is wrong, or what is kept.
        return INTERRUPTED if error.returncode == -signal.SIGINT else error.returncode


def _more_rounds(words: list[str], number: int) -> str:
    """The command that adds rounds, with as many as that in all."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--rounds":
            next(rest, None)
        elif not word.startswith("--rounds="):
            kept.append(word)
    return shlex.join([PROG, "iterate", *kept, "--rounds", str(number)])


def _parser() -> Parser:
    parser = Parser(f"{PROG} iterate", description=__doc__)
    add_config_option(parser, default="tiny_iterate")
    for name, kind, text in (
        ("output_dir", str, "directory of the run"),
        ("rounds", int, "times that the policy answers and is trained"),
        ("mix_rounds", int, "collections that a round trains on, its own and those before it"),
        ("seed", int, "source of randomness"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{text}, instead of the value in the file")
    add_engine_options(parser)
    for one in fields(DryRun):
        how: dict[str, Any] = {"action": "store_true"} if one.name == "dry_run" else {"type": float}
        parser.add_argument(f"--{one.name}", help=one.metadata["help"], **how)
    return parser


def _check_sections(rounds: Rounds) -> None:
    """
    Checks the options of both commands before the first of them runs: those of `train` would be looked at after the first
    collection.
    """
    from ..trainer.checks import check_given
    from . import collect, train

    collect.parse(arguments_of(rounds.collect_options(1)))
    given = rounds.train_options(1)
    check_options("`train`", given, train.KINDS)
    check_given(given)


def rounds_of(options: dict[str, Any], check: bool = True) -> Rounds:
    """What the file says, with the options of the command line in front of it. `check`: whether those of both commands are checked."""
    path = options["config"]
    given = load_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold the options of `iterate`, got {given!r}.")
    check_names(f"options in {path}", given, Rounds)
    mine = {name: value for name, value in options.items() if name != "config" and value is not None}
    rounds = Rounds(**{**given, **mine})
    if check:
        _check_sections(rounds)
    return rounds


if __name__ == "__main__":
    raise SystemExit(main())
