"""
What `trl-diffusion plan` says beside the peak memory of real training steps, each in a fresh process.

    python benchmarks/plan_memory.py --json

Measured on a CPU in float32: the growth of the resident memory (Linux counts its peak) from before the model is there to
the highest point of the second and third optimizer step of a `DTRPOTrainer`, rollouts included. The first step is left out,
since it makes the optimizer's state. A trainer with a model of next to no size has run in the same process before, so what
libraries, trainer and data take is there already.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_diffusion import DiffusionSpec, DTRPOConfig, DTRPOTrainer, set_spec, tiny_policy_path
from trl_diffusion.plan.simulate import Footprint, Workload, simulate


PROMPT, COMPLETION, ROWS, GENERATIONS, RANK, BLOCK = 64, 128, 16, 4, 8, 16
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12,
        "vocab_size": 32768, "tie_word_embeddings": False}  # fmt: skip
# LLaDA2.0-mini, scaled down: an eighth of its width, seven layers with experts out of eight, 64 experts.
EXPERTS = {"family": "llada2_moe", "hidden_size": 256, "intermediate_size": 640, "moe_intermediate_size": 64, "num_hidden_layers": 8,
           "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 16384, "num_experts": 64,
           "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "block_size": BLOCK, "mask_token_id": 5,
           "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
CASES = {
    "three layers, few rows": {"model": {**SMALL, "num_hidden_layers": 3}, "rows": 8, "completion": 64},
    "small, full": {"model": SMALL},
    "small, full, checkpointing": {"model": SMALL, "checkpointing": True},
    "small, LoRA": {"model": SMALL, "lora": True},
    "small, LoRA, checkpointing": {"model": SMALL, "lora": True, "checkpointing": True},
    "small, full attention": {"model": SMALL, "attention": "full"},
    "small, 4 draws": {"model": SMALL, "draws": 4},
    "wide, full": {"model": WIDE},
    "wide, full, accumulation": {"model": WIDE, "accumulation": 2},
    "wide, LoRA, checkpointing": {"model": WIDE, "lora": True, "checkpointing": True},
    "experts, full": {"model": EXPERTS},
    "experts, LoRA": {"model": EXPERTS, "lora": True},
    "experts, LoRA, checkpointing": {"model": EXPERTS, "lora": True, "checkpointing": True},
}


def policy_config(case: dict):
    spec = DiffusionSpec(
        mask_token_id=5,
        block_size=BLOCK,
        attention=case.get("attention", "block"),
        block_origin="response" if case.get("attention") == "full" else "sequence",
    )
    shape = {"family": "qwen3", **case["model"]}
    config = AutoConfig.for_model(shape.pop("family"), max_position_embeddings=512, **shape)
    set_spec(config, spec)
    return config, spec


def planned(case: dict) -> tuple[float, Footprint]:
    """Bytes that a step needs, by the plan."""
    from trl_diffusion.scoring.estimators import EstimatorConfig

    config, spec = policy_config(case)
    work = Workload(
        batch_size=case.get("rows", ROWS), num_generations=GENERATIONS, prompt_length=PROMPT, completion_length=case.get("completion", COMPLETION),
        rollout_batch_size=case.get("rows", ROWS), checkpointing=case.get("checkpointing", False), accumulation=case.get("accumulation", 1),
        estimator=EstimatorConfig(num_draws=case.get("draws", 1)), tokens_per_step=4,
    )  # fmt: skip
    print_ = simulate(config, spec, work, torch.float32, lora_rank=RANK if case.get("lora") else None)
    update = print_.weights + print_.gradients + print_.optimizer + print_.activations
    rollout = print_.weights + print_.optimizer + print_.rollout + print_.cache
    return max(update, rollout), print_


def status(name: str) -> int:
    """A line of this process's memory status, in bytes."""
    return next(
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if name in line
    )


class PeakCallback(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew


def measure(case: dict) -> int:
    """Bytes that real steps need. In a process of its own."""
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left", trust_remote_code=False)
    text = "".join(str(i % 4 + 1) for i in range(PROMPT))
    assert len(tokenizer(text).input_ids) == PROMPT
    dataset = Dataset.from_list([{"prompt": text[i % 4 :] + text[: i % 4]} for i in range(64)])
    tiny = {**case["model"], "moe_intermediate_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 128,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    train({**case, "model": tiny}, dataset, tokenizer)  # what libraries, trainer and data take, whatever the model
    gc.collect()
    before = status("VmRSS")
    train(case, dataset, tokenizer)
    return status("VmHWM") - before


def train(case: dict, dataset, tokenizer) -> None:
    """Three steps of a trainer."""
    from peft import LoraConfig

    config, _ = policy_config(case)
    torch.manual_seed(0)
    directory = tempfile.mkdtemp()
    trainer = DTRPOTrainer(
        model=AutoModelForCausalLM.from_config(config, trust_remote_code=False),
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        args=DTRPOConfig(
            output_dir=directory, per_device_train_batch_size=case.get("rows", ROWS), num_generations=GENERATIONS, max_completion_length=case.get("completion", COMPLETION),
            tokens_per_step=4, num_draws=case.get("draws", 1), max_steps=3, bf16=False, save_strategy="no", report_to="none",
            gradient_checkpointing=case.get("checkpointing", False), disable_tqdm=True, log_level="error", use_cpu=True,
            gradient_accumulation_steps=case.get("accumulation", 1), steps_per_generation=1 if case.get("accumulation") else None,
            generation_batch_size=None,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, target_modules="all-linear") if case.get("lora") else None,
    )  # fmt: skip
    trainer.add_callback(PeakCallback())
    trainer.train()


def run(name: str) -> dict:
    """Plan and measurement of one case."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, "--case", name], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr[-2000:]}")
    measured = json.loads(result.stdout.strip().splitlines()[-1])["bytes"]
    plan, footprint = planned(CASES[name])
    return {
        "case": name,
        "millions": round(footprint.parameters / 1e6, 1),
        "planned_mib": round(plan / 2**20),
        "measured_mib": round(measured / 2**20),
        "ratio": round(plan / measured, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES))
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.case:
        torch.set_num_threads(1)
        print(json.dumps({"bytes": measure(CASES[args.case])}))
        return
    rows = []
    for name in args.only:
        rows.append(row := run(name))
        values = (row[key] for key in ("case", "millions", "planned_mib", "measured_mib", "ratio"))
        print("| " + " | ".join(map(str, values)) + " |", flush=True)
    if args.json:
        print(json.dumps({"cases": rows}))


if __name__ == "__main__":
    main()
