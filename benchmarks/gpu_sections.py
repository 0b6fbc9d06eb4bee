"""Sections of `gpu.py` about correctness, whole trainers, a recipe and the plan."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
import yaml
from gpu_costs import published_answer, same
from gpu_shapes import (
    DEVICE,
    RANK,
    ROOT,
    Row,
    Size,
    clear,
    cuda_only,
    make_policy,
    make_prompts,
    policy_config,
    reset_peak,
    spec_of,
    use,
)
from transformers import AutoTokenizer

from trl_diffusion import DecodingConfig, DTRPOConfig, DTRPOTrainer, decode, tiny_policy_path
from trl_diffusion.plan.simulate import LAYERS, Footprint, Workload, simulate
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score


def tests(size: Size) -> Iterator[Row]:
    files = [
        str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()
    ]  # fmt: skip

    def run() -> dict:
        several = ["-n", "8"] if DEVICE == "cuda" and find_spec("xdist") else []
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *several, *files]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = result.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        print(result.stdout[-6000:], file=sys.stderr)
        return {"exit_code": result.returncode, "summary": lines[-1] if lines else "", "failed": failed}

    yield "pytest -m gpu", run


def gap(size: Size) -> Iterator[Row]:
    shape, spec = size.small, spec_of(size.small)
    config = DecodingConfig(
        size.gap_answer, temperature=1.0, strategy="threshold", threshold=0.9, tokens_per_step=2, sub_block_size=8
    )
    prompts = make_prompts(size.gap_rows, shape, size.prompt)
    seeds, few = list(range(len(prompts))), size.gap_rows // 4
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = make_policy(shape, dtype, sharp=True)
        batch = decode(model, prompts, config, spec, seeds)

        def gaps(model=model, batch=batch) -> dict:
            draw = EstimatorConfig(num_draws=8)
            states = ESTIMATORS["dtrpo"].states(batch, spec, seeds, draw)
            with torch.no_grad():
                logps, _ = score(model, pack(batch, spec, states), spec)
            scored = states.weights > 0
            values = (logps - batch.logps)[scored].abs()
            return {
                "mean": values.mean().item(),
                "max": values.max().item(),
                "tokens": len(values),
                "mean_logp": batch.logps[scored].mean().item(),
            }

        def alone(model=model, batch=batch) -> dict:
            one_by_one = decode(model, prompts[:few], config, spec, seeds[:few], batch_size=1).completions()
            return same(one_by_one, batch.completions()[:few])

        def loop(model=model) -> dict:
            greedy = replace(config, temperature=0.0, threshold=1.0, tokens_per_step=1)
            ours = decode(model, prompts[:few], greedy, spec).completions()
            return same(ours, [published_answer(model, prompt, spec, size.gap_answer) for prompt in prompts[:few]])

        def flex(model=model, gaps=gaps) -> dict:
            use(model, "flex_attention")
            return gaps()

        yield f"{name}, sdpa", gaps
        yield f"{name}, alone and in a batch", alone
        yield f"{name}, our decoding and the published loop", loop
        yield f"{name}, flex", cuda_only(flex)
        del model, batch, gaps, alone, loop, flex
        clear()


METRICS = ("loss", "grad_norm", "diffusion/recorded_gap/mean", "diffusion/recorded_gap/max", "diffusion/tokens_per_step",
           "time/rollout", "time/update", "memory/peak_gib")  # fmt: skip


def trained(model, steps: int, length: int, peft_config=None, **options) -> list[dict]:
    """What a trainer logs of its steps. The tokenizer is the embedded one; a larger vocabulary has tokens without a text."""
    from datasets import Dataset

    text = "".join(str(i % 4 + 1) for i in range(length))
    trainer = DTRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        args=DTRPOConfig(
            tempfile.mkdtemp(),
            **{
                "max_steps": steps, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
                "log_completions": False, "use_cpu": DEVICE == "cpu", **options,
            },
        ),
        train_dataset=Dataset.from_list([{"prompt": text[i % 4 :] + text[: i % 4]} for i in range(256)]),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left", trust_remote_code=False),
        peft_config=peft_config,
    )  # fmt: skip
    reset_peak()
    trainer.train()
    return [{name: row[name] for name in METRICS} for row in trainer.state.log_history if "loss" in row]


def trainer(size: Size) -> Iterator[Row]:
    embedded = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 16,
        "beta": 0.04,
        "tokens_per_step": 2,
    }
    for bf16 in (False, True):
        run = partial(trained, tiny_policy_path(), 3, 16, bf16=bf16, **embedded)
        yield f"embedded, {'bf16 autocast' if bf16 else 'float32'}", lambda run=run: dict(enumerate(run(), 1))
    shape = size.medium
    for implementation in ("sdpa", "flex_attention"):

        def run(implementation=implementation) -> dict:
            model = make_policy(shape, sharp=True)
            use(model, implementation)
            options = {
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": size.answer,
                "tokens_per_step": 2,
                "bf16": True,
                "gradient_checkpointing": True,
                "diffusion_spec": {"stop_token_ids": []},
            }
            return dict(enumerate(trained(model, 2, 128, **options), 1))

        yield f"1.5B-shaped, bfloat16, {implementation}", run if implementation == "sdpa" else cuda_only(run)
        clear()


def recipe_options() -> dict:
    """Options of `recipes/fast_dllm_v2.yaml` for the trainer, without the model's and the task's."""
    values = yaml.safe_load((ROOT / "recipes" / "fast_dllm_v2.yaml").read_text())
    known = DTRPOConfig.__dataclass_fields__
    left_out = ("output_dir", "max_steps", "save_steps", "log_completions", "report_to")
    return {name: value for name, value in values.items() if name in known and name not in left_out}


def recipe(size: Size) -> Iterator[Row]:
    from peft import LoraConfig

    options = {**recipe_options(), **dict(size.recipe), "bf16": True, "diffusion_spec": {"stop_token_ids": []}}
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS), task_type="CAUSAL_LM")

    def run() -> dict:
        return trained(make_policy(size.large, sharp=True), 1, size.prompt, lora, **options)[0]

    yield "recipes/fast_dllm_v2.yaml", run


def plan(size: Size) -> Iterator[Row]:
    config, spec = policy_config(size.large), spec_of(size.large)
    step = Workload(size.batch, 1, size.prompt, size.response, rollout_batch_size=1, share_prompts=False)
    options = {**recipe_options(), **dict(size.recipe)}
    of_recipe = Workload(
        options["per_device_train_batch_size"],
        options["num_generations"],
        size.prompt,
        options["max_completion_length"],
        rollout_batch_size=options["rollout_batch_size"],
        accumulation=options["gradient_accumulation_steps"],
    )

    def gib(footprint: Footprint) -> dict:
        update = footprint.weights + footprint.gradients + footprint.optimizer + footprint.activations
        rollout = footprint.weights + footprint.optimizer + footprint.rollout + footprint.cache
        return {"update_gib": update / 2**30, "rollout_gib": rollout / 2**30, "parameters": footprint.parameters}

    def of(work: Workload, rank: int | None) -> dict:
        return gib(simulate(config, spec, work, torch.bfloat16, lora_rank=rank))

    def of_rollout(work: Workload) -> dict:  # without an optimizer
        footprint = simulate(config, spec, work, torch.bfloat16)
        return {"rollout_gib": (footprint.weights + footprint.rollout + footprint.cache) / 2**30}

    yield "dtrpo, LoRA", partial(of, step, RANK)
    yield "dtrpo, every weight", partial(of, step, None)
    for count in size.batches:
        work = replace(
            step, prompt_length=size.prompt * 3 // 2, completion_length=size.answer, rollout_batch_size=count
        )
        yield f"rollout, batch {count}", partial(of_rollout, work)
    yield "recipes/fast_dllm_v2.yaml", partial(of, of_recipe, RANK)


# A function, and the most seconds that it may take.
