"""A queue of runs. A run that is done is never repeated; what was interrupted goes on."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ..utils import read_record, read_text, versions, write_text


ROWS, TABLE, POLICIES, PLAN = "rows", "rows.jsonl", "policies", "study.json"
Row = dict[str, Any]


class Job(Protocol):
    """A run: a frozen dataclass, whose fields are the first entries of its row."""

    @property
    def name(self) -> str:
        """The name of its row, as a file name."""


class Study(Protocol):
    """A set of runs. It must be one that can be pickled."""

    def plan(self) -> dict[str, Any]:
        """What must be the same when a study goes on, as plain JSON types."""

    def check(self) -> None:
        """Raises a `ValueError` or an `ImportError` for what no run could do."""

    def jobs(self) -> list[Any]:
        """All runs, each after those that it needs."""

    def needs(self, job: Any) -> list[Any]:
        """The runs that come before a run."""

    def do(self, job: Any, directory: Path) -> tuple[Row, str]:
        """Does a run. Returns what its row has besides the fields of the job, and what to say about it."""


def row_path(job: Job, directory: Path) -> Path:
    """Where the row of a run is kept."""
    return directory / ROWS / f"{job.name}.json"


def read_row(job: Job, directory: Path) -> Row:
    """The row of a run that is done."""
    return read_record(row_path(job, directory), advice="Delete it to have the run done again.")


def unfinished(study: Study, directory: Path) -> list[Job]:
    """The runs that are not done yet."""
    return [job for job in study.jobs() if not row_path(job, directory).is_file()]


def unpack(directory: Path) -> None:
    """
    Writes a file for each row of `rows.jsonl` that has none, so that a study can go on from this file and its plan alone. Policies are
    trained again where a run that is not done yet needs them.
    """
    path = directory / TABLE
    if not path.is_file():
        return
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            name = json.loads(line)["name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not the row of a run ({error!r}).") from error
        file = directory / ROWS / f"{name}.json"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            write_text(file, line + "\n")


def run(study: Study, directory: Path, workers: int, say: Callable[[str], None] = print) -> None:
    """
    Does the runs that are not done yet.

    Args:
        study ([`Study`]): which runs.
        directory (`Path`): where rows and policies are kept.
        workers (`int`): processes, of one thread each.
        say (`Callable`): called with a line for each run that is done.

    Raises:
        ValueError: if `directory` holds a study with another plan, or for what no run could do.
    """
    study.check()
    _keep_plan(study.plan(), directory)
    unpack(directory)
    left = unfinished(study, directory)
    total, running = len(left), dict[Future, Job]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            while left or running:
                for job in list(_ready(study, left, directory, workers - len(running))):
                    left.remove(job)
                    running[pool.submit(_do, study, job, directory)] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    say(f"{total - len(left) - len(running)} of {total}: {job.name}: {future.result()}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _ready(study: Study, left: list[Job], directory: Path, most: int) -> Iterator[Job]:
    for job in left:
        if most <= 0:
            return
        if all(row_path(needed, directory).is_file() for needed in study.needs(job)):
            most -= 1
            yield job


def _keep_plan(plan: dict[str, Any], directory: Path) -> None:
    """Writes down the plan of a study, or checks that it is that of the study that goes on."""
    path = directory / PLAN
    if path.is_file():
        before = read_record(path, ("plan",), "Give the study another `--output_dir`.")["plan"]
        changed = sorted(name for name in {*plan, *before} if before.get(name) != plan.get(name))
        if changed:
            said = "; ".join(f"`{name}` was {before.get(name)!r} and is {plan.get(name)!r}" for name in changed)
            raise ValueError(f"{directory} holds a study with another plan: {said}. Give it another `--output_dir`.")
        return
    (directory / ROWS).mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"plan": plan, "versions": versions()}, indent=2) + "\n")


def _start_worker() -> None:
    """
    One thread for each process, and nothing in the terminal but what the queue says. A worker ends with the process that started it,
    however that ends: otherwise its run would go on beside that of the next command.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _do(study: Study, job: Any, directory: Path) -> str:
    """Does a run and keeps its row. Returns what to say about it."""
    row, text = study.do(job, directory)
    write_text(row_path(job, directory), json.dumps({"name": job.name, **asdict(job), **row}) + "\n")
    return text
