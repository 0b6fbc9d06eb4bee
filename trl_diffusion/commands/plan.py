"""
What fits on which GPU, from a model's config alone: no weights, no GPU.

    trl-diffusion plan GSAI-ML/LLaDA-8B-Instruct --gpus 8 --memory 80
    trl-diffusion plan MODEL --gpus 1 --memory 24 --config llada_24gb
    trl-diffusion plan MODEL --gpus 8 --memory 80 --completion_length 1024 --num_draws 8 --json
    trl-diffusion plan MODEL --gpus 8 --prompts 7473 --epochs 2                  # hours, too

MODEL is a directory or a hub id. Options that a recipe sets are taken from `--config`; the command line wins. Figures are
those of the busiest GPU: an update (weights, gradients, optimizer state, reference, buffers, activations) or a rollout
(weights, optimizer state, reference, cache and its largest pass), whichever needs more, plus 1 GiB for CUDA itself.

Times are arithmetic: floating-point operations, which are counted, divided by `--tflops`, or weights read by `--bandwidth`,
whichever is slower. Rewards, communication, data and small batches that do not reach such rates come on top.

What `train` would refuse is refused here, as far as configs can tell.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..plan.cost import Machine, RolloutCost, rollout_cost
from ..plan.layers import simulate_layers
from ..plan.published import find_config
from ..plan.simulate import Footprint, Workload
from ..plan.strategies import Plan, make_plans
from ..policies.limits import check_layers, context_length
from ..policies.loading import needs_tokenizer
from ..policies.spec import DiffusionSpec, check_spec, get_spec
from ..policies.tiny import resolve_embedded
from ..scoring.estimators import ESTIMATORS, EstimatorConfig
from ..utils import load_yaml, read_mapping
from . import recipes_path
from .direct import run_directly
from .parser import PROG, Parser, add_config_option


GIB = 2**30
# Our options, and the names that recipes have for them.
FROM_RECIPE = {
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "num_generations": "num_generations",
    "completion_length": "max_completion_length",
    "tokens_per_step": "tokens_per_step",
    "rollout_batch_size": "rollout_batch_size",
    "num_draws": "num_draws",
    "estimator": "estimator",
    "beta": "beta",
    "lora_rank": "lora_r",
    "checkpointing": "gradient_checkpointing",
    "diffusion_spec": "diffusion_spec",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, with the options of the command line by default; see [`run_directly`]."""
    return run_directly(_parser(), arguments, _run)


def _run(options: argparse.Namespace) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        footprints, plans, rollout = _plan(_with_recipe(options))
    memory = options.memory * GIB
    if options.json:
        rows = [{**_row(plan), "fits": plan.fits(memory)} for plan in plans]
        footprint = {k: asdict(v) for k, v in footprints.items()}
        print(json.dumps({"footprints": footprint, "plans": rows, "time": _times(footprints, rollout, options)}))
    else:
        _print(footprints["full"], plans, options)
        _print_times(_times(footprints, rollout, options), options)


