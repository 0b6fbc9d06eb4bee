"""
What only a GPU can show: correctness, costs, rollouts and whole trainer steps on CUDA, with random weights of real shapes.

    python benchmarks/gpu.py --json
    python benchmarks/gpu.py --only training decoding --seconds 300 --json
    python benchmarks/gpu.py --size tiny --json      # every section on small shapes, on a CPU, too

Each section runs in a process of its own with a time limit; what it has measured until then counts, and the others go on.

- `tests`: the tests that need a CUDA device (`pytest -m gpu`).
- `gap`: packed scores beside the log-probabilities recorded while decoding, in nats, by SDPA and by FlexAttention, in float32
  and bfloat16, on a 0.5B-shaped policy; and how many answers are the same alone and in a batch.
- `trainer`: whole `DTRPOTrainer` steps on the embedded policy and on a 1.5B-shaped one.
- `training`: an update of a 7B-shaped policy with LoRA beside autoregressive SFT, block-diffusion SFT, an ELBO with 8 masks and the
  exact trajectory: the steps of `training_cost.py`, under autocast and with gradient checkpointing, as the recipes run.
- `full`: some of these with every weight trained, in bfloat16 (weights, gradients and AdamW's state).
- `attention`: dTRPO's step with SDPA and with FlexAttention, short and long responses, and what a new shape costs.
- `decoding`: rollouts of the 7B-shaped policy beside the loop that Fast-dLLM v2 published, and beside bare forward passes.
- `recipe`: one optimizer step with the options of `recipes/fast_dllm_v2.yaml`, rollout included.
- `plan`: what `python -m trl_diffusion.plan` says about the memory of these. Needs no GPU and runs beside the others.

A value that was measured several times is given as median, smallest and largest. Peaks are those of the allocator
(`torch.cuda.max_memory_allocated`), without the CUDA context. Without a CUDA device only `--size tiny` runs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import decoding  # beside this file, like the next two
import published
import torch
import training_cost
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import DecodingConfig, DiffusionSpec, DTRPOConfig, DTRPOTrainer, decode, get_spec, tiny_policy_path
from trl_diffusion.plan.simulate import LAYERS, Footprint, Workload, simulate
from trl_diffusion.policies.attention import enable_plans
from trl_diffusion.policies.families.configs import Fast_dLLM_QwenConfig
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score


ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, RANK = 32, 64

Row = tuple[str, Callable[[], dict]]  # a name, and what measures it


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 backbone."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Size:
    """
    What is measured.

    Attributes:
        small, medium, large ([`Shape`]): policies of `gap`, of `trainer`, and of everything else.
        prompt, response, batch (`int`): tokens of a prompt and of a response, responses of an update.
        long (`tuple[tuple[int, int, int], ...]`): prompt, response and batch for `attention`.
        answer (`int`): tokens of a decoded response.
        batches (`tuple[int, ...]`): responses decoded at once.
        gap_rows, gap_answer (`int`): responses of `gap`, and their tokens.
        recipe (`dict`): options that replace those of the recipe.
    """

    small: Shape
    medium: Shape
    large: Shape
    prompt: int = 256
    response: int = 512
    batch: int = 4
    long: tuple[tuple[int, int, int], ...] = ((256, 512, 4), (512, 2048, 1), (1024, 4096, 1))
    answer: int = 96
    batches: tuple[int, ...] = (1, 16, 64)
    gap_rows: int = 16
    gap_answer: int = 128
    recipe: tuple[tuple[str, int], ...] = ()


TINY = Shape(64, 128, 2, 4, 2, 512)
SIZES = {
    "7b": Size(
        Shape(896, 4864, 24, 14, 2, 151_936),
        Shape(1536, 8960, 28, 12, 2, 151_936),
        Shape(3584, 18_944, 28, 28, 4, 152_064),
    ),
    "tiny": Size(
        TINY,
        TINY,
        TINY,
        prompt=32,
        response=64,
        batch=2,
        long=((32, 64, 2), (32, 128, 1)),
        answer=32,
        batches=(1, 4),
        gap_rows=4,
        gap_answer=64,
        recipe=(("max_completion_length", 64), ("gradient_accumulation_steps", 2)),
    ),
}


# ------------------------------------------------------------------------------------------------------- policies


def policy_config(shape: Shape) -> Fast_dLLM_QwenConfig:
    """The config of a checkpoint of Fast-dLLM v2 with these sizes; the last token is the mask, none stops."""
    return Fast_dLLM_QwenConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=False,
        max_position_embeddings=32_768,
        mask_token_id=shape.vocabulary - 1,
        bd_size=BLOCK,
        eos_token_id=None,
    )


def spec_of(shape: Shape) -> DiffusionSpec:
    return get_spec(policy_config(shape), {"stop_token_ids": ()})


def make_policy(shape: Shape, dtype: torch.dtype = torch.bfloat16, sharp: bool = False) -> torch.nn.Module:
    """
    Random weights, made on the device.

    Args:
        shape ([`Shape`]): sizes.
        dtype (`torch.dtype`): of the weights.
        sharp (`bool`): whether its distributions are as far from uniform as those of a language model, for what looks at
            probabilities. The standard deviations keep attention and layers moderate, and make that of the logits 8.
    """
    config = policy_config(shape)
    if sharp:
        config.initializer_range = 1.6 * shape.hidden**-0.5
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if sharp:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(5.0)
    enable_plans(model)
    return model.eval()


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    """With LoRA on all linear layers, as in the recipes; the model inside PEFT's wrapper."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS))).get_base_model()


