"""What goes wrong on one process ends in an error on all of them, never in waiting."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launching import ROOT, launch, needs_deepspeed
from trl_diffusion.trainer.agreement import fail_together


pytestmark = pytest.mark.distributed

FAULTS = ROOT / "tests" / "distributed" / "faults.py"
CELL = {"name": "fault", "rows": 8, "options": {"temperature": 2.0, "max_completion_length": 8}}
# What process 1 raises, and what process 0 says about it.
EXPECTED = {
    "raises": ("KeyError: 'no such row'", "The reward function 'raising'"),
    "raises_later": ("KeyError: 'no such row'", "The reward function 'raising_later'"),
    "too_few": ("ValueError: The reward function 'too_few' returned 3 rewards for 4", "The reward function 'too_few'"),
    "no_numbers": ("ValueError: could not convert string to float", "The reward function 'no_numbers'"),
    "nan_loss": ("FloatingPointError: The loss is nan after 0 optimizer steps", "The loss"),
    "decoding": ("MemoryError: rollout of this process", "Decoding"),
}


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=needs_deepspeed)])
def test_errors_on_one_process(tmp_path, engine):
    code, output = launch(engine, tmp_path, FAULTS, json.dumps(CELL), str(tmp_path), partition_all=engine == "zero3")
    assert code != 0 and "exitcode  : 3" in output  # the process that died in the end is named, and ended the other
    for case, (error, what) in EXPECTED.items():
        failed, other = (json.loads((tmp_path / f"{case}_{rank}.json").read_text()) for rank in (1, 0))
        assert failed["error"].startswith(error), case
        assert other["error"].startswith(f"RuntimeError: {what} failed on another process"), case
        assert f"process 1: {error}" in other["error"] and failed["steps"] == other["steps"] == 0, case
    for rank in (0, 1):  # one process is a second early every time, and after all these errors everything works
        found = json.loads((tmp_path / f"early_{rank}.json").read_text())
        assert found["error"] is None and found["steps"] == 2


def test_alone_an_error_is_raised_as_it_is():
    class Alone:
        num_processes = 1

    fail_together(Alone(), None, "Nothing")
    with pytest.raises(ZeroDivisionError, match="by zero"):
        fail_together(Alone(), ZeroDivisionError("by zero"), "Dividing")
