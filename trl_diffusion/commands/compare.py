"""
Compares autoregressive and diffusion policies on equal terms: the same backbone, data, tokens, prompts, rewards and updates.

    trl-diffusion compare --quick                          # one task, three arms, two seeds: minutes on 2 cores
    trl-diffusion compare --output_dir outputs/compare     # four tasks, eight arms, five seeds: about 10 hours of a core
    trl-diffusion compare --study updates                  # where training breaks: 31 settings, three seeds, about an hour of a core
    trl-diffusion compare --study scaling                  # four sizes, three amounts of data, three lengths of reinforcement
    trl-diffusion compare --rows outputs/compare --output_dir outputs/report    # the report alone, from finished runs

An arm is a policy and a way to answer. `autoregressive` writes from left to right and is trained by TRL's `GRPOTrainer`. The others are
diffusion policies and are trained by `DTRPOTrainer`: with attention in blocks, with full attention, with full attention in a fixed order
from left to right, and each of these with revision (tokens may be taken back). Every arm is measured at temperatures 0 and 1, after the
same updates and after the same seconds, and at several numbers of forward passes.

Every task needs right answers to learn from. All runs of one seed come before the next seed. A run that is done is kept in `--output_dir`
and never repeated: the same command goes on where it stopped, and may ask for more tasks, arms or seeds. The report is written
when all runs are done; `--rows` writes it earlier. Pretraining, tuning of learning rates and reinforcement are all included.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

from ..experiments.arms import ARMS
from ..experiments.comparison import Comparison
from ..experiments.queue import run
from ..experiments.report import read_rows, write_report
from ..experiments.scaling import scaling
from ..experiments.settings import EQUAL, Sizes
from ..experiments.updates import Updates
from ..fields import check_at_least
from ..links import link
from ..quiet import hush_commands
from ..utils import check_writable
from .direct import run_directly
from .parser import PROG, Parser


# `--quick`: the task on which the order of writing should decide.
QUICK = Comparison(
    tasks=("backward_chain",),
    arms=("autoregressive", "full", "full, revising"),
    seeds=(0, 1),
    variants={"": Sizes(pretrain_updates=500, updates=10, batch_size=128, num_generations=8, seconds=4.0, learning_rates=(3e-4,), eval_size=100,
                        validation_size=50, num_samples=2)},
)  # fmt: skip
STUDIES = {"comparison": "compare", "scaling": "scaling", "updates": "updates"}  # and their directories
_CHANGED = ("pretrain_updates", "updates", "seconds", "hidden_size", "num_layers", "eval_size", "equal")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, with the options of the command line by default; see [`run_directly`]."""
    typed = shlex.join([PROG, "compare", *(sys.argv[1:] if arguments is None else arguments)])
    return run_directly(_parser(), arguments, _run, lambda: f"The runs that are done are kept. To go on: {typed}")


def _run(options: argparse.Namespace) -> None:
    hush_commands()
    directory = Path(options.output_dir or f"outputs/{_default_directory(options)}")
    check_writable(directory, "--output_dir")
    if options.rows is None:
        check_at_least("--workers", options.workers)
        run(study_of(options), directory, options.workers, lambda line: print(line, flush=True))
    elif given := _given(options):
        raise ValueError(f"`--rows` reports finished runs as they are: leave --{given[0]} out.")
    rows = read_rows(options.rows or directory)
    names = write_report(rows, directory)
    print(Path(directory, "report.md").read_text(encoding="utf-8"))
    print(f"{directory} has {', '.join(names)}. What it means: {link('docs/experiments.md')}")
    if options.json:
        print(json.dumps({"rows": rows}))


def _default_directory(options: argparse.Namespace) -> str:
    if options.rows is not None:
        return "report"
    return "compare_quick" if options.quick else STUDIES[options.study]


def _given(options: argparse.Namespace) -> list[str]:
    """The names of the options that say what to run, and were given."""
    return [name for name in ("tasks", "arms", "seeds", "learning_rates", *_CHANGED) if getattr(options, name)] + (
        ["quick"] if options.quick else []
    )


def study_of(options: argparse.Namespace) -> Comparison | Updates:
    """What the options ask for."""
    lists = {name: tuple(getattr(options, name)) for name in ("tasks", "arms", "seeds") if getattr(options, name)}
    sizes = {name: getattr(options, name) for name in _CHANGED if getattr(options, name) is not None}
    if options.learning_rates:
        sizes["learning_rates"] = tuple(options.learning_rates)
    if options.study == "updates":
        given = sorted({*lists, *sizes} - {"seeds", "updates", "eval_size"})
        if given or options.quick:
            raise ValueError(f"`--study updates` has no {', '.join(f'--{name}' for name in given or ['quick'])}.")
        return Updates(**{**lists, **sizes})
    if options.study == "scaling":
        own = sorted({"hidden_size", "num_layers", "quick"} & set(_given(options)))
        if own:
            raise ValueError(
                f"`--study scaling` has no --{own[0]}: it has sizes of its own. Set fewer `--seeds` or `--updates`."
            )
        if len(options.learning_rates or [0]) > 1:
            raise ValueError("`--study scaling` chooses no learning rate. Give one.")
        return scaling(replace(Sizes(), **sizes), **lists)
    start = QUICK if options.quick else Comparison()
    variants = {name: replace(one, **sizes) for name, one in start.variants.items()}
    return replace(start, variants=variants, **lists)


def _parser() -> Parser:
    parser = Parser(f"{PROG} compare", description=__doc__)
    parser.add_argument("--study", choices=tuple(STUDIES), default="comparison", help="which study to run")
    parser.add_argument(
        "--quick", action="store_true", help="a small comparison that ends within 10 minutes on 2 cores"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="names of tasks")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(map(repr, ARMS))}")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="seeds of whole runs, with initial weights of their own"
    )
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        metavar="RATE",
        help="learning rates of reinforcement, of which the best is chosen",
    )
    known = {one.name: one for one in fields(Sizes)}
    helps = {
        "pretrain_updates": f"optimizer steps of pretraining (twice as many for {' and '.join(Sizes().longer)})",
        "updates": "optimizer steps of reinforcement",
        "seconds": "core seconds of reinforcement, for the budget of equal seconds",
        "hidden_size": "width of the backbone",
        "num_layers": "layers of the backbone",
        "eval_size": "puzzles that every policy is measured on",
        "equal": "what pretraining has in common: tokens, or floating-point operations",
    }
    for name, text in helps.items():
        kind = str if name == "equal" else type(known[name].default)
        parser.add_argument(f"--{name}", type=kind, help=text, choices=EQUAL if name == "equal" else None)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes at once, of one thread each"
    )
    parser.add_argument("--rows", type=Path, metavar="PATH", help="write the report of these finished runs (a directory or a "
                        ".jsonl file), and run nothing")  # fmt: skip
    parser.add_argument("--output_dir", help="where runs and the report are kept (outputs/compare)")
    parser.add_argument("--json", action="store_true", help="print all rows as one JSON object on the last line")
    return parser
