"""`trl-diffusion iterate`: rounds of collecting and training, which go on after an interruption at any point."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields

import pytest
from trl import ModelConfig

from trl_diffusion import tiny_policy_path
from trl_diffusion.commands import recipes_path
from trl_diffusion.commands.collect import CollectArguments
from trl_diffusion.commands.iterate import Rounds, arguments_of, main, run
from trl_diffusion.commands.train import parse
from trl_diffusion.utils import load_yaml


def make(tmp_path, **changes) -> Rounds:
    options = {
        "output_dir": str(tmp_path / "run"),
        "rounds": 3,
        "collect": {"train_size": 4, "num_responses": 2},
        "train": {"max_steps": 1, "bf16": False},
        **changes,
    }
    return Rounds(**options)


class Commands:
    """Does what the commands leave behind, and fails at the call of a given number."""

    def __init__(self, fail_at: int | None = None):
        self.calls, self.fail_at = [], fail_at

    def __call__(self, name: str, words: list[str]) -> None:
        if len(self.calls) + 1 == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((name, words))
        if name == "train":
            from pathlib import Path

            directory = Path(words[words.index("--output_dir") + 1])
            directory.mkdir(parents=True)
            results = {"solve_rate_before": 0.1, "solve_rate_after": 0.2}
            (directory / "results.json").write_text(json.dumps(results))


def value(words: list[str], name: str) -> str:
    return words[words.index(f"--{name}") + 1]


def test_each_round_starts_from_the_policy_of_the_one_before(tmp_path):
    rounds, commands = make(tmp_path), Commands()
    results = run(rounds, commands)
    assert [name for name, _ in commands.calls] == ["collect", "train"] * 3
    seeds = set()
    for number in (1, 2, 3):
        collect, train = (words for _, words in commands.calls[2 * number - 2 : 2 * number])
        before = tiny_policy_path() if number == 1 else str(rounds.directory(number - 1) / "policy")
        assert value(collect, "model_name_or_path") == value(train, "model_name_or_path") == before
        assert (
            value(collect, "output_dir")
            == value(train, "trajectories")
            == str(rounds.directory(number) / "trajectories")
        )
        seeds.add(value(collect, "seed"))
        CollectArguments(output_dir=value(collect, "output_dir"), seed=int(value(collect, "seed")))
    assert len(seeds) == 3
    assert [row["round"] for row in results] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rounds"] == results


def test_rounds_may_train_on_earlier_collections(tmp_path):
    commands = Commands()
    rounds = make(tmp_path, mix_rounds=2)
    run(rounds, commands)
    last = commands.calls[-1][1]
    at = last.index("--trajectories")
    assert last[at + 1 : at + 3] == [str(rounds.directory(number) / "trajectories") for number in (2, 3)]
    script, training, _ = parse([*last, "--config", "recipes/tiny_sudoku.yaml"])
    assert script.trajectories == last[at + 1 : at + 3]
    assert training.max_steps == 1


@pytest.mark.parametrize("fail_at", range(1, 7))
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, fail_at):
    whole = Commands()
    run(make(tmp_path / "whole"), whole)
    first = Commands(fail_at)
    with pytest.raises(KeyboardInterrupt):
        run(make(tmp_path), first)
    second = Commands()
    results = run(make(tmp_path), second)
    assert len(results) == 3
    # What was whole is not done again; of a round that was not, `collect` and `train` find their own place.
    done = [name for name, _ in first.calls + second.calls]
    assert done.count("train") == 3 and 3 <= done.count("collect") <= 4
    assert run(make(tmp_path), Commands(1)) == results


def test_a_round_goes_on_from_a_checkpoint_if_it_was_interrupted(tmp_path):
    """It does not ask for one in a round that begins, which would be answered with a warning."""
    rounds = make(tmp_path)
    _, training, _ = parse(arguments_of(rounds.train_options(2)))
    assert training.resume_from_checkpoint is None
    (rounds.directory(2) / "policy" / "checkpoint-10").mkdir(parents=True)
    _, training, _ = parse(arguments_of(rounds.train_options(2)))
    assert training.resume_from_checkpoint == "true"


def test_a_run_keeps_its_options_but_may_get_more_rounds(tmp_path):
    run(make(tmp_path, rounds=1), Commands())
    with pytest.raises(ValueError, match="other options: `train` was .*max_steps.*Give it another `output_dir`"):
        run(make(tmp_path, train={"max_steps": 2}), Commands())
    commands = Commands()
    assert len(run(make(tmp_path, rounds=2), commands)) == 2 and len(commands.calls) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "`rounds` must be a whole number of at least 1, got 0"),
        ({"mix_rounds": 1.5}, "`mix_rounds` must be a whole number"),
        ({"train": {"seed": 1}}, r"`train` has \['seed'\], which each round sets itself"),
        ({"collect": {"output_dir": "x"}}, r"`collect` has \['output_dir'\]"),
        ({"train": {"use_peft": True}}, "must be a whole model"),
        ({"train": ["max_steps"]}, "`train` must hold options of `train`"),
        ({"collect": {"task": "countdown"}}, "Give both the same `task`"),
        ({"collect": {"chat_template_kwargs": "enable_thinking:false"}}, "Give both the same ones"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


def test_options_as_words():
    words = arguments_of({"a": 1.5, "b": None, "c": ["x", "y"], "d": {"k": [1]}, "e": False})
    assert words == ["--a", "1.5", "--c", "x", "y", "--d", '{"k": [1]}', "--e", "false"]


def test_the_recipe_is_made_of_options_of_the_two_commands():
    """No more responses in all rounds together than `tiny_sudoku.yaml` takes, and every option is known."""
    rounds = Rounds(**load_yaml(recipes_path() / "tiny_iterate.yaml"))
    _, online, _ = parse(["--config", str(recipes_path() / "tiny_sudoku.yaml")])
    answers = rounds.rounds * rounds.collect["train_size"] * rounds.collect["num_responses"]
    assert answers <= online.max_steps * online.per_device_train_batch_size
    script, training, _ = parse(arguments_of(rounds.train_options(1)))
    assert script.task == "sudoku" and training.output_dir == str(rounds.directory(1) / "policy")
    names = {field.name for kind in (CollectArguments, ModelConfig) for field in fields(kind)}
    assert set(rounds.collect_options(1)) <= names


@pytest.mark.slow
def test_two_rounds_for_real(tmp_path, monkeypatch, capsys):
    """The commands are run in this process, as small as they can be."""
    from trl_diffusion.commands import collect, iterate, train

    config = tmp_path / "rounds.yaml"
    config.write_text(
        "collect: {train_size: 4, num_responses: 4, max_completion_length: 17, tokens_per_step: 4}\n"
        "train: {per_device_train_batch_size: 16, num_generations: 4, max_completion_length: 17, tokens_per_step: 4, "
        "max_steps: 1, learning_rate: 0.0003, eval_size: 4, bf16: false, report_to: none, gradient_checkpointing: false, save_strategy: 'no', "
        "disable_tqdm: true}\n"
    )

    def start(command, check, env):
        at = command.index("--module")
        module = {"collect": collect, "train": train}[command[at + 1].rsplit(".", 1)[1]]
        monkeypatch.setattr("sys.argv", ["command", *command[at + 2 :]])
        with monkeypatch.context() as patch:
            patch.setenv("TRL_DIFFUSION_COMMAND", env["TRL_DIFFUSION_COMMAND"])
            module.main()

    monkeypatch.setattr(iterate.subprocess, "run", start)
    monkeypatch.setattr(train, "draw", lambda *_: [])  # pictures are half of the time that a small run takes
    arguments = ["--config", str(config), "--output_dir", str(tmp_path / "run"), "--rounds", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "round    before     after" in out
    assert out.count("Settings:") == 1 and f"Settings: {config}. Output: {tmp_path / 'run'}, with 2 rounds." in out
    told = [line.strip() for line in out.splitlines()[-3:]]
    assert (
        told[0] == "Next:" and told[1].startswith("trl-diffusion generate 'sudoku ") and "/round_2/policy " in told[1]
    )
    assert told[2] == shlex.join(["trl-diffusion", "iterate", *arguments[:-1], "4"])
    plans = [
        json.loads((tmp_path / "run" / f"round_{number}" / "trajectories" / "collection.json").read_text())
        for number in (1, 2)
    ]
    assert plans[0]["policy_fingerprint"] != plans[1]["policy_fingerprint"]
    assert plans[0]["prompts_fingerprint"] != plans[1]["prompts_fingerprint"]
    whole = json.loads((tmp_path / "run" / "results.json").read_text())
    results = whole["rounds"]
    assert [row["round"] for row in results] == [1, 2]
    assert whole["command"] == shlex.join(["trl-diffusion", "iterate", *arguments]) and whole["versions"]["torch"]
