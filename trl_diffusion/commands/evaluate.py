"""
Measures a policy on benchmarks.

    trl-diffusion evaluate --tasks sudoku countdown                                    # the embedded policy
    trl-diffusion evaluate --model_name_or_path MODEL --tasks gsm8k math500 gpqa ifeval
    trl-diffusion evaluate --adapter_name_or_path outputs/llada --tasks gsm8k --data_dir DATA
    trl-diffusion evaluate --model_name_or_path MODEL --tasks humaneval_plus mbpp_plus --allow_code_execution
    trl-diffusion evaluate --tasks sudoku --decoding temperature:0.5 --seeds 0 1 2

Tasks: gsm8k, math (all of MATH), math500, gpqa (diamond), humaneval, humaneval_plus, mbpp_plus, ifeval, countdown, sudoku.
With `--data_dir`, a directory with gsm8k/test.jsonl, humaneval/HumanEval.jsonl, countdown/cd3_test.jsonl or
sudoku/4x4_test.csv, these are read from there. Without a file, countdown and sudoku are the 500 games and puzzles on which
`train` measures, too. Everything else comes from the hub through lm-evaluation-harness.

In the output directory it leaves `results.md` and `results.json`, and for each task and seed the figures and all samples.
Given again after an interruption, the same command adds what is missing. With several processes
(`--num_processes`, or `accelerate launch recipes/eval.py`), they share the questions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, cast

from trl import TrlParser

from ..decoding.config import DecodingConfig
from ..evaluation.run import Evaluation, check_seeds, check_tasks, markdown
from ..fields import AtLeast, check_fields
from ..policies.policy import open_policy
from ..policies.prompts import read_chat_template_kwargs
from ..policies.quantized import rounding
from ..policies.tiny import tiny_policy_path
from ..utils import (
    USAGE,
    check_config_file,
    check_writable,
    errors_in_a_line,
    processes,
    read_mapping,
    use_all_cores,
)


@dataclass
class EvaluateArguments:
    """What to measure."""

    tasks: list[str] = field(default_factory=list, metadata={"help": "Names of tasks."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The policy. The one that the adapter was made for, or the embedded one, by default."},
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A LoRA adapter, which is used as it is, not merged."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the hub."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not in the model's directory."}
    )
    diffusion_spec: str | None = field(
        default=None,
        metadata={"help": "Fields of DiffusionSpec that complete those of the model, written like `decoding`."},
    )
    dtype: str = field(default="auto", metadata={"help": "Type of the weights, such as bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "'sdpa' or 'eager'."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Whether weights are rounded to 8 bits."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Whether weights are rounded to 4 bits, as for training an adapter on them."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Directory of local data."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where the results go."})
    decoding: str | None = field(
        default=None,
        metadata={
            "help": "Settings of DecodingConfig, as strategy:threshold+threshold:0.9, as JSON, or a JSON or YAML file. "
            "Greedy, and as many tokens as the task allows, by default. There are "
            f"{', '.join(setting.name for setting in fields(DecodingConfig))}; `trl-diffusion generate --help` explains them."
        },
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": "Variables of the chat template, such as enable_thinking:false, written like `decoding`."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One measurement each."})
    batch_size: Annotated[int, AtLeast(1)] = field(
        default=32, metadata={"help": "Answers at a time, on each process."}
    )
    limit: Annotated[int, AtLeast(1)] | None = field(default=None, metadata={"help": "Most questions of a task."})
    allow_code_execution: bool = field(
        default=False,
        metadata={"help": "Allows to run programs that the policy wrote on this machine, in a sandbox."},
    )

    def __post_init__(self):
        if isinstance(self.tasks, str):  # a YAML file may name a single one
            self.tasks = [self.tasks]
        check_fields(self)
        check_seeds(self.seeds)


def run(args: EvaluateArguments) -> None:
    """Measures, and prints the table."""
    use_all_cores()
    state = processes()
    check_writable(args.output_dir, "--output_dir")
    check_tasks(args.tasks, args.data_dir, args.allow_code_execution)  # before the weights are loaded
    decoding = read_mapping(args.decoding, "decoding")
    DecodingConfig.from_dict(decoding)
    path = args.model_name_or_path or (None if args.adapter_name_or_path else tiny_policy_path())
    policy = open_policy(
        path,
        args.adapter_name_or_path,
        args.tokenizer_name_or_path,
        revision=args.model_revision,
        dtype=args.dtype,
        device=state.device,
        attn_implementation=args.attn_implementation,
        quantization=rounding(args.load_in_4bit, args.load_in_8bit, args.dtype),
        diffusion_spec=read_mapping(args.diffusion_spec, "diffusion_spec"),
        chat_template_kwargs=read_chat_template_kwargs(args.chat_template_kwargs),
    )
    evaluation = Evaluation(
        policy,
        args.output_dir,
        args.data_dir,
        decoding,
        args.seeds,
        args.batch_size,
        args.limit,
        args.allow_code_execution,
        about={"model": args.model_name_or_path, "adapter": args.adapter_name_or_path},
    )
    results = evaluation.run(args.tasks)
    state.print(markdown(results))
    state.print(f"Results and samples are in {args.output_dir}.")


KINDS = (EvaluateArguments,)  # which have the options


def parse(arguments: list[str] | None = None) -> EvaluateArguments:
    """Reads options, those of the command line by default."""
    parser = TrlParser(KINDS, usage=USAGE)  # type: ignore[arg-type]  # takes classes
    (found,) = cast("tuple[EvaluateArguments]", parser.parse_args_and_config(args=check_config_file(arguments, KINDS)))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Runs the command, with the options of the command line by default."""
    with errors_in_a_line():
        run(parse(arguments))


if __name__ == "__main__":
    main()
