"""The shapes that `gpu.py` measures, policies of these shapes with random weights, and clocks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import decoding  # beside this file, like the next one
import torch
import training_cost
from transformers import AutoModelForCausalLM

from trl_diffusion import DiffusionSpec, get_spec
from trl_diffusion.plan.simulate import LAYERS
from trl_diffusion.policies.attention import enable_plans
from trl_diffusion.policies.families.configs import Fast_dLLM_QwenConfig


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
        layers (`tuple[int, ...]`): numbers of layers of `layers`.
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
    layers: tuple[int, ...] = (2, 4, 8, 28)


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
        layers=(1, 2),
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


def prepared(shape: Shape, lora: bool, checkpointing: bool = True) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A policy that is ready for `training_cost.run_step`."""
    model = make_policy(shape)
    if lora:
        model = adapted(model)
        model.enable_input_require_grads()
    if checkpointing:
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
