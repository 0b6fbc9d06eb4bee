"""A reference that `sync_ref_model` moves, saved and loaded by processes that share its weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from tests.conftest import SPECS, make_policy, shared
from tests.distributed.launching import needs_deepspeed
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
@pytest.mark.parametrize(
    ("engine", "name", "step"), [("ddp", "moved", 3), pytest.param("zero3", "llada", 2, marks=needs_deepspeed)]
)
def test_a_resumed_run_is_the_uninterrupted_one(engine_runs, engine, name, step):
    source = tiny_policy_path() if name == "moved" else shared("fixtures", "llada")
    directories = [engine_runs(engine) / directory for directory in (name, f"{name}-resumed")]
    logs = [json.loads((directory / "logs.json").read_text()) for directory in directories]
    kls, again = ([entry["kl"] for entry in log if "kl" in entry] for log in logs)
    assert again == pytest.approx(kls, rel=1e-5, abs=1e-9) and max(kls) > 1e-4
    checkpoint = directories[0] / f"checkpoint-{step}"
    moved = torch.load(checkpoint / FILE, weights_only=True)
    before, now = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, checkpoint))
    assert set(moved) <= set(before)
    assert any(not torch.equal(moved[name], before[name]) for name in moved)
    assert any(not torch.equal(moved[name], now[name]) for name in moved)
