"""What a user can set right ends every command with code 2, as a mistyped option does, and with one line."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from trl_diffusion import cli
from trl_diffusion.trainer.trainer import DTRPOTrainer


# Each command with an option that is not there, a value that cannot be, and something that is missing.
MISTAKES = {
    "train": (["--learning_rates", "1"], ["--learning_rate", "nan"], ["--train_file", "nothing.csv"]),
    "sft": (["--learning_rates", "1"], ["--weighting", "sum"], ["--task", "gsm8k"]),
    "collect": (["--response_count", "1"], ["--num_responses", "0"], ["--train_file", "nothing.csv"]),
    "evaluate": (["--task_names", "1"], ["--seeds", "1", "1", "--tasks", "sudoku"], ["--tasks", "chess"]),
    "adapt": (["m", "--block_siz", "1"], ["m", "--block_size", "0"], ["./nothing", "--output_dir", "policy"]),
    "iterate": (["--round_number", "1"], ["--rounds", "0"], ["--config", "nothing.yaml"]),
    "compare": (["--task", "chain"], ["--arms", "diffusion"], ["--tasks", "chess"]),
    "generate": (["--tokens", "1"], ["x", "--temperature", "-1"], ["x", "--model", "./nothing"]),
    "serve": (["--tokens", "1"], ["--temperature", "-1"], ["--port", "70000"]),
    "plan": (["m", "--learning_rate", "1"], ["m", "--gpus", "0"], ["./nothing"]),
    "doctor": (["--layer", "1"], ["--seconds", "many"], ["--config", "nothing.yaml"]),
    "view": (["data", "0", "--page", "1"], ["data", "zero"], ["nothing", "0"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_code_2(name, tmp_path, monkeypatch, capsys):
    assert set(MISTAKES) == {*cli.LAUNCHED, *cli.DIRECT} - {"completion"}  # which has no options
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    command = import_module(f"trl_diffusion.commands.{name}")
    for words in MISTAKES[name]:
        try:
            code = command.main(list(words))
        except SystemExit as end:
            code = end.code
        error = capsys.readouterr().err
        assert code == 2, (words, error)
        assert "error: " in error.splitlines()[-1] and "Traceback" not in error, error


def test_what_is_found_during_training_as_well(tmp_path, monkeypatch, capsys):
    """As it always was for `collect` and `evaluate`: a policy that diverges is no bug of the program."""

    def diverge(*args, **options):
        raise FloatingPointError("The loss is nan after 3 optimizer steps.")

    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(DTRPOTrainer, "answer", diverge)
    with pytest.raises(SystemExit) as end:
        import_module("trl_diffusion.commands.train").main(["--output_dir", str(tmp_path), "--bf16", "false"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: The loss is nan after 3 optimizer steps."
