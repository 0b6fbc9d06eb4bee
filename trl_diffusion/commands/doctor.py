"""
Looks at this machine, and tries a run on random weights of the real shapes: nothing is fetched, and nothing is kept.

    trl-diffusion doctor                                        # the embedded policy
    trl-diffusion doctor --config llada_24gb                    # two of its 32 layers, whole embeddings
    trl-diffusion doctor --config my_run.yaml --layers 4 --prompt_length 400

It says which versions and devices there are, which attention kernels work, and whether DeepSpeed can be imported. Then it runs a rollout
and an update with the shapes and options of `--config`, a YAML file of `train`, `sft` or `iterate`: with one layer and with `--layers`.
Prompts are random tokens. Rows and lengths are reduced until both fit into `--seconds`; it says to what. Its memory is compared with what
`trl-diffusion plan` gives for the same shapes. Seconds of all layers lie on a line through both measurements: an extrapolation.

Exit code 2 says that something is wrong. `--dry_run` of a command looks at its data and rewards.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch

from ..decoding.config import DecodingConfig
from ..fields import check_at_least, check_within
from ..plan.fit import free_memory, gpu_memory
from ..plan.layers import cut
from ..plan.published import find_config
from ..plan.simulate import LAYERS, Workload
from ..policies.limits import context_length
from ..policies.lora import empty_model
from ..quiet import hush_commands
from ..rehearsal.findings import Findings
from ..rehearsal.machine import GIB, check_deepspeed, check_devices, check_kernels, check_packages
from ..rehearsal.smoke import Result, Trial, end_weights, try_out
from ..scoring.estimators import EstimatorConfig
from ..trainer.options import rehearsing
from ..utils import use_all_cores
from . import sft, train
from .dry_needs import Target, dtype_of
from .dry_options import all_options
from .dry_run import read
from .interrupt import ending_in_a_line
from .iterate import Rounds, arguments_of
from .lines import duration, in_words
from .opening import find_tokenizer, is_random, new_adapter, policy_path, random_config
from .parser import PROG, Parser, add_config_option
from .plan import spec_for_plan
from .settings import TRAINING, TUNING


SPARE = 0.9  # share of the free memory that is used


def main(arguments: list[str] | None = None) -> int:
    """
    Runs the command.

    Args:
        arguments (`list[str]`, *optional*): what follows the name of the command. Defaults to `sys.argv`.

    Returns:
        `int`: exit code: 0, or 2 if something is wrong.
    """
    options = _parser().parse_args(arguments)
    hush_commands()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    findings = Findings()
    with ending_in_a_line(), rehearsing(1):
        with findings.part("options"):
            use_all_cores()
            for name in ("layers", "prompt_length"):
                check_at_least(f"--{name}", getattr(options, name))
            check_within("--seconds", options.seconds, "[0, inf)")
        sound = not findings.mistakes
        check_packages(findings)
        check_devices(findings)
        check_deepspeed(findings)
        found, target = read_config(findings, options.config)
        check_kernels(findings, device, None if found is None else found[-1].attn_implementation)
        if found is not None and sound:
            with findings.part("trial"):
                trial = _trial(findings, found, target, options, device)
                result = try_out(trial, options.layers, options.seconds)
                say_result(findings, trial, result)
    print(f"{PROG} doctor, with the options of {options.config or 'the embedded policy'}. Weights are random.")
    return findings.print()


def read_config(findings: Findings, path: str | None) -> tuple[tuple[Any, ...] | None, Target]:
    """The options of a recipe of `train`, `sft` or `iterate`."""
    words = [] if path is None else ["--config", path]
    options = all_options(words)
    if isinstance(options.get("train"), dict):  # of `iterate`
        with findings.part("options"):
            rounds = Rounds(**options)
            words = arguments_of({**rounds.train_options(1), "trajectories": None, "resume_from_checkpoint": None})
            return read(findings, train.parse, words, Target(), TRAINING)
        return None, Target()
    only_sft = {one for kind in sft.KINDS for one in kind.__dataclass_fields__} - {
        one for kind in train.KINDS for one in kind.__dataclass_fields__
    }
    if only_sft & options.keys():
        return read(findings, sft.parse, words, Target(), TUNING)
    return read(findings, train.parse, words, Target(), TRAINING)


def _trial(
    findings: Findings, found: tuple[Any, ...], target: Target, options: argparse.Namespace, device: str
) -> Trial:
    """What is tried for these options."""
    script_args, args, model_args = found
    if is_random(script_args, model_args):
        config = random_config(script_args.random_policy, find_tokenizer(script_args, model_args))
    else:
        config, is_read = find_config(policy_path(model_args))
        if not is_read:
            findings.say(
                "policy", f"{model_args.model_name_or_path}: not here; its sizes are those that the package knows"
            )
    spec = spec_for_plan(config, dict(args.spec_overrides() or {}))
    if isinstance(args, sft.DiffusionSFTConfig):
        draws = args.num_masks * (2 if args.complementary else 1)
        prompt, length, estimator = 16, (args.max_length or 272) - 16, EstimatorConfig("elbo", num_draws=draws)
        rows, decoding = args.per_device_eval_batch_size, script_args.decoding()
    else:
        prompt, length, estimator = options.prompt_length, args.max_completion_length, args.scoring()
        own = args.per_device_train_batch_size * args.steps_per_generation
        rows, decoding = min(args.rollout_batch_size or own, own), args.decoding()
    context = context_length(config)[0]
    if context is not None:
        prompt = max(1, min(prompt, spec.longest_prompt(context, length)))
    work = Workload(
        args.per_device_train_batch_size, 1, prompt, length, estimator, decoding.tokens_per_step or 1, rows,
        args.gradient_checkpointing,
    )  # fmt: skip
    adapter: Any = new_adapter(model_args)
    if adapter is not None and adapter.target_modules is None:
        adapter.target_modules = list(LAYERS)
    wanted = dtype_of(options.dtype or (model_args.dtype if device == "cuda" else None), config)
    dtype, frozen = _fitting(findings, config, wanted, adapter is not None, options.layers, device)
    if device == "cpu" and dtype != dtype_of(model_args.dtype, config):
        findings.say(
            "trial", f"weights are {str(dtype).removeprefix('torch.')} on this CPU, and {model_args.dtype} in the run"
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        findings.say("trial", "weights are not rounded here, as they are in the run: not known is what that costs")
    return Trial(
        config, spec, work, _plain(decoding), dtype, adapter, bool(args.bf16) and device == "cuda",
        model_args.attn_implementation, device, frozen,
    )  # fmt: skip


def _plain(decoding: DecodingConfig) -> DecodingConfig:
    """The settings of a decoder; confidence of random weights says nothing, so steps write as many tokens as they must."""
    return decoding if decoding.threshold is None else replace(decoding, threshold=1.0)


def _fitting(
    findings: Findings, config: Any, dtype: torch.dtype, adapter: bool, layers: int, device: str
) -> tuple[torch.dtype, bool]:
    """The type of the weights, and whether embeddings and head are frozen, since their gradients and AdamW's state do not fit."""
    free = gpu_memory() if device == "cuda" else free_memory()
    least = min(layers, config.get_text_config().num_hidden_layers)
    model = empty_model(cut(config, least))
    count, ends = (sum(one.numel() for one in weights) for weights in (model.parameters(), end_weights(model)))
    for frozen in (False, True):
        trained = 0.05 * count if adapter else count - ends * frozen
        need = (count + 3 * trained) * dtype.itemsize * 1.1
        if free is None or need < SPARE * free:
            if frozen:
                findings.say(
                    "trial", "embeddings and head are not trained here: their gradients and AdamW's state do not fit"
                )
            return dtype, frozen
    raise ValueError(
        f"{least} layers with {in_words(count)} weights need {need / GIB:.1f} GiB, and {(free or 0) / GIB:.1f} GiB are free. Lower "
        "`--layers`, set `use_peft`, give `--dtype bfloat16`, or try it on a larger machine."
    )


