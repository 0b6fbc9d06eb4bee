"""TRL's own tests of `GRPOTrainer` on `DTRPOTrainer`, and whether the script that runs them can see a failure."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import trl_suite
from tests.trl_suite import NOT_SUPPORTED, Result, Row, judge, reasons, same_failure
from trl_diffusion import DTRPOConfig
from trl_diffusion.trainer.config import _REFUSED


CHECKOUT = os.environ.get("TRL_CHECKOUT")


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="TRL_CHECKOUT is not set: the path of a checkout of TRL, for its tests")
def test_trl_own_tests():
    command = [sys.executable, trl_suite.__file__, str(CHECKOUT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10000:]


def test_a_path_without_tests_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trl_suite.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="give the path of a checkout of TRL"):
        trl_suite.main()


def test_the_page_lists_what_is_refused():
    """Every option that is refused and no other, with the reasons that the errors give."""
    known = reasons()
    assert {name for name in known if name in DTRPOConfig.__dataclass_fields__} == set(_REFUSED) & set(
        DTRPOConfig.__dataclass_fields__
    )
    assert "vllm_..." in known
    for name, why in _REFUSED.items():
        assert known[name].lower() == f"{why}.".lower()


def test_reasons_have_tests_of_their_own():
    assert {row.what for row in NOT_SUPPORTED} <= set(reasons())


ROWS = (Row(r"A::test_tools.*", "tools", "not supported"),)
KNOWN = {"tools": "Responses are denoised in one turn."}


@pytest.mark.parametrize(
    ("name", "result", "expected"),
    [
        ("A::test_loss", Result("passed", ""), "passed"),
        ("A::test_loss", Result("failed", "AssertionError: 1 is not 2"), "failed"),
        ("A::test_loss", Result("skipped", "Skipped: needs a GPU"), "needs what is not here"),
        ("A::test_tools[one]", Result("failed", "ValueError: `tools` is not supported"), "not supported"),
        ("A::test_tools[one]", Result("failed", "KeyError: 'tools'"), "failed"),
        ("A::test_tools[one]", Result("passed", ""), "wrong"),
        ("B::test_tools", Result("failed", "ValueError: `tools` is not supported"), "failed"),
    ],
)
def test_verdicts(name, result, expected):
    found = judge({name: result}, KNOWN, ROWS)
    assert list(found) == [expected] and len(found[expected]) == 1 and name in found[expected][0]


def test_a_reason_that_the_page_does_not_give():
    assert "is not in the table" in judge({}, {}, ROWS)["wrong"][0]


def test_only_the_same_failure_of_trl_own_trainer_excuses():
    ours = Result("failed", "AttributeError: 'DTRPOTrainer' object has no attribute 'rows'\nat 0x7f1a")
    theirs = Result("failed", "AttributeError: 'GRPOTrainer' object has no attribute 'rows'\nat 0x7f00")
    assert same_failure(ours, theirs)
    assert not same_failure(ours, Result("failed", "OSError: no such model"))
    assert not same_failure(Result("failed", "no match\ngot `tools`"), Result("failed", "no match\ngot `rows`"))
    assert not same_failure(ours, Result("passed", ours.text))
