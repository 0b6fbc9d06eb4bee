"""The dry runs of `sft`, `adapt`, `collect` and `iterate`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import datasets
from datasets import Dataset
from transformers import GenerationConfig

from ..offline.collect import check_source
from ..plan.simulate import Workload
from ..policies.conversion import check_place, describe, plan_policy
from ..policies.limits import context_length
from ..policies.prompts import read_chat_template_kwargs
from ..policies.small import random_model, small_config
from ..policies.spec import set_spec
from ..rehearsal.findings import Findings
from ..rehearsal.gold import check_rewards
from ..rehearsal.policy import Outline, outline
from ..scoring.estimators import EstimatorConfig
from ..sft.setup import set_up
from ..sft.trainer import DiffusionSFTTrainer
from ..tasks import Task
from ..trainer.setup import check_prompt_rows
from ..utils import check_writable, read_mapping
from . import adapt, collect, iterate, sft
from .dry_needs import (
    TRAJECTORY,
    Target,
    check_checkpoints,
    check_disk,
    check_memory,
    check_packages,
    footprint_of,
    plan_for,
    say_time,
)
from .dry_run import USUAL_PROMPT, begin, check_output, dry_train, read, say_prompts, setting_up
from .settings import TUNING


# -------------------------------------------------------------------------------------------------------------- sft


def dry_sft(findings: Findings, words: list[str], target: Target) -> None:
    """Rehearses `sft`."""
    begun = begin(findings, sft.parse, words, target, TUNING)
    if begun is not None:
        (script_args, args, model_args), policy, target = begun
        _tune(findings, script_args, args, model_args, policy, target)


def dry_adapt(findings: Findings, words: list[str], target: Target) -> None:
    """Rehearses `adapt`: what the policy will be, and its training if there is one."""
    found, target = read(findings, adapt.parse, words, target, None)
    if found is None:
        return
    script_args, args, model_args = found
    check_packages(findings, model_args, target)
    check_output(findings, args)
    with tempfile.TemporaryDirectory() as folder:
        policy = Outline(folder)
        with findings.part("options"):
            adapt.check_options(args, model_args)
        with findings.part("output"):
            check_place(str(model_args.model_name_or_path), adapt.place_of(script_args, args))
        with findings.part("policy"):
            policy.config, policy.tokenizer = adapt.outline(script_args, model_args)
        if policy.config is not None and policy.tokenizer is not None:
            with findings.part("spec"):
                _convert(findings, policy, adapt.generation_config(script_args, model_args), script_args.options())
        if script_args.trains:
            _tune(findings, script_args, args, model_args, policy, target)


def _convert(
    findings: Findings, policy: Outline, generation_config: GenerationConfig | None, options: dict[str, Any]
) -> None:
    """Makes the config and the tokenizer of a causal model those of a policy, and saves them where the policy is taken to be."""
    assert policy.config is not None and policy.tokenizer is not None
    spec, mask = plan_policy(policy.config, policy.tokenizer, generation_config, **options)
    findings.say("spec", " ".join(describe(spec, mask)))
    text = policy.config.get_text_config()
    if mask.token_id >= text.vocab_size:
        findings.say("spec", f"the embeddings get a row for it, and have {mask.token_id + 1:,} then")
        text.vocab_size = mask.token_id + 1
    set_spec(policy.config, spec)
    policy.config.save_pretrained(policy.path)
    policy.tokenizer.save_pretrained(policy.path)
    policy.spec = spec


def _tune(findings: Findings, script_args: Any, args: Any, model_args: Any, policy: Outline, target: Target) -> None:
    """What comes before a policy is tuned."""
    data, lengths = None, []
    if policy.tokenizer is not None or not script_args.trajectories:
        with findings.part("data"):
            data = sft.load_data(script_args, args.seed, policy.tokenizer)
            said = f"{len(data.train):,} documents to train on, {len(data.held_out):,} to measure on"
            findings.say("data", said + (f"; the task {data.task.name} is measured" if data.task else ""))
    if data is not None and policy.is_whole:
        datasets = [("train_dataset", data.train), ("eval_dataset", data.held_out)]
        setting_up(
            findings,
            lambda path, args, adapter: set_up(path, args, policy.tokenizer, datasets, {"peft_config": adapter}),
            policy, script_args, args, model_args,
        )  # fmt: skip
        with findings.part("documents"):
            lengths = _document_lengths(policy, data, args)
            cut = sum(length >= args.max_length for length in lengths) if args.max_length else 0
            said = f"{len(lengths):,}, of {min(lengths)} to {max(lengths)} tokens"
            findings.say("documents", said + (f"; {cut} are cut at `max_length` {args.max_length}" if cut else ""))
    if data is not None and data.task is not None:
        _check_task(findings, data.task, policy, script_args.max_completion_length)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    updates = args.max_steps if args.max_steps > 0 else -(-int(len(lengths) * args.num_train_epochs) // size)
    findings.say("batches", f"{updates or 'not known: how many'} updates, each on {size} documents")
    if policy.config is not None and policy.spec is not None:
        with findings.part("memory"):
            _tuning_needs(
                findings, policy, script_args, args, model_args, target, max(lengths, default=args.max_length), updates
            )


def _document_lengths(policy: Outline, data: sft.Data, args: Any) -> list[int]:
    """
    The number of tokens of each document for training, as a trainer makes and checks them. It is that of a small policy with the
    same tokenizer, vocabulary, context and spec.
    """
    tokenizer, spec, whole = policy.parts()
    config = small_config(tokenizer, 32, 1)
    config.vocab_size = whole.get_text_config().vocab_size
    config.max_position_embeddings = context_length(whole)[0] or config.max_position_embeddings
    args = copy(args)
    args.disable_tqdm = True
    args.diffusion_spec, args.model_init_kwargs = spec.to_dict(), None
    if "labels" in data.train.column_names and "prompt" in data.held_out.column_names:
        args.completion_only_loss = True  # as `sft` does
    with tempfile.TemporaryDirectory() as folder, _without_bars():
        args.output_dir = folder
        trainer = DiffusionSFTTrainer(
            model=random_model(config, 0),
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=tokenizer,
        )
    return [len(ids) for ids in cast(Dataset, trainer.train_dataset)["input_ids"]]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, datasets show no progress bars."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _check_task(findings: Findings, task: Task, policy: Outline, new_tokens: int) -> None:
    """The rewards of a task, and whether the policy can take the prompts that it is measured on."""
    with findings.part("rewards"):
        check_rewards(findings, task)
    if policy.is_whole:
        with findings.part("prompts"):
            lengths = check_prompt_rows("rows to measure on", task.evaluation, *policy.parts(), new_tokens, {})
            say_prompts(findings, lengths, policy, new_tokens)


def _tuning_needs(
    findings: Findings,
    policy: Outline,
    script_args: Any,
    args: Any,
    model_args: Any,
    target: Target,
    length: int,
    updates: int,
) -> None:
    """Memory, disk and time. A document is planned as a response with its masks."""
    assert policy.config is not None and policy.spec is not None
    size, prompt = policy.spec.block_size, 1
    work = Workload(
        batch_size=args.per_device_train_batch_size,
        num_generations=1,
        prompt_length=prompt,
        completion_length=max(length or USUAL_PROMPT, args.canvas_length or 0, size + prompt) - prompt,
        estimator=EstimatorConfig("elbo", num_draws=args.num_masks * (2 if args.complementary else 1)),
        rollout_batch_size=args.per_device_eval_batch_size if script_args.task else 1,
        checkpointing=args.gradient_checkpointing,
        accumulation=args.gradient_accumulation_steps,
        share_prompts=False,
    )
    footprint = footprint_of(policy.config, policy.spec, work, model_args, autocast=args.bf16 or target.for_gpu)
    check_memory(findings, plan_for(footprint, model_args, target, 0.0), footprint, target)
    with findings.part("disk"):
        check_checkpoints(findings, args, footprint, bool(model_args.use_peft), updates)
    say_time(findings, footprint, target, updates, args.gradient_accumulation_steps, 0.0)


# ---------------------------------------------------------------------------------------------------------- collect


def dry_collect(findings: Findings, words: list[str], target: Target) -> None:
    """Rehearses `collect`."""
    found, target = read(findings, collect.parse, words, target, None)
    if found is None:
        return
    args, model_args = found
    with findings.part("options"):
        collect.check_model_options(model_args)
    with findings.part("options"):
        collect.stored_decoding(args)
    check_packages(findings, model_args, target)
    with findings.part("output"):
        check_writable(args.output_dir, "--output_dir")
        findings.say("output", f"{args.output_dir} can be written")
    fields: dict[str, Any] = {}
    template: dict[str, Any] = {}
    with findings.part("options"):
        fields = read_mapping(args.diffusion_spec, "diffusion_spec")
        template = read_chat_template_kwargs(args.chat_template_kwargs)
    path = collect.policy_path(args, model_args) or ""
    policy = outline(findings, path, args.tokenizer_name_or_path, fields, args.adapter_name_or_path)
    task = None
    with findings.part("data"):
        task = args.load_task(args.train_size, args.eval_size, args.seed)
        findings.say(
            "data", f"{task.name}: {len(task.train):,} {task.unit} to answer, {args.num_responses} times each"
        )
    prompt = USUAL_PROMPT
    if task is not None:
        with findings.part("rewards"):
            check_rewards(findings, task)
        if policy.is_whole:
            with findings.part("prompts"):
                tokenizer, spec, config = policy.parts()
                ids = check_source(task.train, tokenizer, template, spec, config, args.max_completion_length)
                prompt = max(map(len, ids))
                say_prompts(findings, list(map(len, ids)), policy, args.max_completion_length)
        with findings.part("disk"):
            tokens = len(task.train) * args.num_responses * (prompt / args.num_responses + args.max_completion_length)
            check_disk(findings, args.output_dir, TRAJECTORY * tokens, "trajectories (before they are compressed)")
    if policy.config is not None and policy.spec is not None:
        with findings.part("memory"):
            _answering_needs(findings, policy, args, model_args, target, prompt)


def _answering_needs(
    findings: Findings, policy: Outline, args: Any, model_args: Any, target: Target, prompt: int
) -> None:
    """The memory of a policy that answers. An update of one response is planned with it, which needs less than a batch of answers."""
    assert policy.config is not None and policy.spec is not None
    work = Workload(1, 1, prompt, args.max_completion_length, rollout_batch_size=args.batch_size)
    footprint = footprint_of(policy.config, policy.spec, work, model_args, autocast=False)
    plan = plan_for(footprint, model_args, target, 0.0)
    plan.optimizer = plan.gradients = plan.activations = plan.buffers = 0.0
    check_memory(findings, plan, footprint, target)
    findings.say("time", "not known: it depends on when responses end. The first shard shows it.")


# ---------------------------------------------------------------------------------------------------------- iterate


def dry_iterate(findings: Findings, words: list[str], target: Target) -> None:
    """Rehearses the two commands of the first round. The responses that the second one trains on are not there yet."""
    rounds = None
    with findings.part("options"):
        options = vars(iterate._parser().parse_args(words))
        target = Target(target.engine, target.processes, options.pop("gpu_memory"), target.for_gpu)
        for name in ("accelerate_config", "num_processes", "dry_run"):
            options.pop(name)
        rounds = iterate.rounds_of(options, check=False)
        check_writable(rounds.output_dir, "--output_dir")
    if rounds is None:
        return
    train_options, collect_options = rounds.train_options(1), rounds.collect_options(1)
    train_options.update(trajectories=None, resume_from_checkpoint=None)
    gpu = [] if target.gpu_gib is None else ["--gpu_memory", str(target.gpu_gib)]
    for name, check, options in (("collect", dry_collect, collect_options), ("train", dry_train, train_options)):
        part = Findings()
        check(part, [*iterate.arguments_of(options), *gpu], target)
        findings.lines += [
            (f"{name}, {one}", text) for one, text in part.lines if "as there is no --config" not in text
        ]
        for one, message in part.mistakes:
            findings.mistake(f"{name}, {one}", message)
    answered, compared = collect_options.get("num_responses", 16), train_options.get("num_generations")
    if isinstance(answered, int) and isinstance(compared, int) and compared > answered:
        findings.mistake(
            "options",
            f"`train` compares {compared} responses to a prompt (`num_generations`), but `collect` makes {answered} "
            "(`num_responses`). Lower the first, or raise the second.",
        )
