"""
Collects trajectories to train on later: a policy answers prompts, the answers are scored, and everything that training
needs is written to disk.

    trl-diffusion collect                                    # embedded policy, 4x4 sudoku
    trl-diffusion collect --task gsm8k --train_file data/gsm8k/train.jsonl --model_name_or_path MODEL
    trl-diffusion train --trajectories outputs/trajectories  # then train, as often as you like

`accelerate launch recipes/collect.py` takes the same options.

An interrupted run goes on where it stopped when the same command is given again. Processes share the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from ..decoding.config import DecodingConfig
from ..offline.collect import collect
from ..policies.loading import resolve_spec
from ..policies.tiny import tiny_policy_path
from ..tasks import TASKS, load_task
from ..utils import USAGE, check_config_file, errors_in_a_line, processes, read_mapping, use_all_cores


@dataclass
class CollectArguments:
    """What to collect."""

    output_dir: str = field(default="outputs/trajectories", metadata={"help": "Where the trajectories go."})
    task: str = field(default="sudoku", metadata={"help": "What to answer.", "choices": sorted(TASKS)})
    train_file: str | None = field(default=None, metadata={"help": "Rows to answer, as for `train`."})
    eval_file: str | None = field(default=None, metadata={"help": "Rows to leave out."})
    train_size: int = field(default=320, metadata={"help": "Most rows to answer."})
    num_responses: int = field(default=16, metadata={"help": "Responses to each prompt."})
    batch_size: int = field(default=512, metadata={"help": "Responses that a process decodes at once."})
    rows_per_shard: int = field(default=64, metadata={"help": "Prompts in a shard."})
    seed: int = field(default=0, metadata={"help": "Source of randomness."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not in the model's directory."}
    )
    diffusion_spec: str | None = field(
        default=None, metadata={"help": "Fields of DiffusionSpec, as JSON, that complete those of the model."}
    )
    max_completion_length: int = field(default=17, metadata={"help": "Most tokens of a response."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    decoding_strategy: str = field(default="confidence", metadata={"help": "'confidence' or 'threshold'."})
    tokens_per_step: int = field(default=2, metadata={"help": "Positions unmasked at a step by 'confidence'."})
    confidence_threshold: float = field(
        default=0.9, metadata={"help": "Probability above which 'threshold' unmasks a position."}
    )
    sub_block_size: int | None = field(default=None, metadata={"help": "Parts of a block, from left to right."})
    tempered_confidence: bool = field(
        default=False,
        metadata={"help": "Whether `decoding_strategy` looks at the distribution after `temperature`."},
    )


# Options of `trl.ModelConfig` that are for loading a model; the others are for training it.
LOADING = ("model_name_or_path", "model_revision", "attn_implementation", "dtype")


def refuse_training_options(model_args: ModelConfig) -> None:
    """Raises a `ValueError` if an option is set that collecting does not look at."""
    for option in fields(model_args):
        if option.name not in LOADING and getattr(model_args, option.name) != option.default:
            raise ValueError(f"`--{option.name}` is for training: the policy answers as it is. Leave it out.")


def run(args: CollectArguments, model_args: ModelConfig) -> None:
    """Collects."""
    use_all_cores()
    refuse_training_options(model_args)
    task = load_task(args.task, args.train_file, args.eval_file, args.train_size, 1, args.seed)
    decoding = DecodingConfig(
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        strategy=args.decoding_strategy,
        tokens_per_step=args.tokens_per_step,
        threshold=args.confidence_threshold,
        sub_block_size=args.sub_block_size,
        tempered_confidence=args.tempered_confidence,
    )
    path = model_args.model_name_or_path or tiny_policy_path()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name_or_path or path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        path,
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype or torch.float32,
    )
    spec = resolve_spec(model.config, read_mapping(args.diffusion_spec, "diffusion_spec"), tokenizer)
    directory = collect(
        model.to(processes().device),
        tokenizer,
        task.train,
        task.reward_funcs,
        args.output_dir,
        decoding,
        num_responses=args.num_responses,
        spec=spec,
        batch_size=args.batch_size,
        rows_per_shard=args.rows_per_shard,
        seed=args.seed,
    )
    processes().print(f"Trajectories and their card are in {directory}.")


def parse(arguments: list[str] | None = None) -> tuple[CollectArguments, ModelConfig]:
    """Reads options, those of the command line by default."""
    parser = TrlParser((CollectArguments, ModelConfig), usage=USAGE)  # type: ignore[arg-type]  # takes classes
    return cast(
        "tuple[CollectArguments, ModelConfig]", parser.parse_args_and_config(args=check_config_file(arguments))
    )


def main() -> None:
    """Runs the command, with the options of the command line."""
    with errors_in_a_line():
        run(*parse())


if __name__ == "__main__":
    main()