def _plan(options: argparse.Namespace) -> tuple[dict[str, Footprint], list[Plan], RolloutCost]:
    config, is_read = find_config(resolve_embedded(options.model))
    if not is_read:
        print(f"{options.model} cannot be read here; its sizes are those that the package knows.", file=sys.stderr)
    spec = spec_for_plan(config, read_mapping(options.diffusion_spec, "diffusion_spec"))
    if options.steps_per_block is not None:
        options.tokens_per_step = -(-spec.block_size // options.steps_per_block)
    _check_work(config, spec, options)
    work = Workload(
        batch_size=options.batch_size,
        num_generations=options.num_generations,
        prompt_length=options.prompt_length,
        completion_length=options.completion_length,
        estimator=EstimatorConfig(name=options.estimator, num_draws=options.num_draws, num_blocks=options.num_blocks),
        tokens_per_step=options.tokens_per_step,
        rollout_batch_size=options.rollout_batch_size,
        checkpointing=options.checkpointing,
        accumulation=options.accumulation,
    )
    footprints = {
        "mixed": simulate_layers(config, spec, work, torch.float32, autocast=True),
        "full": simulate_layers(config, spec, work, torch.bfloat16),
        "lora": simulate_layers(config, spec, work, torch.bfloat16, lora_rank=options.lora_rank),
    }
    plans = make_plans(
        footprints["mixed"], footprints["full"], footprints["lora"], options.gpus, options.beta, not options.no_gather
    )
    return footprints, plans, rollout_cost(config, spec, work, footprints["full"], options.answer_length)


def spec_for_plan(config: PretrainedConfig, fields: dict[str, Any]) -> DiffusionSpec:
    """The spec of a policy that `train` takes; the mask token that only a family's tokenizer knows is any, as it has no size."""
    check_layers(config)
    if needs_tokenizer(config, fields):
        fields = {**fields, "mask_token_id": config.get_text_config().vocab_size - 1}
    try:
        spec = get_spec(config, fields)
    except ValueError as error:
        raise ValueError(f"{error} (Of this command: --diffusion_spec mask_token_id:ID+block_size:N.)") from error
    check_spec(spec, config)
    return spec


def _check_work(config: PretrainedConfig, spec: DiffusionSpec, options: argparse.Namespace) -> None:
    """Raises a `ValueError` if the policy does not take such prompts and responses, or groups do not fill a rollout."""
    context, limit = context_length(config)
    end = spec.canvas_end(options.prompt_length, options.completion_length)
    if context is not None and end > context:
        raise ValueError(
            f"A prompt of {options.prompt_length} tokens with {options.completion_length} new ones, in whole blocks of "
            f"{spec.block_size}, makes {end} positions, more than the policy's context of {context} (`{limit}`). Lower "
            "`--prompt_length` or `--completion_length`."
        )
    responses = options.batch_size * options.gpus * options.accumulation
    if responses % options.num_generations:
        raise ValueError(
            f"A rollout of {responses} responses (`--batch_size` {options.batch_size} x {options.gpus} GPUs x `--accumulation` "
            f"{options.accumulation}) does not divide into groups of {options.num_generations} (`--num_generations`)."
        )


def _times(footprints: dict[str, Footprint], rollout: RolloutCost, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a rollout and of a batch of an update on one GPU, and hours of a run on all of them."""
    machine = Machine(options.tflops * 1e12, options.bandwidth * 1e12)
    times = {"rollout_seconds": rollout.seconds(machine)}
    for name in ("full", "lora"):
        footprint = footprints[name]
        flops = footprint.update_flops + (footprint.score_flops if options.beta else 0)  # the reference scores, too
        times[f"update_seconds_{name}"] = flops / machine.flops
    if options.prompts is not None:
        responses = options.prompts * options.num_generations * options.epochs / options.gpus / 3600
        times["rollout_hours"] = times["rollout_seconds"] * responses / options.rollout_batch_size
        for name in ("full", "lora"):
            batches = responses * options.iterations / options.batch_size
            times[f"update_hours_{name}"] = times[f"update_seconds_{name}"] * batches
    return times


def _print_times(times: dict[str, float], options: argparse.Namespace) -> None:
    print(
        f"\nBy arithmetic, at {options.tflops:g} TFLOP/s and {options.bandwidth:g} TB/s: a rollout of "
        f"{options.rollout_batch_size} responses takes {times['rollout_seconds']:.1f} s, a batch of {options.batch_size} in an "
        f"update {times['update_seconds_full']:.2f} s (all weights) or {times['update_seconds_lora']:.2f} s (LoRA)."
    )
    if options.prompts is not None:
        print(
            f"{options.prompts} prompts with {options.num_generations} responses each, {options.epochs:g} epochs, on "
            f"{options.gpus} GPUs: rollouts {times['rollout_hours']:.1f} h, updates {times['update_hours_full']:.1f} h (all "
            f"weights) or {times['update_hours_lora']:.1f} h (LoRA)."
        )


def _with_recipe(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in what the command line leaves open: from the recipe, or else the default."""
    recipe = {}
    if options.config:
        recipe = load_yaml(options.config)
        if not isinstance(recipe, dict) or not recipe.keys() & {
            *FROM_RECIPE.values(),
            "max_steps",
            "model_name_or_path",
        }:
            raise ValueError(f"{options.config} holds no options of a recipe.")
    given = options.tokens_per_step is not None
    options.steps_per_block = None if given else recipe.get("steps_per_block")
    for name, default in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, recipe.get(FROM_RECIPE.get(name), default))
    options.num_blocks = recipe.get("num_scored_blocks") if options.estimator == "dtrpo" else None
    options.iterations = recipe.get("num_iterations") or 1
    for name in ("gpus", "batch_size", "accumulation", "prompt_length", "completion_length", "rollout_batch_size",
                 "num_generations", "tokens_per_step", "steps_per_block", "num_blocks", "iterations", "lora_rank"):  # fmt: skip
        value, least = getattr(options, name), 2 if name == "num_generations" else 1
        if value is None and name in ("steps_per_block", "num_blocks"):
            continue
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`--{name}` must be a whole number of at least {least}, got {value!r}.")
    for name in ("memory", "tflops", "bandwidth", "epochs", "prompts", "answer_length"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`--{name}` must be above 0 and finite, got {value}.")
    if not isinstance(options.beta, int | float) or not 0 <= options.beta < math.inf:
        raise ValueError(f"`--beta` must be 0 or a finite number above it, got {options.beta!r}.")
    if (options.answer_length or 0) > options.completion_length:
        raise ValueError(
            f"`--answer_length` is {options.answer_length}, but responses have {options.completion_length} tokens at most "
            "(`--completion_length`)."
        )
    if recipe:
        _check_recipe(options.config, recipe)
    options.trains = what_it_trains(recipe)
    return options


def _check_recipe(path: str, recipe: dict[str, Any]) -> None:
    """Raises a `ValueError` if `train` has no such options, or refuses their numbers."""
    from ..trainer.checks import check_given
    from ..utils import check_options
    from . import train  # here, since it brings TRL along

    check_options(path, set(recipe) - {"env"}, train.KINDS)
    check_given(recipe)


DEFAULTS = {
    "batch_size": 4,
    "accumulation": 8,
    "num_generations": 8,
    "prompt_length": 256,
    "completion_length": 256,
    "tokens_per_step": 1,
    "rollout_batch_size": 32,
    "num_draws": 1,
    "estimator": "dtrpo",
    "beta": 0.0,
    "lora_rank": 64,
    "checkpointing": True,
    "diffusion_spec": None,
}
# What these options mean. What is not given is taken from `--config`, or else is the default.
_HELP = {
    "batch_size": "responses that a GPU trains on at once",
    "accumulation": "such batches for each update",
    "num_generations": "responses to each prompt",
    "prompt_length": "tokens of a prompt",
    "completion_length": "most tokens of a response",
    "tokens_per_step": "positions unmasked at a step",
    "rollout_batch_size": "responses that a GPU decodes at once",
    "num_draws": "denoising steps that are drawn per block, or random masks per response",
    "estimator": "which states of a response an update scores",
    "beta": "weight of the distance to a reference; 0 for none",
    "lora_rank": "rank of the adapter, for the plans with LoRA",
    "diffusion_spec": "fields of `DiffusionSpec` that the model lacks, like block_size:32, or JSON",
}


def _parser() -> Parser:
    parser = Parser(f"{PROG} plan", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="directory or hub id; only its config is read")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of a GPU")
    add_config_option(parser)
    parser.add_argument(
        "--no_gather", action="store_true", help="under ZeRO-3, rollouts do not gather all weights on each GPU"
    )
    parser.add_argument("--prompts", type=int, help="rows to train on, for the hours of a run")
    parser.add_argument("--epochs", type=float, default=1.0, help="times that each row is answered and trained on")
    parser.add_argument(
        "--answer_length", type=int, help="tokens after which responses stop, for the time; default all"
    )
    parser.add_argument(
        "--tflops", type=float, default=400.0, help="TFLOP/s that a GPU keeps up; default 400 (an H100)"
    )
    parser.add_argument("--bandwidth", type=float, default=2.5, help="TB/s from its memory; default 2.5 (an H100)")
    parser.add_argument("--json", action="store_true", help="one JSON object, in bytes")
    kinds = {"beta": float, "estimator": str, "diffusion_spec": str}
    for name, default in DEFAULTS.items():
        if name == "checkpointing":
            parser.add_argument(
                "--no_checkpointing", dest=name, action="store_false", default=None, help="no gradient checkpointing"
            )
        else:
            choices = list(ESTIMATORS) if name == "estimator" else None
            text = _HELP[name] + ("" if default is None else f" (default: {default})")
            parser.add_argument(f"--{name}", type=kinds.get(name, int), choices=choices, help=text)
    return parser


def _row(plan: Plan) -> dict:
    values = {key: value for key, value in asdict(plan).items() if key != "parts"}
    return {**values, "update_peak": plan.update_peak, "rollout_peak": plan.rollout_peak, "peak": plan.peak}


def _print(full: Footprint, plans: list[Plan], options: argparse.Namespace) -> None:
    experts = (
        f", of which a token uses {full.used / 1e9:.2f} billion; {2 * full.experts / GIB:.1f} GiB in bfloat16 are experts, which 4 bits "
        "leave as they are"
    )
    print(
        f"{options.model}: {full.parameters / 1e9:.2f} billion weights{experts if full.experts else ''}. An update packs {full.packed_tokens} tokens for "
        f"{options.batch_size} responses and computes logits at {full.scored_tokens} ({full.logits / GIB:.2f} GiB)."
    )
    names = ("weights", "gradients", "optimizer", "reference", "buffers", "activations", "rollout", "peak")
    print(f"GiB on each of {options.gpus} GPUs of {options.memory:g}:\n")
    print(f"{'':22}" + "".join(f"{name:>12}" for name in names) + "   fits")
    for plan in plans:
        fits = "yes" if plan.fits(options.memory * GIB) else "no"
        numbers = "".join(f"{getattr(plan, name) / GIB:12.1f}" for name in names)
        host = f"   (main memory: {plan.host / GIB:.0f} GiB)" if plan.host else ""
        print(f"{plan.name:22}{numbers}   {fits}{host}")
    print(f"\n{advice(plans, options.memory * GIB, options.gpus, options.model, options.config, options.trains)}")


def what_it_trains(recipe: dict[str, Any]) -> str | None:
    """What a recipe trains, as the names of plans end. `None` without a recipe."""
    if not recipe:
        return None
    return ("QLoRA" if recipe.get("load_in_4bit") else "LoRA") if recipe.get("use_peft") else "full"


_ADAPTERS = {"full": "", "LoRA": " --use_peft", "QLoRA": " --use_peft --load_in_4bit"}


def advice(
    plans: list[Plan], memory: float, gpus: int, model: str, recipe: str | None = None, trains: str | None = None
) -> str:
    """
    The first plan that fits, and the command that trains with it.

    Args:
        plans (`list[Plan]`): the plans, the simplest first.
        memory (`float`): bytes of a GPU.
        gpus (`int`): number of GPUs.
        model (`str`): what is trained.
        recipe (`str`, *optional*): path of the recipe.
        trains (`str`, *optional*): `"full"`, `"LoRA"` or `"QLoRA"`, if a recipe says what is trained.
    """
    fitting = [plan for plan in plans if plan.fits(memory)]
    wanted = [plan for plan in fitting if trains in (None, plan.name.rpartition(", ")[2])]
    if fitting and not wanted:
        others = "; ".join(plan.name for plan in fitting)
        return f"Nothing fits of what the recipe trains ({trains}). These fit: {others}."
    if not wanted:
        return "Nothing fits. Lower --batch_size, --rollout_batch_size or --completion_length, or use more GPUs."
    first = wanted[0]
    if recipe is None:
        words = f"{PROG} train --model_name_or_path {model}" + _ADAPTERS[first.name.rpartition(", ")[2]]
    else:
        words = f"{PROG} train --config {Path(recipe).stem if Path(recipe).parent == recipes_path() else recipe}"
    words += f" --accelerate_config {first.recipe}" * (gpus > 1 or first.recipe != "ddp")
    words += f" --num_processes {gpus}" * (gpus < 8 and "--accelerate_config" in words)  # the engines start 8
    return f"The first that fits{' and trains as the recipe does' if trains else ''}: {first.name}. `{words}` trains with it."


if __name__ == "__main__":
    sys.exit(main())
