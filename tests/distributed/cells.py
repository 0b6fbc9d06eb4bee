"""What the launches run: cells of `jobs.py`, with every pair of values of the matrix, and faults."""

from __future__ import annotations

from itertools import product
from pathlib import Path


# Responses of unequal weight, so that the loss is not 0 on policy.
UNEVEN = {"tokens_per_step": 1, "temperature": 2.0, "strategy": "threshold", "threshold": 0.7}
EMBEDDED = [
    {"name": "groups_whole", "rows": 8, "options": UNEVEN},
    {
        "name": "groups_split",  # one group over both processes
        "rows": 8,
        "options": {**UNEVEN, "num_generations": 8, "loss_type": "dr_grpo", "beta": 0.1},
    },
    {"name": "accumulated", "rows": 4, "options": {**UNEVEN, "num_iterations": 2, "gradient_accumulation_steps": 2}},
]

MATRIX = [
    (f"{'lora' if lora else 'full'}-{'beta' if beta else 'free'}-{'offline' if offline else 'online'}", lora, beta, offline)
    for lora, beta, offline in product((False, True), (0.0, 0.1), (False, True))
]  # fmt: skip

# Every two settings meet in each half of the matrix; the two kinds of DeepSpeed have all of it between them.
HALF = ["full-free-offline", "full-beta-online", "lora-free-online", "lora-beta-offline"]
OTHER_HALF = ["full-free-online", "full-beta-offline", "lora-free-offline", "lora-beta-online"]
RUNS = {"ddp": HALF, "zero2": OTHER_HALF, "zero3": HALF}

# With ZeRO-3, the rest of the matrix that is online is checkpointed. With an adapter, TRL insists on re-entrant checkpointing.
ZERO3 = {
    # name: cell of the matrix, re-entrant or not, rollouts on sharded weights or not, an error after the first step or not
    "disturbed": ("full-free-online", False, False, True),
    "full-sharded": ("full-beta-online", True, True, False),
    "lora-sharded": ("lora-beta-online", True, True, False),
}

LLADA = {
    "name": "llada",
    "rows": 8,
    "options": {
        **UNEVEN, "threshold": 0.01, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2,
        "beta": 0.1, "max_completion_length": 16, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5,
    },
}  # fmt: skip
EXPERTS = {
    "name": "experts",
    "rows": 8,
    "options": {
        **UNEVEN, "threshold": 0.01, "beta": 0.1, "max_completion_length": 48, "gradient_checkpointing": True, "learning_rate": 1e-2,
    },
}  # fmt: skip
EXPERTS_LORA = {
    **EXPERTS,
    "name": "experts-lora",
    "options": {**EXPERTS["options"], "max_steps": 3},
    "lora": {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}  # fmt: skip
MOVED = {
    "name": "moved",
    "rows": 8,
    "options": {
        "beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2,
    },
}  # fmt: skip

# Documents of unequal lengths, two batches for each step, and five documents to measure on.
SUPERVISED = {
    "name": "supervised", "rows": 4, "supervised": True,
    "options": {
        "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1,
        "per_device_eval_batch_size": 2,
    },
}  # fmt: skip

# Faults, and those whose error is raised while processes wait for each other's weights.
FAULTS = ["raises", "raises_later", "too_few", "no_numbers", "nan_loss", "decoding", "early"]
INSIDE = ["raises", "nan_loss", "decoding", "early"]

RECIPE = ["train.py", "--max_steps", "2", "--per_device_train_batch_size", "16", "--train_size", "64", "--eval_size", "21",
          "--ddp_backend", "gloo", "--beta", "0.1"]  # fmt: skip


def matrix_cell(name: str, lora: bool, beta: float, offline: bool, start: Path, trajectories: Path) -> dict:
    options = {**UNEVEN, "temperature": 1.0, "threshold": 0.15, "beta": beta, "learning_rate": 1e-2}
    if offline and beta:
        options["loss_type"] = "dpo"
    cell = {"name": name, "rows": 8, "options": options, "lora": lora, "model": str(start)}
    return {**cell, "trajectories": str(trajectories)} if offline else cell


def zero3_cell(matrix: dict[str, dict], name: str) -> dict:
    """A cell of `ZERO3`."""
    of, reentrant, sharded, disturb = ZERO3[name]
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    options |= {"ds3_gather_for_generation": not sharded}
    return {**matrix[of], "name": name, "options": {**matrix[of]["options"], **options}, "disturb": disturb}


def resumed(cell: dict, directory: Path, step: int) -> tuple[dict, dict]:
    """A cell, and one that goes on from its checkpoint, after `step` steps."""
    checkpoint = directory / cell["name"] / f"checkpoint-{step}"
    return cell, {**cell, "name": f"{cell['name']}-resumed", "resume": str(checkpoint)}


def faults(names: list[str] = FAULTS) -> list[dict]:
    options = {"temperature": 2.0, "max_completion_length": 8}
    return [{"name": f"fault-{name}", "fault": name, "rows": 8, "options": options} for name in names]
