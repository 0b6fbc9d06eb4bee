"""The README's example is run as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

from trl_diffusion import DTRPOTrainer


README = Path(__file__).resolve().parents[2] / "README.md"


def side_of_diff(sign: str) -> str:
    """The script before (`-`) or after (`+`) the README's diff."""
    diff = re.search(r"```diff\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in (" ", sign, ""))


def test_the_swap_is_a_few_lines():
    diff = re.search(r"```diff\n(.*?)```", README.read_text(), re.DOTALL).group(1).splitlines()
    assert sum(line.startswith("+") for line in diff) <= 5
    compile(side_of_diff("-"), "before", "exec")


def test_the_example_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(side_of_diff("+"), "README", "exec"), scope)
    trainer = scope["trainer"]
    assert isinstance(trainer, DTRPOTrainer)
    assert trainer.state.global_step == 3


def test_the_trainer_docstring_example_is_valid(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", DTRPOTrainer.__doc__, re.DOTALL).group(1)
    code = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    monkeypatch.chdir(tmp_path)
    short = code.replace("max_completion_length=17", "max_completion_length=17, max_steps=1, report_to='none'")
    assert short != code
    scope = {}
    exec(compile(short, "docstring", "exec"), scope)
    assert scope["trainer"].state.global_step == 1
