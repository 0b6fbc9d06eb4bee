"""Oracle O7 (METHOD.md, section 8): the number of processes changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import jobs
from tests.distributed.launching import run_cells
from trl_diffusion import tiny_policy_path


pytestmark = pytest.mark.distributed

# Responses of unequal weight, so that the loss is not 0 on policy.
UNEVEN = {"temperature": 2.0, "decoding_strategy": "threshold", "confidence_threshold": 0.7}
CELLS = [
    {"name": "groups_whole", "rows": 8, "options": UNEVEN},
    {
        "name": "groups_split",  # one group over both processes
        "rows": 8,
        "options": {**UNEVEN, "num_generations": 8, "loss_type": "dr_grpo", "beta": 0.1},
    },
    {
        "name": "accumulated",
        "rows": 4,
        "options": {**UNEVEN, "num_iterations": 2, "gradient_accumulation_steps": 2},
    },
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Path]:
    return run_cells("ddp", CELLS, tmp_path_factory.mktemp("ddp"))


def logged(directory: Path, name: str) -> list[float]:
    return [entry[name] for entry in json.loads((directory / "logs.json").read_text()) if name in entry]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell["name"])
def test_o7_two_processes_are_one(two_processes, tmp_path, cell):
    """Same rollouts, losses and final weights for N rows in one process as for N/2 rows in each of two."""
    one, two = tmp_path / "one", two_processes[cell["name"]]
    jobs.run(cell, one)

    rollouts = json.loads((one / "rollouts_0.json").read_text())
    halves = [json.loads((two / f"rollouts_{rank}.json").read_text()) for rank in (0, 1)]
    assert all(len(rows) == 8 for rows in rollouts)
    assert rollouts == [first + second for first, second in zip(*halves, strict=True)]
    assert len({tuple(ids) for rows in rollouts for ids in rows}) > len(rollouts) * 3  # not all the same answer

    assert logged(one, "loss") == pytest.approx(logged(two, "loss"), abs=1e-4)
    assert logged(one, "grad_norm") == pytest.approx(logged(two, "grad_norm"), rel=1e-3)
    assert max(map(abs, logged(one, "loss"))) > 1e-3
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (one, two))
    torch.testing.assert_close(weights, others, atol=1e-5, rtol=1e-4)
    start = load_file(Path(tiny_policy_path()) / "model.safetensors")
    moved = max(float((weights[name] - start[name]).abs().max()) for name in weights)
    assert moved > 1e-3  # a hundred times what may differ
