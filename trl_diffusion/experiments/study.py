"""The runs of a comparison, and the queue that does them: a run that is done is never repeated."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..policies.loading import load_tokenizer
from ..policies.tiny import tiny_policy_path
from ..tasks import load_task
from ..utils import read_record, versions, write_text
from .arms import ARMS
from .settings import Comparison, Sizes


ROWS, POLICIES, PLAN = "rows", "policies", "compare.json"
PRETRAIN, CHOOSE, REINFORCE = "pretrain", "choose", "reinforce"


@dataclass(frozen=True)
class Job:
    """
    A run.

    Attributes:
        kind (`str`): `"pretrain"`, `"choose"` (one learning rate) or `"reinforce"`.
        task (`str`): name of the task.
        what (`str`): the twin that is pretrained, or the arm that is trained.
        seed (`int`): its seed.
        learning_rate (`float`, *optional*): the learning rate that is tried.
    """

    kind: str
    task: str
    what: str
    seed: int
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """The name of its row, as a file name."""
        parts = [self.kind, self.task, self.what.replace(", ", "+").replace(" ", "-"), str(self.seed)]
        if self.learning_rate is not None:
            parts.append(f"{self.learning_rate:g}")
        return "_".join(parts).replace(os.sep, "-").replace(":", "-")

    def path(self, directory: Path) -> Path:
        """Where its row is kept."""
        return directory / ROWS / f"{self.name}.json"

    def needs(self, comparison: Comparison) -> list[Job]:
        """The runs that come before it."""
        if self.kind == PRETRAIN:
            return []
        twin = Job(PRETRAIN, self.task, ARMS[self.what].twin, self.seed)
        return [twin] if self.kind == CHOOSE else [twin, *choices(self.task, self.what, comparison.sizes)]


def choices(task: str, arm: str, sizes: Sizes) -> list[Job]:
    """The runs that choose the learning rate of an arm on a task. There are none if there is only one learning rate."""
    rates = sizes.learning_rates if len(sizes.learning_rates) > 1 else ()
    return [Job(CHOOSE, task, arm, sizes.choice_seed, rate) for rate in rates]


def jobs(comparison: Comparison) -> list[Job]:
    """
    All runs of a comparison, each after those that it needs, seed by seed: the first seed of all tasks and arms is done before the
    second one begins.
    """
    ordered: dict[Job, None] = {}

    def add(job: Job) -> None:
        for needed in job.needs(comparison):
            add(needed)
        ordered.setdefault(job)

    for seed in comparison.seeds:
        for task in comparison.tasks:
            for arm in comparison.arms:
                add(Job(REINFORCE, task, arm, seed))
    return list(ordered)


def run(comparison: Comparison, directory: Path, workers: int, say: Callable[[str], None] = print) -> None:
    """
    Does the runs that are not done yet.

    Args:
        comparison ([`Comparison`]): which runs.
        directory (`Path`): where rows and policies are kept.
        workers (`int`): processes, of one thread each.
        say (`Callable`): called with a line for each run that is done.

    Raises:
        ValueError: if `directory` holds a comparison of other sizes, or a damaged row.
    """
    check_tasks(comparison)
    _keep_plan(comparison.sizes, directory)
    left = [job for job in jobs(comparison) if not job.path(directory).is_file()]
    total, running = len(left), dict[Future, Job]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            while left or running:
                for job in list(_ready(left, comparison, directory, workers - len(running))):
                    left.remove(job)
                    running[pool.submit(do, job, comparison, directory)] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    say(f"{total - len(left) - len(running)} of {total}: {job.name}: {future.result()}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def check_tasks(comparison: Comparison) -> None:
    """Raises a `ValueError` for a task that does not exist, or that has no right answers in the words of the twins' tokenizer."""
    tokenizer = load_tokenizer(tiny_policy_path())
    for name in comparison.tasks:
        task = load_task(name, train_size=1, eval_size=1, seed=comparison.seeds[0])
        (row,) = task.documents(task.train)
        if not isinstance(row["prompt"], str):
            raise ValueError(f"The prompts of the task {name!r} are messages, and the twins have no chat template.")
        for text in (row["prompt"], row["completion"]):
            if tokenizer.unk_token_id in tokenizer(text)["input_ids"]:
                raise ValueError(
                    f"The tokenizer of the twins lacks a character of {text!r:.80}, from the task {name!r}."
                )


def _ready(left: list[Job], comparison: Comparison, directory: Path, most: int) -> Iterator[Job]:
    for job in left:
        if most <= 0:
            return
        if all(needed.path(directory).is_file() for needed in job.needs(comparison)):
            most -= 1
            yield job


def _keep_plan(sizes: Sizes, directory: Path) -> None:
    """Writes down the sizes of a comparison, or checks that they are those of the comparison that goes on."""
    path, plan = directory / PLAN, sizes.to_dict()
    if path.is_file():
        before = read_record(path, ("sizes",), "Give the comparison another `--output_dir`.")["sizes"]
        changed = sorted(name for name in {*plan, *before} if before.get(name) != plan.get(name))
        if changed:
            said = "; ".join(f"`{name}` was {before.get(name)!r} and is {plan.get(name)!r}" for name in changed)
            raise ValueError(
                f"{directory} holds a comparison with other sizes: {said}. Give it another `--output_dir`."
            )
        return
    (directory / ROWS).mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"sizes": plan, "versions": versions()}, indent=2) + "\n")


def _start_worker() -> None:
    """One thread for each process, and nothing in the terminal but what the queue says."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def do(job: Job, comparison: Comparison, directory: Path) -> str:
    """Does a run and keeps its row. Returns what to say about it."""
    from .reinforce import choose, reinforce
    from .twins import Material, pretrain

    material = Material(job.task, job.seed, comparison.sizes)
    if job.kind == PRETRAIN:
        figures = pretrain(material, job.what, _policy(job, directory))
        text = f"loss {figures['loss']:.3f} after {figures['seconds']:.0f} s"
    else:
        arm = ARMS[job.what]
        twin = _policy(Job(PRETRAIN, job.task, arm.twin, job.seed), directory)
        if job.kind == CHOOSE:
            assert job.learning_rate is not None
            figures = choose(material, arm, twin, job.learning_rate)
            text = f"{figures['validation']:.1%}"
        else:
            rate = chosen(job, comparison, directory)
            figures = {"learning_rate": rate, **reinforce(material, arm, twin, rate)}
            text = f"{at_training(figures['before'])} -> {at_training(figures['updates']['points'])}"
    write_text(job.path(directory), json.dumps({**asdict(job), **figures}) + "\n")
    return text


def _policy(job: Job, directory: Path) -> Path:
    return directory / POLICIES / job.name


def at_training(points: list[dict[str, Any]]) -> str:
    """The best solve rate at temperature 1, for a line of the queue."""
    return f"{max(point['solved'] for point in points if point['temperature'] == 1):.1%}"


def chosen(job: Job, comparison: Comparison, directory: Path) -> float:
    """The learning rate with which an arm solved most validation rows of the choice seed."""
    tried = choices(job.task, job.what, comparison.sizes)
    if not tried:
        return comparison.sizes.learning_rates[0]
    best = max(tried, key=lambda one: read_record(one.path(directory), ("validation",))["validation"])
    assert best.learning_rate is not None
    return best.learning_rate
