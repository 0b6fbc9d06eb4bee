"""What goes wrong on one process ends in an error on all of them, never in waiting."""

from __future__ import annotations

import json

import pytest

from tests.distributed.cells import FAULTS, INSIDE
from tests.distributed.launching import needs_deepspeed
from trl_diffusion.agreement import fail_together


pytestmark = pytest.mark.distributed

# What process 1 raises, and what process 0 says about it.
EXPECTED = {
    "raises": ("KeyError: 'no such row'", "The reward function 'raising'"),
    "raises_later": ("KeyError: 'no such row'", "The reward function 'raising_later'"),
    "too_few": ("ValueError: The reward function 'too_few' returned 3 rewards for 4", "The reward function 'too_few'"),
    "no_numbers": ("ValueError: The reward function 'no_numbers' returned", "The reward function 'no_numbers'"),
    "nan_loss": ("FloatingPointError: The loss is nan after 0 optimizer steps", "The loss"),
    "decoding": ("MemoryError: rollout of this process", "Decoding"),
}


LAUNCHES = [("ddp", FAULTS), pytest.param("zero3", INSIDE, marks=needs_deepspeed)]


@pytest.mark.parametrize(("engine", "names"), LAUNCHES)
def test_errors_on_one_process(engine_runs, engine, names):
    directory = engine_runs(engine)

    def found(case: str, rank: int) -> dict:
        return json.loads((directory / f"fault-{case}" / f"error_{rank}.json").read_text())

    for case in (name for name in names if name != "early"):
        error, what = EXPECTED[case]
        failed, other = found(case, 1), found(case, 0)
        assert failed["error"].startswith(error), case
        assert other["error"].startswith(f"RuntimeError: {what} failed on another process"), case
        assert f"process 1: {error}" in other["error"] and failed["steps"] == other["steps"] == 0, case
    for rank in (0, 1):  # one process is a second early every time, and after all these errors everything works
        assert found("early", rank) == {"error": None, "steps": 2}


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_process_that_dies_is_named_and_ends_the_other(engine_runs, engine):
    directory = engine_runs(engine)
    (log,) = directory.glob("*.log")
    assert (directory / "code").read_text() != "0" and "exitcode  : 3" in log.read_text()


def test_alone_an_error_is_raised_as_it_is():
    class Alone:
        num_processes = 1

    fail_together(Alone(), None, "Nothing")
    with pytest.raises(ZeroDivisionError, match="by zero"):
        fail_together(Alone(), ZeroDivisionError("by zero"), "Dividing")
