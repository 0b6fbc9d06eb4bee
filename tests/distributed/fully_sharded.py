"""What two processes run: decoding and scoring on a policy that FSDP2 has sharded, beside one that is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import distributed
from torch.distributed.fsdp import fully_shard

from tests.conftest import SPECS, make_policy, make_prompts
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score


def compare(name: str, rank: int) -> dict:
    spec = SPECS[name]
    whole, sharded = make_policy(spec), make_policy(spec)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    held = sum(p.to_local().numel() for p in sharded.parameters())
    prompts = make_prompts((3, 21, 8) if rank == 0 else (5,))
    decoding, seeds = DecodingConfig(28 if rank == 0 else 12, 1.0), list(range(len(prompts)))
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True, backend="gloo")
    found = {name: compare(name, state.process_index) for name in ("block-from-sequence", "full-shift")}
    Path(sys.argv[1], f"sharded_{state.process_index}.json").write_text(json.dumps(found))
    distributed.barrier()
