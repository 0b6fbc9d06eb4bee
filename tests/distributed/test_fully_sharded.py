"""FSDP2, of which accelerate runs none on a CPU: the policy alone, sharded by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from tests.closeness import ROUNDING
from tests.conftest import SPECS, make_policy, make_prompts
from tests.processes import run_pair
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.policies.trial import try_policy
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score


def compare_all(rank: int) -> dict[str, dict]:
    """Decoding and scoring on a policy that two processes share, beside one that is whole."""
    distributed.init_process_group("gloo")
    return {name: compare(name, rank) for name in ("block-from-sequence", "full-shift")}


def compare(name: str, rank: int) -> dict:
    spec = SPECS[name]
    whole, sharded = make_policy(spec), make_policy(spec)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    held = sum(p.to_local().numel() for p in sharded.parameters())
    prompts = make_prompts((3, 21, 8) if rank == 0 else (5,))
    decoding, seeds = DecodingConfig(28 if rank == 0 else 12, 1.0), list(range(len(prompts)))
    try_policy(sharded, spec)  # its passes are not those of a rollout
    passes = []
    sharded.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = decode(sharded, prompts, decoding, spec, seeds, keep_pace=True)
    count = len(passes)
    alone = decode(whole, prompts, decoding, spec, seeds)
    states = ESTIMATORS["dtrpo"].states(batch, spec, seeds, EstimatorConfig())
    layout = pack(batch, spec, states)
    gap = (score(sharded, layout, spec)[0] - score(whole, layout, spec)[0]).abs().max().item()
    needed = []
    whole.register_forward_pre_hook(lambda *_: needed.append(1))
    decode(whole, prompts, decoding, spec, seeds)
    return {
        "held": held / sum(p.numel() for p in whole.parameters()),
        "same": torch.equal(batch.canvas_ids, alone.canvas_ids) and torch.equal(batch.steps, alone.steps),
        "gap": gap,
        "passes": count,
        "needed": len(needed),
    }


@pytest.mark.distributed
def test_rollouts_and_scores_on_a_policy_sharded_by_fsdp2():
    """Tokens, order and scores are those of the whole policy, and both processes run the same number of passes."""
    first, second = run_pair(compare_all)
    for name in first:
        for found in (first[name], second[name]):
            assert found["same"] and found["gap"] < ROUNDING and 0.4 < found["held"] < 0.6
        assert first[name]["passes"] == second[name]["passes"] == max(first[name]["needed"], second[name]["needed"])
        assert first[name]["needed"] > second[name]["needed"]
