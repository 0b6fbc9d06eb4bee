"""
`--dry_run`: everything that a command does before it computes, but for the weights. All mistakes are named, each in a line, and
what the run needs.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..plan.simulate import Workload
from ..quiet import hush_commands
from ..rehearsal.findings import Findings
from ..rehearsal.gold import check_rewards
from ..rehearsal.policy import Outline, complete_outline, outline
from ..tasks import Task
from ..trainer.checkpoints import check_start
from ..trainer.checks import check_number_of_rows, prompts_per_rollout
from ..trainer.options import rehearsing
from ..trainer.setup import check_prompt_rows, set_up
from ..trajectories.dataset import load_trajectories
from ..utils import check_writable, load_yaml
from . import train
from .dry_needs import (
    Target,
    check_checkpoints,
    check_memory,
    check_packages,
    footprint_of,
    plan_for,
    rollout_seconds,
    say_time,
)
from .dry_options import all_options, asks_for_bf16, read_all
from .interrupt import ending_in_a_line
from .opening import find_tokenizer, is_random, loading_options, new_adapter, policy_path, random_config, random_policy
from .parser import PROG
from .settings import TRAINING, Command, find_settings


USUAL_PROMPT = 256  # tokens, where the prompts are not known


def main(
    name: str, arguments: list[str] | None, accelerate_config: str | None = None, processes: int | None = None
) -> int:
    """
    Rehearses a command.

    Args:
        name (`str`): `train`, `sft`, `adapt`, `collect` or `iterate`.
        arguments (`list[str]`, *optional*): its options. Defaults to those of the command line.
        accelerate_config (`str`, *optional*): path of the config of accelerate that the run will start with.
        processes (`int`, *optional*): number of its processes.

    Returns:
        `int`: exit code: 0, or 2 if there are mistakes.
    """
    from . import dry_others  # here, since it builds on this module

    checks: dict[str, Callable[[Findings, list[str], Target], object]] = {
        "train": dry_train,
        "sft": dry_others.dry_sft,
        "adapt": dry_others.dry_adapt,
        "collect": dry_others.dry_collect,
        "iterate": dry_others.dry_iterate,
    }
    hush_commands()
    findings, target = Findings(), _target(accelerate_config, processes)
    with ending_in_a_line(lambda: "Nothing was kept."), rehearsing(target.processes):
        checks[name](findings, list(sys.argv[1:] if arguments is None else arguments), target)
    if os.environ.get("RANK", "0") != "0":
        return 2 if findings.mistakes else 0
    print(f"Dry run of `{PROG} {name}` on {_count(target)}. Nothing is computed, and nothing is kept.")
    return findings.print()


def _count(target: Target) -> str:
    return f"{target.processes} process{'es' * (target.processes > 1)} ({target.engine})"


def _target(accelerate_config: str | None, processes: int | None) -> Target:
    """What the launcher would start."""
    engine = "ddp"
    if accelerate_config is not None:
        config = load_yaml(accelerate_config) or {}
        engine = _engine_of(config) or Path(accelerate_config).stem
        processes = processes or config.get("num_processes")
    return Target(engine, processes or int(os.environ.get("WORLD_SIZE", "1")))


def _engine_of(config: dict[str, Any]) -> str | None:
    """The engine of a config of accelerate, as the plan names it, whatever the name of its file."""
    if config.get("distributed_type") != "DEEPSPEED":
        return {"FSDP": "fsdp2", "MULTI_GPU": "ddp"}.get(str(config.get("distributed_type")))
    settings = config.get("deepspeed_config") or {}
    if "zero_stage" not in settings:  # in a file of DeepSpeed's
        return None
    return f"zero{settings['zero_stage']}" + "_offload" * (settings.get("offload_param_device") in ("cpu", "nvme"))


# -------------------------------------------------------------------------------------------------------- the parts


def read(
    findings: Findings,
    parse: Callable[[list[str]], tuple[Any, ...]],
    words: list[str],
    target: Target,
    command: Command | None,
) -> tuple[tuple[Any, ...] | None, Target]:
    """The options, and the target that they ask for."""

    def complete(words: list[str]) -> list[str]:
        return words if command is None else find_settings(words, command).arguments

    with findings.part("options"):
        if asks_for_bf16(complete(words)):
            findings.say("options", "`bf16` needs a GPU that is not here: checked as for a machine that has one")
            target = Target(target.engine, target.processes, target.gpu_gib, True)
            words = [*words, "--bf16", "false"]
    found = read_all(findings, parse, words, complete)
    if found is None:
        with findings.part("output"):
            if isinstance(directory := all_options(complete(words)).get("output_dir"), str):
                check_writable(directory, "--output_dir")
        return None, target
    if (settings := getattr(found[0], "settings", None)) is not None:
        line = settings.line.removeprefix("Settings: ")
        if target.for_gpu:  # this option was added above
            line = line.replace(", --bf16 from the command", " from the command").replace(
                "; --bf16 from the command line", ""
            )
        findings.say("options", line)
    return found, Target(target.engine, target.processes, found[0].gpu_memory, target.for_gpu)


def check_output(findings: Findings, args: Any) -> None:
    """The output directory of a training."""
    with findings.part("output"):
        check_writable(args.output_dir, "--output_dir")
        check_start(args)
        findings.say("output", f"{args.output_dir} can be written")


def outline_of(findings: Findings, script_args: Any, training_args: Any, model_args: Any) -> Outline:
    """The policy that a training begins with, without its weights. An adapter that is trained further is noted in `model_args`."""
    fields = training_args.spec_overrides()
    if is_random(script_args, model_args):
        found = Outline("a random policy")
        with findings.part("policy"):
            found.tokenizer = find_tokenizer(script_args, model_args)
            found.config = random_config(script_args.random_policy, found.tokenizer)
        complete_outline(findings, found, fields)
        return found
    revision = model_args.model_revision
    found = outline(
        findings,
        policy_path(model_args),
        script_args.tokenizer_name_or_path,
        fields,
        **({"revision": revision} if revision else {}),
    )
    if found.adapter is not None:
        model_args.use_peft, model_args.lora_r = True, getattr(found.adapter, "r", model_args.lora_r)
    return found


def begin(
    findings: Findings,
    parse: Callable[[list[str]], tuple[Any, ...]],
    words: list[str],
    target: Target,
    command: Command,
) -> tuple[tuple[Any, ...], Outline, Target] | None:
    """The options of a training, its policy without its weights, and the target. `None` if the options cannot be read."""
    found, target = read(findings, parse, words, target, command)
    if found is None:
        return None
    _, args, model_args = found
    check_packages(findings, model_args, target)
    check_output(findings, args)
    return found, outline_of(findings, *found), target


def setting_up(
    findings: Findings,
    check: Callable[[str, Any, Any], object],
    policy: Outline,
    script_args: Any,
    training_args: Any,
    model_args: Any,
) -> None:
    """
    Lets a trainer check its arguments, as it does before it loads weights. A random policy is made for that, in a directory that
    is removed.

    Args:
        check (`Callable`): called with the path of the model, the settings and the adapter.
    """

    with findings.part("trainer"), tempfile.TemporaryDirectory() as folder:
        args, path = copy(training_args), policy.path
        if is_random(script_args, model_args):
            path = random_policy(script_args.random_policy, policy.tokenizer, Path(folder), training_args.seed)
        args.model_init_kwargs = loading_options(training_args, model_args)
        check(path, args, policy.adapter or new_adapter(model_args))


def say_prompts(findings: Findings, lengths: list[int], policy: Outline, new_tokens: int) -> None:
    """How long the prompts are."""
    _, spec, _ = policy.parts()
    end = spec.canvas_end(max(lengths), new_tokens)
    findings.say(
        "prompts",
        f"{len(lengths):,}, of {min(lengths)} to {max(lengths)} tokens; with {new_tokens} new ones at most {end} positions",
    )


# ------------------------------------------------------------------------------------------------------------ train


def dry_train(findings: Findings, words: list[str], target: Target, stored: bool = True) -> None:
    """Rehearses `train`. `stored`: whether stored responses that are named are there already."""
    begun = begin(findings, train.parse, words, target, TRAINING)
    if begun is None:
        return
    (script_args, args, model_args), policy, target = begun
    data, task = _training_data(findings, script_args, args)
    if data is not None:
        _check_training(findings, policy, data, task, script_args, args, model_args)
    if task is not None:
        with findings.part("rewards"):
            check_rewards(findings, task)
    lengths: list[int] = []
    if task is not None and policy.is_whole:
        rows_by_name = {"training rows": task.train, "rows to measure on": task.evaluation}
        if script_args.trajectories:  # their prompts were checked when they were read
            del rows_by_name["training rows"]
        for name, rows in rows_by_name.items():
            with findings.part("prompts"):
                template = dict(args.chat_template_kwargs or {})
                lengths += check_prompt_rows(name, rows, *policy.parts(), args.max_completion_length, template)
    if lengths:
        say_prompts(findings, lengths, policy, args.max_completion_length)
    updates = _updates(args, None if data is None else len(data))
    _say_updates(findings, args, updates)
    if policy.config is not None and policy.spec is not None:
        with findings.part("memory"):
            _needs(findings, policy, args, model_args, target, max(lengths, default=USUAL_PROMPT), updates, data)


def _training_data(findings: Findings, script_args: Any, args: Any) -> tuple[Dataset | None, Task | None]:
    """The rows to train on, and the task if it is one."""
    data, task = None, None
    with findings.part("data"):
        if script_args.task == train.PREFERENCES:
            data, held_out = train.load_preferences(script_args)
            findings.say("data", f"{len(data):,} pairs to train on, {len(held_out):,} to measure on")
            return data, None
        task = script_args.load_task(script_args.train_size, script_args.eval_size, args.seed)
        data = task.train
        findings.say(
            "data", f"{task.name}: {len(data):,} {task.unit} to train on, {len(task.evaluation):,} to measure on"
        )
    with findings.part("data"):
        if script_args.trajectories:
            data = None
            data = concatenate_datasets([load_trajectories(path) for path in script_args.trajectories])
            data = data.select(range(min(len(data), script_args.train_size)))
            findings.say("data", f"{len(data):,} groups of stored responses to train on")
    return data, task


def _check_training(
    findings: Findings, policy: Outline, data: Dataset, task: Task | None, script_args: Any, args: Any, model_args: Any
) -> None:
    """What the trainer checks of its rows, and of everything together."""
    with findings.part("batches"):
        check_number_of_rows(data, args)
    rewards = None if task is None or script_args.trajectories else task.reward_funcs

    def check(path: str, args: Any, adapter: Any) -> None:
        if rewards is None:  # for stored responses and pairs, the trainer would ask the weights
            args.beta, args.decoding_order = (
                0.0,
                "random" if args.decoding_order == "confidence" else args.decoding_order,
            )
        set_up(path, rewards, args, (data, None), policy.tokenizer, {"peft_config": adapter})

    if policy.is_whole:
        setting_up(findings, check, policy, script_args, args, model_args)


def _updates(args: Any, rows: int | None) -> int:
    """Number of optimizer steps; 0 if it is not known."""
    if args.max_steps > 0:
        return args.max_steps
    rollouts = (rows or 0) // prompts_per_rollout(args)
    steps = rollouts * args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
    return math.ceil(args.num_train_epochs * steps)


def _say_updates(findings: Findings, args: Any, updates: int) -> None:
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    findings.say(
        "batches",
        f"{updates or 'not known: how many'} updates, each on {size} responses; a rollout has {args.generation_batch_size} responses to "
        f"{prompts_per_rollout(args)} prompts",
    )


def _needs(
    findings: Findings,
    policy: Outline,
    args: Any,
    model_args: Any,
    target: Target,
    prompt: int,
    updates: int,
    data: Dataset | None,
) -> None:
    """Memory, disk and time."""
    config, spec = policy.config, policy.spec
    assert config is not None and spec is not None
    own = args.per_device_train_batch_size * args.steps_per_generation  # responses of a rollout, of each process
    work = Workload(
        batch_size=args.per_device_train_batch_size,
        num_generations=args.num_generations,
        prompt_length=prompt,
        completion_length=args.max_completion_length,
        estimator=args.scoring(),
        tokens_per_step=args.tokens_per_step or 1,
        rollout_batch_size=min(args.rollout_batch_size or own, own),
        checkpointing=args.gradient_checkpointing,
        accumulation=args.gradient_accumulation_steps,
        share_prompts=args.share_prompts,
    )
    footprint = footprint_of(config, spec, work, model_args, autocast=args.bf16 or target.for_gpu)
    check_memory(findings, plan_for(footprint, model_args, target, args.beta), footprint, target)
    with findings.part("disk"):
        check_checkpoints(findings, args, footprint, bool(model_args.use_peft), updates)
    rollouts = updates * args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)
    is_fresh = data is None or "canvas_lengths" not in data.column_names
    seconds = rollout_seconds(config, spec, work, footprint, own) * rollouts if is_fresh else 0.0
    say_time(findings, footprint, target, updates, args.gradient_accumulation_steps, args.beta, seconds)
