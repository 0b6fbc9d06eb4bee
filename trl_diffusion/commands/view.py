"""
Shows how a stored response was denoised, or how a run went.

    trl-diffusion view DATASET ROW                          # first response: trajectory_ROW_0.png
    trl-diffusion view DATASET ROW --response 3             # its fourth one
    trl-diffusion view DATASET ROW --output page.html       # a page for a browser, with a slider
    trl-diffusion view DATASET ROW --tokenizer path/to/it   # if DATASET does not know its tokenizer
    trl-diffusion view RUN                                  # the run in six panels: run.png
    trl-diffusion view RUN RUN RUN --output rounds.png      # several runs in one picture

DATASET is a directory of trajectories, such as collecting leaves; an interrupted collection will do. Rows and
responses are counted from 0. Besides the picture it prints the prompt, the final text, and how many tokens it took how
many steps to make, how sure the policy was of them, and what the reward functions gave.

RUN is the output directory of a training run, or one of its checkpoints. Besides the picture it prints the first and the last
value of each curve. A run on stored responses does not show their rewards, which training does not change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..policies.loading import load_tokenizer
from ..policies.spec import DiffusionSpec
from ..trajectories.dataset import FORMAT_VERSION, OWN_COLUMNS, REWARD_PREFIX, from_rows, load_row
from ..trajectories.fingerprint import fingerprint_tokenizer
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import check_writable, printable, read_record
from ..viz.html import trajectory_html
from ..viz.plots import MOST_CELLS, num_cells, plot_runs, plot_trajectory
from ..viz.runs import STATE, describe, read_run, state_file
from ..viz.stays import response_stays
from .direct import run_directly
from .parser import PROG, Parser


SUFFIXES = (".png", ".html")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command, with the options of the command line by default; see [`run_directly`]."""
    return run_directly(_parser(), arguments, lambda options: print(printable(_show(options))))