def prepared(shape: Shape, lora: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A policy that is ready for `training_cost.run_step`."""
    model = make_policy(shape)
    if lora:
        model = adapted(model)
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-5, fused=DEVICE == "cuda" or None)


def use(model: torch.nn.Module, implementation: str) -> None:
    """Changes the attention implementation."""
    model.set_attn_implementation(implementation)
    enable_plans(model)


def make_prompts(count: int, shape: Shape, length: int) -> list[list[int]]:
    """Random prompts of half to one and a half times this length; a single one has it."""
    generator = torch.Generator().manual_seed(1)
    lengths = [length * (2 + row % 5) // 4 for row in range(count)] if count > 1 else [length]
    return [torch.randint(0, shape.vocabulary - 1, (n,), generator=generator).tolist() for n in lengths]


def make_batches(size: Size, prompt: int, response: int, batch: int) -> dict[bool, object]:
    """What `training_cost.run_step` takes: prompts of their own, and one prompt, twice as long, that all share."""
    args = SimpleNamespace(
        vocab_size=size.large.vocabulary,
        batch_size=batch,
        response_length=response,
        block_size=BLOCK,
        device=DEVICE,
    )
    make = training_cost.make_batch
    return {False: make(args, prompt, False), True: make(args, 2 * prompt, True)}


# ---------------------------------------------------------------------------------------------------- measurements


def clear() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, float]:
    """Most memory since the last reset, in GiB."""
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if DEVICE == "cuda" else {}


def timed(function: Callable) -> tuple[float, object]:
    return decoding.timed(function, SimpleNamespace(device=DEVICE))


def cuda_only(function: Callable[[], dict]) -> Callable[[], dict]:
    """Says that it was left out where there is no CUDA device."""
    return function if DEVICE == "cuda" else lambda: {"skipped": "needs a CUDA device"}


# -------------------------------------------------------------------------------------------------------- sections


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


def same(ours: list[list[int]], theirs: list[list[int]]) -> dict:
    """How many answers are the same, token by token, and how long they are so on average."""
    lengths = [
        next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        for one, other in zip(ours, theirs, strict=True)
    ]
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
    return {"answers": len(ours), "same": equal, "same_tokens_in_front": statistics.mean(lengths)}


def published_answer(model, prompt: list[int], spec: DiffusionSpec, length: int) -> list[int]:
    """By the loop that Fast-dLLM v2 published."""
    ids = torch.tensor([prompt], device=DEVICE)
    return published.fast_dllm_v2(model, ids, length, mask=spec.mask_token_id, stop=-1)[0, len(prompt) :].tolist()[
        :length
    ]


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


def one_step(kind: str, model, optimizer, batches, spec, lora: bool, seed: int) -> dict:
    """An update of `training_cost.py`, with its time and memory."""
    reset_peak()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=lora):
        seconds = training_cost.run_step(kind, model, optimizer, batches, spec, seed)
    return {"seconds": seconds, **peak()}


def training(size: Size) -> Iterator[Row]:
    rounds = {"exact": 1, "elbo8": 2}
    yield from steps_in_turn(size, list(training_cost.KINDS), rounds, lora=True)


def full(size: Size) -> Iterator[Row]:
    kinds = ["ar_sft", "ar_sft_lean", "block_sft", "dtrpo"]
    yield from steps_in_turn(size, kinds, {}, lora=False)


def steps_in_turn(size: Size, kinds: list[str], rounds: dict[str, int], lora: bool) -> Iterator[Row]:
    model, optimizer = prepared(size.large, lora)
    spec, batches = spec_of(size.large), make_batches(size, size.prompt, size.response, size.batch)
    for seed in range(6):  # the first round warms up
        for kind in kinds:
            if seed == 0 and kind in rounds:
                continue
            if seed <= rounds.get(kind, 5):
                name = kind if seed else f"{kind}, first call"
                yield name, partial(one_step, kind, model, optimizer, batches, spec, lora, seed)


def attention(size: Size) -> Iterator[Row]:
    model, optimizer = prepared(size.large, lora=True)
    spec = spec_of(size.large)

    def step(implementation: str, prompt: int, response: int, batch: int, seed: int) -> dict:
        use(model, implementation)
        batches = make_batches(size, prompt, response, batch)
        return one_step("dtrpo", model, optimizer, batches, spec, True, seed)

    for prompt, response, batch in size.long:
        for seed in range(4):
            for implementation in ("sdpa", "flex_attention"):
                call = "" if seed else ", first call"
                name = f"{implementation}, {batch} of {prompt} + {response}{call}"
                run = partial(step, implementation, prompt, response, batch, seed)
                yield name, run if implementation == "sdpa" else cuda_only(run)
    # Batches of a run have a shape each: rows of other lengths, in the same bucket of FlexAttention.
    for shorter in range(1, 5):
        for implementation in ("sdpa", "flex_attention"):
            for call in ("first call", "second call"):
                run = partial(step, implementation, size.prompt - 4 * shorter, size.response, size.batch, 0)
                name = f"{implementation}, a shape of its own, {call}"
                yield name, run if implementation == "sdpa" else cuda_only(run)


def rollouts(size: Size) -> Iterator[Row]:
    shape, spec = size.large, spec_of(size.large)
    model = make_policy(shape, sharp=True)
    answer = size.answer

    def ours(count: int, per_step: int, temperature: float = 0.0, cudnn: bool = True) -> dict:
        prompts, steps = make_prompts(count, shape, size.prompt), []
        config = DecodingConfig(
            answer,
            temperature=temperature,
            strategy="threshold",
            threshold=1.0,
            tokens_per_step=per_step,
            sub_block_size=8,
        )
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        reset_peak()
        with contextlib.nullcontext() if cudnn else sdpa_kernel(backends):
            seconds, batch = timed(
                lambda: decode(model, prompts, config, spec, list(range(count)), on_step=lambda _: steps.append(0))
            )
        if per_step == 1:
            kept[count] = batch.completions()
        tokens = int(batch.completion_lengths.sum())
        return {
            "tokens_per_second": tokens / seconds,
            "ms_per_step": 1000 * seconds / len(steps),
            "steps": len(steps),
            **peak(),
        }

    def theirs(count: int) -> dict:
        prompts = make_prompts(count, shape, size.prompt)

        reset_peak()
        seconds, found = timed(lambda: [published_answer(model, prompt, spec, answer) for prompt in prompts])
        return {"tokens_per_second": sum(map(len, found)) / seconds, **same(kept[count], found), **peak()}

    @torch.no_grad()
    def bare(count: int) -> dict:
        ids = torch.zeros(count, BLOCK, dtype=torch.long, device=DEVICE)
        seconds, _ = timed(lambda: model.model(input_ids=ids, use_cache=False))
        return {"ms": 1000 * seconds}

    kept: dict[int, list[list[int]]] = {}
    for seed in range(3):
        call = "" if seed else ", first call"
        for count in size.batches:
            yield f"bare forward pass of {count} blocks{call}", partial(bare, count)
            yield f"batch {count}, 4 tokens a step{call}", partial(ours, count, 4)
            if seed < 2:
                yield f"batch {count}, a token a step{call}", partial(ours, count, 1)
        yield f"published loop, batch 1{call}", partial(theirs, 1)
    largest = size.batches[-1]
    for seed in range(2):
        call = "" if seed else ", first call"
        yield f"batch {largest}, 4 tokens a step, sampled{call}", partial(ours, largest, 4, 1.0)
        yield (
            f"batch {largest}, 4 tokens a step, without cuDNN{call}",
            cuda_only(partial(ours, largest, 4, 0.0, False)),
        )


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
SECTIONS: dict[str, tuple[Callable[[Size], Iterator[Row]], int]] = {
    "tests": (tests, 100),
    "gap": (gap, 90),
    "trainer": (trainer, 75),
    "training": (training, 100),
    "decoding": (rollouts, 100),
    "attention": (attention, 75),
    "recipe": (recipe, 90),
    "full": (full, 45),
    "plan": (plan, 400),
}


# ----------------------------------------------------------------------------------------------------------- runs


def run_section(name: str, size: Size) -> None:
    """In a process of its own: prints what is found, a line of JSON for each row."""
    function, _ = SECTIONS[name]
    sys.stdin.readline()  # the GPU is another section's until then
    for row, measure in function(size):
        try:
            found = measure()
        except Exception as error:  # the rows after it may be fine
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            clear()
        print(json.dumps({"row": row, "found": found}), flush=True)


class Section:
    """A section in a process of its own, which imports what it needs and waits for `start`. Rows are read as they come."""

    def __init__(self, name: str, size: str):
        self.name, self.rows = name, []
        self.errors = tempfile.TemporaryFile("w+")
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if name == "plan" else {}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--section", name, "--size", size],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env={**os.environ, **hidden},
            start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith('{"row"'):
                self.rows.append(json.loads(line))
                print(f"{self.name}: {line.strip()}", flush=True)

    def start(self) -> Section:
        self.begin = time.perf_counter()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self, seconds: float) -> dict:
        """What was found, after waiting for this long at most."""
        status = "done"
        try:
            self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} seconds"
            self.stop()
        self.reader.join(5)
        found = {"status": status, "seconds": time.perf_counter() - self.begin, "rows": merged(self.rows)}
        if self.process.returncode not in (0, -signal.SIGKILL) or status != "done":
            self.errors.seek(0)
            found["stderr"] = self.errors.read()[-3000:]
            found["status"] = status if status != "done" else f"failed with code {self.process.returncode}"
        return found


def run_all(names: list[str], size: str, seconds: float) -> Iterator[tuple[str, dict]]:
    """The sections one after another, in the order given; the next one imports meanwhile. `plan` runs beside them. None is
    left behind when this ends early."""
    running: list[Section] = []
    try:
        yield from run_in_turn(names, size, seconds, running)
    finally:
        for section in running:
            section.stop()


def run_in_turn(names: list[str], size: str, seconds: float, running: list[Section]) -> Iterator[tuple[str, dict]]:
    def section_of(name: str) -> Section:
        running.append(Section(name, size))
        return running[-1]

    end, patience = time.perf_counter() + seconds, 1 if DEVICE == "cuda" else 10
    planning = section_of("plan").start() if "plan" in names else None
    waiting = [name for name in names if name != "plan"]
    if DEVICE == "cpu" and size != "tiny":
        yield from ((name, {"status": "skipped: needs a CUDA device; try `--size tiny`"}) for name in waiting)
        waiting = []
    coming = section_of(waiting[0]) if waiting else None
    for name, following in zip_longest(waiting, waiting[1:]):
        if end - time.perf_counter() < 10:
            yield name, {"status": "skipped: no time was left"}
            continue
        section = coming.start()
        coming = section_of(following) if following else None
        yield name, section.result(min(end - time.perf_counter(), patience * SECTIONS[name][1]))
    if planning:
        yield "plan", planning.result(end - time.perf_counter())


def merged(rows: list[dict]) -> dict[str, dict]:
    """Rows of the same name as one: median, smallest and largest of their numbers."""
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["row"], []).append(row["found"])
    return {name: found[0] if len(found) == 1 else together(found) for name, found in by_name.items()}


def together(found: list[dict]) -> dict:
    whole = {}
    for key in dict.fromkeys(key for values in found for key in values):
        values = [row[key] for row in found if key in row]
        if all(isinstance(value, int | float) for value in values):
            spread = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "count": len(values),
            }
            whole[key] = rounded(spread) if spread["min"] != spread["max"] else values[0]
        else:
            whole[key] = values[0]
    return whole


def rounded(value):
    """Floats with five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def machine() -> dict:
    about = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "peft")},
    }
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": properties.name,
            "gpu_gib": properties.total_memory / 2**30,
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--size", choices=list(SIZES), default="7b")
    parser.add_argument("--seconds", type=float, default=480, help="time for everything; what is left over is skipped")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object on the last line")
    parser.add_argument("--output", type=Path, help="file for that object, rewritten after each section")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        run_section(args.section, SIZES[args.size])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and stop the sections
    results: dict = {"machine": machine(), "size": {"name": args.size, **asdict(SIZES[args.size])}, "sections": {}}
    for name, found in run_all(args.only, args.size, args.seconds):
        results["sections"][name] = found
        print(f"{name}: {found['status']} ({found.get('seconds', 0):.0f} s)", flush=True)
        if args.output:
            args.output.write_text(json.dumps(rounded(results)))
    if args.json:
        print(json.dumps(rounded(results)))


if __name__ == "__main__":
    main()
