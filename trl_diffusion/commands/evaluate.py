"""
Measures a policy on benchmarks.

    trl-diffusion evaluate --tasks sudoku countdown                                    # the embedded policy
    trl-diffusion evaluate --model_name_or_path MODEL --tasks gsm8k math500 gpqa ifeval
    trl-diffusion evaluate --adapter_name_or_path outputs/llada --tasks gsm8k --data_dir DATA
    trl-diffusion evaluate --model_name_or_path MODEL --tasks humaneval_plus mbpp_plus --allow_code_execution
    trl-diffusion evaluate --tasks sudoku --decoding temperature:0.5 --seeds 0 1 2
    trl-diffusion evaluate --model_name_or_path MODEL --tasks reasoning_gym:mini_sudoku my_task.py:make_task
    trl-diffusion evaluate --model_name_or_path MODEL --eval_file rows.jsonl --reward_funcs ./rewards.py:brief

Tasks: gsm8k, math (all of MATH), math500, gpqa (diamond), humaneval, humaneval_plus, mbpp_plus, ifeval, countdown, sudoku,
and the evaluation rows of every other task of `train`. Or rows and rewards of your own, whose first reward is measured.
With `--data_dir`, a directory with gsm8k/test.jsonl, humaneval/HumanEval.jsonl, countdown/cd3_test.jsonl or
sudoku/4x4_test.csv, these are read from there. Without a file, countdown and sudoku are the 500 games and puzzles on which
`train` measures, too. Everything else comes from the hub through lm-evaluation-harness.

In the output directory it leaves `results.md` and `results.json`, and for each task and seed the figures and all samples.
Given again after an interruption, the same command adds what is missing. With several processes
(`--num_processes`, or `accelerate launch recipes/eval.py`), they share the questions.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, cast

from ..decoding.config import DecodingConfig
from ..evaluation.benchmarks import TaskBenchmark, benchmark_of
from ..evaluation.run import TASK_NAMES, Evaluation, check_seeds, check_tasks, markdown, measurement_name
from ..fields import AtLeast, check_fields
from ..policies.policy import open_policy
from ..policies.prompts import read_chat_template_kwargs
from ..policies.quantized import rounding
from ..policies.tiny import tiny_policy_path
from ..quiet import hush_commands
from ..tasks import check_task_name, load_task
from ..utils import check_writable, errors_in_a_line, processes, read_mapping, use_all_cores
from .data import OwnData
from .groups import EVALUATE, INHERITED
from .interrupt import ending_in_a_line, how_to_go_on, typed
from .options import OptionParser
from .parser import PROG


MOST = 500  # questions of a task of `train`, unless `--limit` says
FEWEST = 16  # training rows of such a task, which nobody sees


@dataclass
class EvaluateArguments(OwnData):
    """What to measure."""

    measures_only = True
    task = None  # there are `tasks`, and own rows beside them
    tasks: list[str] = field(default_factory=list, metadata={"help": "Names of tasks."})
    train_file: str | None = field(
        default=None, metadata={"help": "Rows whose last ones are measured with `reward_funcs`, or rows for a task."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Rows that are measured with `reward_funcs`, or rows for a task."}
    )
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
        self.take_task()
        own = [task for task in self.tasks if task not in TASK_NAMES]
        for task in own:
            check_task_name(task, TASK_NAMES)
        if (self.train_file or self.eval_file) and not self.is_own and not own:
            raise ValueError(
                "`--train_file` and `--eval_file` need `--reward_funcs`, or a task of `train` that reads them."
            )

    def further(self) -> dict[str, TaskBenchmark]:
        """What is measured beside benchmarks, by its name: tasks of `train`, and rows of the user's own."""
        size = self.limit or MOST
        files = (None, None) if self.is_own else (self.train_file, self.eval_file)
        found = {
            name: benchmark_of(load_task(name, *files, FEWEST, size, 0), name)
            for name in self.tasks
            if name not in TASK_NAMES
        }
        if self.is_own:
            task = self.load_task(sys.maxsize, size, 0)
            found[task.name] = benchmark_of(task)
        return found


def run(args: EvaluateArguments) -> None:
    """Measures, and prints the table."""
    use_all_cores()
    state = processes()
    check_writable(args.output_dir, "--output_dir")
    further = args.further()  # all of this before the weights are loaded
    check_tasks(
        [task for task in args.tasks if task not in further], args.data_dir, args.allow_code_execution, bool(further)
    )
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
        about={"model": args.model_name_or_path, "adapter": args.adapter_name_or_path, "command": typed()},
        further=further,
    )
    results = evaluation.run([*args.tasks, *(name for name in further if name not in args.tasks)])
    state.print(markdown(results))
    state.print(f"Results, and every question with its response, are in {args.output_dir}.")
    state.print(f"Next, to compare with another policy: {next_command(args)}")


def next_command(args: EvaluateArguments) -> str:
    """The command that measures another policy in the same way."""
    own = ("tasks", "model_name_or_path", "adapter_name_or_path", "tokenizer_name_or_path", "output_dir")
    words = [PROG, "evaluate", *(["--tasks", *args.tasks] if args.tasks else []), "--model_name_or_path", "OTHER"]
    for one in fields(args):
        value = getattr(args, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if one.name not in own and value != default:
            words += [f"--{one.name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, "--output_dir", f"{args.output_dir.rstrip('/')}_other"])


def kept(args: EvaluateArguments | None) -> str:
    """What an interrupted evaluation has, and how to go on."""
    if args is None:
        return ""
    own = [args.dataset_name or args.train_file or args.eval_file] if args.is_own else []
    names = [f"{measurement_name(str(task), seed)}.json" for task in (*args.tasks, *own) for seed in args.seeds]
    done = sum(Path(args.output_dir, name).exists() for name in names)
    return f"{done} of {len(names)} measurements are kept in {args.output_dir}. {how_to_go_on()}"


KINDS = (EvaluateArguments,)  # which have the options


def parse(arguments: list[str] | None = None) -> EvaluateArguments:
    """Reads options, those of the command line by default."""
    (found,) = cast("tuple[EvaluateArguments]", _parser().read(arguments))
    return found


def _parser() -> OptionParser:
    return OptionParser("evaluate", KINDS, __doc__, EVALUATE, INHERITED)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command, with the options of the command line by default."""
    hush_commands()
    args = None
    with ending_in_a_line(lambda: kept(args)), errors_in_a_line():
        args = parse(arguments)
        run(args)


if __name__ == "__main__":
    main()
