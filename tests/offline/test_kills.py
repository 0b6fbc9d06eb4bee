"""
Collecting and training killed (SIGKILL) at random moments: nothing lost, nothing doubled, no unreadable file. And both in
two processes.

A few kills of each by default; TRL_DIFFUSION_KILLS=20 pytest tests/offline/test_kills.py makes it 20.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file

from tests.closeness import close_to
from tests.offline import kill_jobs
from tests.processes import CONTEXT, HANGS, run_pair
from trl_diffusion import load_trajectories
from trl_diffusion.trainer.checkpoints import MARK, last_complete_checkpoint


KILLS = int(os.environ.get("TRL_DIFFUSION_KILLS", "3"))


class Jobs:
    """Runs jobs in processes of a fork server that has imported everything."""

    def __init__(self):
        self.run(kill_jobs.nothing)

    def run(self, job, *arguments, kill_after: float | None = None) -> float | None:
        """Seconds that a job took, `None` if it was killed."""
        process = CONTEXT.Process(target=job, args=[str(argument) for argument in arguments])
        begun = time.perf_counter()
        process.start()
        process.join(HANGS if kill_after is None else kill_after)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return time.perf_counter() - begun
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert kill_after is not None, "the job hangs"
        return None

    def kill_until_done(self, job, arguments, directory: Path, duration: float, done) -> list[Path]:
        """
        Kills a job at random moments, gives it again, and starts afresh whenever it came to its end, until there were
        `KILLS` kills, one of them halfway, and one end. `done` looks at what a kill left and says how much that is, as a
        share of the whole. Returns the directories of the jobs that came to their end.
        """
        rng, kills, halfway, finished = random.Random(0), 0, 0, []
        while kills < KILLS or not halfway or not finished:
            target = directory / f"target-{len(finished)}"
            limit = rng.uniform(0.05, 1.0) * duration
            if kills >= KILLS and halfway:
                limit = None  # now it may end
            took = self.run(job, *arguments, target, kill_after=limit)
            if took is not None:
                finished.append(target)
                continue
            kills += 1
            share = done(target)
            halfway += 0 < share < 1
            if kills > 2 * KILLS and not halfway:
                duration *= 1.5  # the machine has become slower
        print(f"{kills} kills, {halfway} of them halfway; {len(finished)} jobs finished")
        return finished


@pytest.fixture(scope="module")
def jobs():
    return Jobs()


@pytest.mark.slow
def test_killed_collections(jobs, start, tmp_path):
    duration = jobs.run(kill_jobs.collect_job, start, tmp_path / "whole")
    expected = load_trajectories(tmp_path / "whole").to_list()

    def done(target):
        """Whatever is there can be read, is right, and is there once."""
        shards = sorted((target / "data").glob("shard-*.parquet"))
        rows = [row for shard in shards for row in parquet.read_table(shard).to_pylist()]
        assert [row["row"] for row in rows] == sorted({row["row"] for row in rows})
        assert all(row == expected[row["row"]] for row in rows)
        return len(rows) / len(expected)

    for target in jobs.kill_until_done(kill_jobs.collect_job, (start,), tmp_path, duration, done):
        assert load_trajectories(target).to_list() == expected
        assert (target / "README.md").exists() and not list(target.rglob(".unfinished*"))


@pytest.mark.slow
def test_killed_trainings(jobs, start, collection, tmp_path):
    duration = jobs.run(kill_jobs.train_job, start, collection, tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    losses = losses_of(tmp_path / "whole")
    assert sorted(losses) == list(range(1, 13))

    def done(target):
        """Every checkpoint that is marked as complete can be read, and is the newest that a run would go on from."""
        steps = []
        for mark in target.glob(f"checkpoint-*/{MARK}"):
            checkpoint = mark.parent
            assert load_file(checkpoint / "model.safetensors").keys() == weights.keys()
            for name in ("optimizer.pt", "scheduler.pt", "rollout_0.pt"):
                assert torch.load(checkpoint / name, weights_only=True)
            steps.append(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
            assert checkpoint.name == f"checkpoint-{steps[-1]}"
        if steps:
            assert last_complete_checkpoint(target).endswith(f"checkpoint-{max(steps)}")
        return max(steps, default=0) / 12

    for target in jobs.kill_until_done(kill_jobs.train_job, (start, collection), tmp_path, duration, done):
        assert losses_of(target) == losses
        final = load_file(target / "final" / "model.safetensors")
        assert final.keys() == weights.keys() and all(torch.equal(weights[name], final[name]) for name in weights)


@pytest.mark.distributed
def test_two_processes(start, collection, tmp_path):
    """They collect what one collects, and a run that they resume inside a rollout is the uninterrupted one."""
    results = run_pair(kill_jobs.pair_job, str(start), str(tmp_path))
    expected, found = (load_trajectories(path).to_list() for path in (collection, tmp_path / "collected"))
    for a, b in zip(expected, found, strict=True):
        assert {**a, "event_logps": None} == {**b, "event_logps": None}
        for one, other in zip(a["event_logps"], b["event_logps"], strict=True):
            assert one == close_to(other)
    for rank in range(2):
        assert (tmp_path / "online" / "checkpoint-5" / f"rollout_{rank}.pt").exists()
        for source, result in results[rank].items():
            whole, resumed = result["losses"]
            assert whole == resumed and (len(whole) == 7 or rank), source
            assert result["same_weights"], source


def losses_of(target: Path) -> dict[int, float]:
    """Loss of each step, logged once."""
    losses = {}
    for entry in json.loads((target / "final" / "state.json").read_text())["log_history"]:
        if "loss" in entry:
            assert entry["step"] not in losses
            losses[entry["step"]] = entry["loss"]
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
