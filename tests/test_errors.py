"""The line of an error: once for all processes, and with the place if the user's own code has failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from trl_diffusion.commands import launch
from trl_diffusion.commands.parser import Parser
from trl_diffusion.errors import SAID, say_error
from trl_diffusion.rewards.call import RewardCaller
from trl_diffusion.utils import errors_in_a_line, exit_code


def test_processes_of_a_launch_say_a_line_once(tmp_path, monkeypatch, capsys):
    """What only one of them finds is said, too. Alone, each line is said."""
    monkeypatch.setenv(SAID, str(tmp_path))
    for message in ("the same", "the same", "another", "the same"):
        say_error(message)
    with pytest.raises(SystemExit) as end:
        Parser("program").error("the  same")
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: the same\nerror: another\n"
    for directory in (None, str(tmp_path / "gone")):
        monkeypatch.setenv(SAID, directory) if directory else monkeypatch.delenv(SAID)
        say_error("the same")
        say_error("the same")
        assert capsys.readouterr().err == "error: the same\n" * 2


def test_a_launch_has_a_place_for_what_was_said(monkeypatch):
    """It is there while its processes run, and gone afterwards. A single process needs none."""
    found = []
    monkeypatch.setenv(SAID, "unset afterwards")
    monkeypatch.setattr(launch.launch, "main", lambda: found.append(os.environ[SAID]) or os.listdir(found[0]))
    launch.main()
    assert not os.path.exists(found[0])
    monkeypatch.setenv(SAID, found[0])
    os.mkdir(found[0])
    monkeypatch.setattr(launch, "prepare_simple_launcher_cmd_env", lambda args: (["program"], dict(os.environ)))
    monkeypatch.setattr(os, "execvpe", lambda program, words, environment: found.append(environment))
    launch.become(None)
    assert SAID not in found[1] and not os.path.exists(found[0])


REWARD = """
import json

def typo(completions, **kwargs):
    return [json.loads(one) for one in completion]

def inside(completions, **kwargs):
    return [json.loads(one) for one in completions]

async def later(completions, **kwargs):
    return {}["no"]
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("typo", "The reward function 'typo' has failed: NameError: name 'completion' is not defined (own.py, line 5)."),
        ("inside", "The reward function 'inside' has failed: JSONDecodeError: Expecting value: line 1 column 1 (char 0) (own.py, line 8)."),
        ("later", "One of the reward functions ['later'] has failed: KeyError: 'no' (own.py, line 11)."),
    ],
)  # fmt: skip
def test_the_users_own_code(tmp_path, capsys, name, line):
    """Commands end with a line that names the place. In Python the error leaves as it is."""
    names: dict = {}
    exec(compile(REWARD, str(tmp_path / "own.py"), "exec"), names)

    def work():
        RewardCaller(names[name])(["a"], ["b"], [[1]], {})

    kinds = {"typo": NameError, "inside": json.JSONDecodeError, "later": KeyError}
    with pytest.raises(kinds[name]) as raised:
        work()
    assert raised.value.__notes__ == [line]
    assert exit_code(work) == 2
    with pytest.raises(SystemExit), errors_in_a_line():
        work()
    assert capsys.readouterr().err == f"error: {line}\n" * 2


def test_a_bug_is_shown_as_one():
    with pytest.raises(ZeroDivisionError), errors_in_a_line():
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)


def test_errors_are_light():
    """The first lines of a command are said before anything large is imported."""
    code = "import sys; from trl_diffusion.errors import say_error; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
