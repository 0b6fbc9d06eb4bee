"""A queue of runs. A run that is done is never repeated; what was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ..trainer.checkpoints import only_training_in
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


def digest(plan: dict[str, Any]) -> str:
    """A short name of a plan. Every row has that of its study, so that rows of different studies are told apart."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]


def unpack(directory: Path, plan: str) -> None:
    """
    Writes the rows of `rows.jsonl` to files of their own, if there are none, so that a study can go on from this file alone. Policies are
    pretrained again where a run that is not done yet needs them.

    Args:
        directory (`Path`): of the study.
        plan (`str`): digest of its plan.

    Raises:
        ValueError: for a row of another study, or one that cannot be read.
    """
    path = directory / TABLE
    if (directory / ROWS).is_dir() or not path.is_file():
        return
    rows = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            name, of = row["name"], row["plan"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not the row of a run ({error!r}).") from error
        if of != plan:
            raise ValueError(
                f"{path}, line {number}: the row of a study with another plan ({of}, and this one is {plan}). Give another "
                "`--output_dir`."
            )
        rows[name] = line
    (directory / ROWS).mkdir()
    for name, line in rows.items():
        write_text(directory / ROWS / f"{name}.json", line + "\n")


def run(study: Study, directory: Path, workers: int, say: Callable[[str], None] = print) -> None:
    """
    Does the runs that are not done yet. If one of them fails, those that do not need it are done nevertheless.

    Args:
        study ([`Study`]): which runs.
        directory (`Path`): where rows and policies are kept.
        workers (`int`): processes, of one thread each.
        say (`Callable`): called with a line at the beginning, and with one for each run that is done.

    Raises:
        ValueError: if `directory` holds a study with another plan, for what no run could do, and at the end if a run has failed.
    """
    study.check()
    directory.mkdir(parents=True, exist_ok=True)
    with only_training_in(directory):
        _keep_plan(study.plan(), directory)
        unpack(directory, digest(study.plan()))
        (directory / ROWS).mkdir(exist_ok=True)
        left = unfinished(study, directory)
        say(f"{len(study.jobs())} runs, {len(left)} left, {workers} at once. Output: {directory}")
        failed = _do_all(study, left, directory, workers, say)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(study.jobs())} runs failed or need one that did. The first: {failed[0]}"
        )


def _do_all(study: Study, left: list[Job], directory: Path, workers: int, say: Callable[[str], None]) -> list[str]:
    """Does runs. Returns what to say about each that failed."""
    total, running, failed = len(left), dict[Future, Job](), list[str]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            while left or running:
                for job in list(_ready(study, left, directory, workers - len(running))):
                    left.remove(job)
                    running[pool.submit(_do, study, job, directory)] = job
                if not running:  # what is left needs a run that failed, or whose row is gone
                    return failed + [f"{job.name}: a run that it needs has no row." for job in left]
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise ChildProcessError(
                            f"The process of {job.name} was ended, perhaps for want of memory."
                        ) from error
                    text = f"failed: {type(error).__name__}: {error}" if error else future.result()
                    failed += [f"{job.name}: {text}"] if error else []
                    say(f"{total - len(left) - len(running)} of {total}: {job.name}: {text}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failed


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
    if (directory / ROWS).is_dir() or (directory / TABLE).is_file():
        raise ValueError(f"{directory} holds rows of a study, but no {PLAN}. Give the study another `--output_dir`.")
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
    head = {"name": job.name, "plan": digest(study.plan())}
    write_text(row_path(job, directory), json.dumps({**head, **asdict(job), **row}) + "\n")
    return text
