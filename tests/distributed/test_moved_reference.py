"""A reference that `sync_ref_model` moves, saved and loaded by processes that share its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import fully_shard

from tests.conftest import SPECS, make_policy
from tests.distributed.launching import needs_deepspeed, run_cells
from tests.processes import run_pair
from trl_diffusion import tiny_policy_path
from trl_diffusion.trainer.reference import FILE, load_reference, save_reference


pytestmark = pytest.mark.distributed


def save_and_load(rank: int, directory: str) -> bool:
    """Whether another policy, loaded with what was saved of a sharded one, is that one."""
    distributed.init_process_group("gloo")
    spec = SPECS["block-from-sequence"]
    saved, loaded = make_policy(spec, seed=0), make_policy(spec, seed=1)
    for policy in (saved, loaded):
        for layer in policy.model.layers:
            fully_shard(layer)
        fully_shard(policy)
    save_reference(saved, directory, write=rank == 0)
    distributed.barrier()
    load_reference(loaded, directory)
    pairs = zip(saved.parameters(), loaded.parameters(), strict=True)
    return all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)


def test_a_reference_sharded_by_fsdp2(tmp_path):
    assert run_pair(save_and_load, str(tmp_path)) == [True, True]
    whole = torch.load(tmp_path / FILE, weights_only=True)
    assert all(torch.equal(whole[name], p) for name, p in make_policy(SPECS["block-from-sequence"]).named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, engine):
    options = {
        "beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    cell = {"name": "whole", "rows": 8, "options": options}
    resumed = {**cell, "name": "resumed", "resume": str(tmp_path / "whole" / "checkpoint-3")}
    directories = run_cells(engine, [cell, resumed], tmp_path)
    logs = [json.loads((directories[name] / "logs.json").read_text()) for name in ("whole", "resumed")]
    kls, again = ([entry["kl"] for entry in log if "kl" in entry] for log in logs)
    assert again == pytest.approx(kls, rel=1e-5, abs=1e-9) and max(kls) > 1e-4
    moved = torch.load(tmp_path / "whole" / "checkpoint-3" / FILE, weights_only=True)
    before = load_file(Path(tiny_policy_path()) / "model.safetensors")
    now = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert set(moved) <= set(before)
    assert any(not torch.equal(moved[name], before[name]) for name in moved)
    assert any(not torch.equal(moved[name], now[name]) for name in moved)
