"""
A Slurm of this machine: commands `srun` and `scontrol`, and the variables of a job, for the shipped script of a job. The nodes are
processes that share the loopback address.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import psutil

from tests.processes import HANGS
from trl_diffusion.commands import train


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "recipes" / "slurm" / "train.sbatch"

# Starts the task on each node. If one fails, the others are ended, as `--kill-on-bad-exit` says.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$SLURM_HERE/srun_options"; shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
code=0
for _ in "${tasks[@]}"; do
    wait -n || { failed=$?; ((code)) || code=$failed; kill "${tasks[@]}" 2> /dev/null; }
done
exit "$code"
"""
# Slurm's controller, which ends a job that goes back to the queue; here `Job.requeued` does.
SCONTROL = """#!/bin/bash
echo "$@" >> "$SLURM_HERE/scontrol_calls"
[[ $1 != show ]] || printf '127.0.0.1\\n%.0s' $(seq "$SLURM_JOB_NUM_NODES")
"""


class Job:
    """
    A job of the script.

    Args:
        directory (`Path`): where it is submitted. The commands of the cluster are put there.
        command (`str`): the script that is found as `trl-diffusion`.
        options (`list[str]`): options of the training.
        environment (`dict[str, str]`): further variables, such as `ENGINE`.
    """

    def __init__(self, directory: Path, command: str, options: list[str], environment: dict[str, str]):
        self.directory, self.options = directory, options
        commands = directory / "commands"
        commands.mkdir(parents=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "trl-diffusion": command}.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_"))}
        self.environment = own | {
            "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_HERE": str(directory), "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_CPUS_PER_TASK": "3",
        } | environment  # fmt: skip

    def start(self) -> subprocess.Popen:
        """Starts the script, as the cluster does whenever the job has its nodes."""
        with (self.directory / "job.log").open("a") as log:
            return subprocess.Popen(
                ["bash", str(SCRIPT), *self.options], cwd=self.directory, env=self.environment, stdout=log, stderr=log
            )

    def finished(self) -> int:
        """Runs the script to its end. Returns its exit code."""
        process = self.start()
        try:
            return process.wait(HANGS)
        finally:
            end(process)

    def requeued(
        self, when: Callable[[], bool], then: Callable[[subprocess.Popen], object] = lambda process: None
    ) -> None:
        """
        Runs the script, sends it the signal that announces the time limit, and ends the job after it was requeued.

        Args:
            when (`Callable[[], bool]`): whether it is time for the signal.
            then (`Callable`, *optional*): what the cluster lets happen before it ends the job.
        """
        process = self.start()
        try:
            self._wait(process, when)
            process.send_signal(signal.SIGUSR1)
            self._wait(process, lambda: f"requeue {os.getpid()}" in self.calls())
            assert process.poll() is None, self.log()
            then(process)
        finally:
            end(process)

    def _wait(self, process: subprocess.Popen, when: Callable[[], bool]) -> None:
        limit = time.monotonic() + HANGS
        while not when():
            hangs = time.monotonic() > limit
            assert process.poll() is None and not hangs, self.log()
            time.sleep(0.1)

    def calls(self) -> list[str]:
        """What `scontrol` was asked."""
        path = self.directory / "scontrol_calls"
        return path.read_text().splitlines() if path.exists() else []

    def log(self) -> str:
        return (self.directory / "job.log").read_text()


def train_here(rank: int, directory: str, options: list[str]) -> None:
    """Trains in this process, which is one of several of the same machine."""
    os.chdir(directory)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with open(f"log_{rank}", "w") as log, redirect_stdout(log):
        train.main(options)


def end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started, wherever they are, without a warning."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.kill()
    process.wait()