def _parser() -> Parser:
    parser = Parser(
        f"{PROG} view",
        usage="%(prog)s DATASET ROW [options], or %(prog)s RUN [RUN ...] [--output FILE]",
        description=__doc__,
    )
    parser.add_argument(
        "paths", metavar="DATASET ROW | RUN ...", nargs="+",
        help="directory of trajectories, and which row of it (a prompt with its responses); or output directories of runs",
    )  # fmt: skip
    parser.add_argument("--response", type=int, metavar="N", help="which response to the row's prompt (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="picture (.png) or, of a response, page (.html) to write (default: trajectory_ROW_RESPONSE.png, run.png for a "
        "run, runs.png for several)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="path or hub id (default: what DATASET/collection.json names, or else DATASET/tokenizer)",
    )
    return parser


def _show(options: argparse.Namespace) -> str:
    """Writes the picture; what there is to say about it."""
    if state_file(options.paths[0]):
        return _show_runs(options)
    options.dataset, options.row = _place(options.paths)
    options.response = options.response or 0
    index, response = options.row, options.response
    output = options.output or Path(f"trajectory_{index}_{response}.png")
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output must end in {' or '.join(SUFFIXES)}, got {output}.")
    row = _row(options.dataset, index)
    if not 0 <= response < len(row["canvas_lengths"]):
        raise ValueError(
            f"There is no response {response} in row {index}: it has {_count(len(row['canvas_lengths']))}."
        )
    check_writable(output.parent, "--output")
    with _damage_named(options, response):
        spec = DiffusionSpec.from_dict(json.loads(row["spec"]))
        batch = from_rows([(row, response)], spec)
    tokenizer = _tokenizer(options.dataset, options.tokenizer)
    if fingerprint_tokenizer(tokenizer) != row["tokenizer_fingerprint"]:
        print(
            "warning: the trajectories were made with another tokenizer, so the text may be wrong; --tokenizer names "
            "the one to use",
            file=sys.stderr,
        )
    recorded = row["event_logps"] is not None
    rewards = {name.removeprefix(REWARD_PREFIX): row[name] for name in row if name.startswith(REWARD_PREFIX)}
    title = f"row {index}, response {response}"
    if output.suffix.lower() == ".html":
        _write_page(options, row, spec, tokenizer, output, title, rewards)
    else:
        _draw(batch, spec, tokenizer, output, title, recorded)

    return "\n".join(
        [
            str(output),
            f"prompt: {tokenizer.decode(row['prompt_ids'])}",
            f"text: {tokenizer.decode(batch.completions()[0], skip_special_tokens=True)}",
            _numbers(batch, spec, {name: values[response] for name, values in rewards.items() if values}, recorded),
        ]
    )


@contextmanager
def _damage_named(options: argparse.Namespace, response: int) -> Iterator[None]:
    """Inside, what cannot be read is an error that names the response."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Row {options.row}, response {response} of {options.dataset} is damaged ({error})."
        ) from error


def _write_page(
    options: argparse.Namespace, row: dict[str, Any], spec: DiffusionSpec, tokenizer, output: Path, title: str, rewards
) -> None:
    """The page of a response, which shows the others of its row, too."""
    group = []
    for response in range(len(row["canvas_lengths"])):
        with _damage_named(options, response):
            group.append(from_rows([(row, response)], spec))
    batch = TrajectoryBatch.concatenate(group)
    if row["event_logps"] is None:
        batch = _unrecorded(batch)
    with _damage_named(options, options.response):
        decoding = dict(json.loads(row["decoding"]))
    trajectory_html(
        batch,
        spec,
        tokenizer,
        output,
        options.response,
        title,
        rewards={name: values for name, values in rewards.items() if values},
        policy=_policy(options.dataset, row["policy_fingerprint"]),
        decoding=decoding,
    )


def _policy(directory: Path, fingerprint: str | None) -> str:
    try:
        name = _plan(directory).get("policy")
    except ValueError:  # it can be shown without
        name = None
    return f"{name or 'unknown'}, fingerprint {fingerprint or 'unknown'}"


def _show_runs(options: argparse.Namespace) -> str:
    """Writes the picture of some runs; what there is to say about them."""
    for name in ("response", "tokenizer"):
        if getattr(options, name) is not None:
            raise ValueError(f"{options.paths[0]} is a run, for which --{name} means nothing. Leave it out.")
    output = options.output or Path("run.png" if len(options.paths) == 1 else "runs.png")
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output of a run must end in .png, got {output}.")
    runs = [read_run(path) for path in options.paths]
    check_writable(output.parent, "--output")
    words = "\n".join(describe(run) for run in runs)
    try:
        plot_runs(runs, output)
    except ImportError as error:
        if options.output:
            raise
        return f"{words}\nNo picture was drawn: {error}"
    return f"{output}\n{words}"


def _place(paths: list[str]) -> tuple[Path, int]:
    """The dataset and the row that the command names."""
    dataset, *rest = paths
    if not Path(dataset).is_dir():
        raise FileNotFoundError(
            f"There is no directory {dataset}. Give one that `collect` has written, or the output directory of a run."
        )
    if not rest:
        raise ValueError(
            f"{dataset} is not a run: neither it nor a checkpoint in it has a {STATE}. If it holds trajectories, say which row: "
            f"trl-diffusion view {dataset} 0"
        )
    if len(rest) > 1:
        raise ValueError(f"{dataset} is not a run, and takes one row, got {rest}. Give DATASET ROW, or only runs.")
    try:
        return Path(dataset), int(rest[0])
    except ValueError:
        raise ValueError(f"ROW must be a whole number, got {rest[0]!r}.") from None


def _row(directory: Path, index: int) -> dict[str, Any]:
    row, count = load_row(directory, index)
    if row is None:
        raise ValueError(f"There is no row {index} in {directory}: it has {_count(count)}.")
    missing = sorted(set(OWN_COLUMNS) - {"row"} - set(row))
    if missing:
        raise ValueError(
            f"{directory} does not hold trajectories: it lacks the columns {missing}. Give a directory that `collect` has written."
        )
    if row["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"Row {index} of {directory} has format version {row['format_version']}; this version of trl_diffusion "
            f"reads {FORMAT_VERSION}. Collect the responses again, or use the version that stored them."
        )
    return row


def _count(number: int) -> str:
    return f"{number} (0 to {number - 1})" if number else "none"


def _plan(directory: Path) -> dict[str, Any]:
    """What the collection says about itself."""
    plan = directory / "collection.json"
    return read_record(plan, advice="Pass --tokenizer PATH.") if plan.exists() else {}


def _tokenizer(directory: Path, given: str | None) -> PreTrainedTokenizerBase:
    name = given or _plan(directory).get("tokenizer")
    if not name and (directory / "tokenizer").is_dir():
        name = str(directory / "tokenizer")
    if not name:
        raise ValueError(f"Nothing in {directory} says which tokenizer made it. Pass --tokenizer PATH.")
    try:
        return load_tokenizer(name)
    except (OSError, ValueError, KeyError) as error:
        hint = "" if given else " Pass another one as --tokenizer PATH."
        raise ValueError(f"The tokenizer {name} cannot be loaded ({str(error).splitlines()[0]}).{hint}") from error


def _draw(batch: TrajectoryBatch, spec: DiffusionSpec, tokenizer, output: Path, title: str, recorded: bool) -> None:
    batch = batch if recorded else _unrecorded(batch)
    page = f"--output {output.with_suffix('.html')}"
    positions, cells = int(batch.canvas_lengths[0]), num_cells(batch, spec)
    if cells > MOST_CELLS:
        raise ValueError(
            f"{positions} positions in {cells // positions} steps are too many for a PNG. Write a page: {page}"
        )
    try:
        plot_trajectory(batch, spec, tokenizer, output, title=title)
    except ImportError as error:
        raise ImportError(
            f"A PNG needs matplotlib: pip install 'trl-diffusion[viz]'. Or write a page, which does not: {page}"
        ) from error


def _unrecorded(batch: TrajectoryBatch) -> TrajectoryBatch:
    """The responses with NaN for every log-probability."""
    revisions = batch.revisions
    if revisions is not None:
        revisions = replace(revisions, logps=torch.full_like(revisions.logps, torch.nan))
    return replace(batch, logps=torch.full_like(batch.logps, torch.nan), revisions=revisions)


def _numbers(batch: TrajectoryBatch, spec: DiffusionSpec, rewards: dict[str, float | None], recorded: bool) -> str:
    counted = batch.completion_mask
    tokens = int(counted.sum())
    steps = len({stay.first for stays in response_stays(batch, spec, 0)[:tokens] for stay in stays})
    mean = f"{batch.logps[counted].exp().mean():.3f}" if recorded else "not recorded"
    parts = [
        f"{tokens} tokens",
        f"{steps} steps",
        f"{tokens / max(steps, 1):.2f} tokens per step",
        f"mean probability {mean}",
    ]
    parts += [f"reward {name} {'n/a' if value is None else f'{value:g}'}" for name, value in rewards.items()]
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