def say_result(findings: Findings, trial: Trial, result: Result) -> None:
    """What was measured, and what it says about all layers."""
    work, more, layers = result.work, result.more, trial.config.get_text_config().num_hidden_layers
    reduced = "" if work.batch_size == trial.work.batch_size and _lengths(work) == _lengths(trial.work) else (
        f", reduced from {trial.work.rollout_batch_size} and {trial.work.batch_size} rows of {trial.work.prompt_length} + "
        f"{trial.work.completion_length} tokens"
    )  # fmt: skip
    findings.say(
        "trial",
        f"{more.layers} of {layers} layers; a rollout of {work.rollout_batch_size} and an update of {work.batch_size} rows of "
        f"{work.prompt_length} + {work.completion_length} tokens{reduced}",
    )
    findings.say(
        "rollout",
        f"{duration(more.rollout)}: {more.steps} steps of {more.rollout / max(more.steps, 1):.3f} s, {more.tokens / more.rollout:.1f} tokens/s",
    )
    findings.say("update", f"{duration(more.update)}: draws, one packed pass, backward, AdamW")
    peak = "not known here" if result.peak is None else f"{result.peak / GIB:.2f} GiB"
    findings.say("memory", f"measured {peak}, planned {result.planned / GIB:.2f} GiB for the same shapes")
    if more.layers < layers:
        findings.say(
            "all layers",
            f"extrapolated on a line through {result.few.layers} and {more.layers} layers, to {layers}: rollout "
            f"{duration(result.whole(layers, 'rollout'))}, update {duration(result.whole(layers, 'update'))}, for these rows and lengths",
        )


def _lengths(work: Workload) -> tuple[int, ...]:
    return work.rollout_batch_size, work.prompt_length, work.completion_length


def _parser() -> Parser:
    parser = Parser(f"{PROG} doctor", description=__doc__)
    add_config_option(parser)
    parser.add_argument("--layers", type=int, default=2, help="layers of the model that is tried (default: 2)")
    parser.add_argument("--prompt_length", type=int, default=256, help="tokens of a prompt (default: 256)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="type of the weights (default: that of the run on a GPU, float32 on a CPU if it fits)",
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="time for the measurements (default: 40)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
