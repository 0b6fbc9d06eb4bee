"""Collecting and training killed (SIGKILL) at random moments, at least 20 times each: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time

import pyarrow.parquet as parquet
import pytest
from safetensors.torch import load_file

from tests.offline import kill_jobs
from trl_diffusion import load_trajectories
from trl_diffusion.trainer.callbacks import last_complete_checkpoint


KILLS = 20

# They take minutes: TRL_DIFFUSION_KILL_TESTS=1 pytest tests/offline/test_kills.py
asked_for = pytest.mark.skipif(
    "TRL_DIFFUSION_KILL_TESTS" not in os.environ, reason="TRL_DIFFUSION_KILL_TESTS is not set"
)


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.offline.kill_jobs", "trl_diffusion.trainer.trainer"])
    return context


def run(context, job, *arguments, kill_after: float | None = None) -> bool:
    """Runs a job to its end, or kills it; whether it came to its end."""
    process = context.Process(target=job, args=arguments)
    process.start()
    process.join(kill_after if kill_after is not None else 300)
    if process.exitcode is None:
        assert kill_after is not None, "the job hangs"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return False
    assert process.exitcode == 0
    return True


def kill_until_done(context, job, arguments, new_target, duration: float, check) -> list:
    """Kills the job again and again, until it has come to its end after at least `KILLS` kills; all finished targets."""
    rng, kills, finished, target = random.Random(0), 0, [], new_target(0)
    while kills < KILLS or not finished:
        # Most kills come early enough to need several; the last runs may end.
        limit = None if kills >= KILLS else rng.uniform(0.1, 0.9) * duration
        if run(context, job, *arguments(target), kill_after=limit):
            finished.append(target)
            target = new_target(len(finished))
        else:
            kills += 1
            check(target)
    assert kills >= KILLS
    return finished


@asked_for
@pytest.mark.slow
def test_killed_collections(context, start, tmp_path):
    whole = tmp_path / "whole"
    run(context, kill_jobs.collect_job, str(start), str(whole))  # the first one also starts the server
    begun = time.perf_counter()
    run(context, kill_jobs.collect_job, str(start), str(tmp_path / "timed"))
    duration = time.perf_counter() - begun
    expected = load_trajectories(whole).to_list()
    counts = []

    def check(target):
        """Whatever is there can be read, is right, and is there once."""
        shards = sorted((target / "data").glob("shard-*.parquet")) if target.exists() else []
        rows = [row for shard in shards for row in parquet.read_table(shard).to_pylist()]
        assert [row["row"] for row in rows] == sorted({row["row"] for row in rows})
        assert all(row == expected[row["row"]] for row in rows)
        counts.append(len(rows))

    finished = kill_until_done(
        context,
        kill_jobs.collect_job,
        lambda target: (str(start), str(target)),
        lambda number: tmp_path / f"killed-{number}",
        duration,
        check,
    )
    assert any(0 < count < 40 for count in counts)  # kills did hit the middle
    for target in finished:
        assert load_trajectories(target).to_list() == expected
        assert (target / "README.md").exists() and not list(target.rglob(".unfinished*"))


@asked_for
@pytest.mark.slow
def test_killed_trainings(context, start, collection, tmp_path):
    def arguments(target):
        return str(start), str(collection), str(target), str(tmp_path)

    whole = tmp_path / "whole"
    run(context, kill_jobs.train_job, *arguments(whole))
    begun = time.perf_counter()
    run(context, kill_jobs.train_job, *arguments(tmp_path / "timed"))
    duration = time.perf_counter() - begun
    weights = load_file(whole / "final" / "model.safetensors")
    history = losses_of(whole)
    assert len(history) == 30
    resumed = []

    def check(target):
        """The newest complete checkpoint can be read."""
        checkpoint = last_complete_checkpoint(target)
        if checkpoint is not None:
            assert load_file(os.path.join(checkpoint, "model.safetensors")).keys() == weights.keys()
            with open(os.path.join(checkpoint, "trainer_state.json")) as file:
                resumed.append(json.load(file)["global_step"])

    finished = kill_until_done(
        context, kill_jobs.train_job, arguments, lambda number: tmp_path / f"killed-{number}", duration, check
    )
    assert any(0 < step < 30 for step in resumed)
    for target in finished:
        assert losses_of(target) == history
        assert all(
            (weights[name] == value).all() for name, value in load_file(target / "final" / "model.safetensors").items()
        )


def losses_of(target) -> dict[int, float]:
    """Loss of each step; a step that is logged twice must not differ."""
    with open(target / "final" / "state.json") as file:
        log = json.load(file)["log_history"]
    losses = {}
    for entry in log:
        if "loss" in entry:
            assert losses.setdefault(entry["step"], entry["loss"]) == entry["loss"]
    return losses


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, complete in ((2, True), (4, True), (6, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        if complete:
            (tmp_path / f"checkpoint-{step}" / "checkpoint_complete").touch()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "checkpoint_complete").unlink()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-6")  # written by another program
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
