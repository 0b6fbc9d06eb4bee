"""The script of a Slurm job, on two nodes that are processes of this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from tests.distributed.launching import cpu_config
from tests.distributed.slurm import SCRIPT, Job, train_here
from tests.processes import HANGS, ROOT, run_pair
from trl_diffusion.agreement import check_shared
from trl_diffusion.cli import launch_command
from trl_diffusion.commands.parser import MACHINES, starting_parser


# In place of the command: notes its node and its words, and does what the test says.
NOTING = """#!/bin/bash
printf '%s\\n' "$@" > "$SLURM_HERE/words_$SLURM_NODEID"
{then}
"""
COMMAND = f"""#!/bin/bash
exec {shlex.quote(sys.executable)} -m trl_diffusion "$@"
"""


def words_of(job: Job, node: int) -> list[str]:
    return (job.directory / f"words_{node}").read_text().splitlines()


def test_the_script_is_a_script():
    """Bash can read it, and its first lines ask for what the text of the page says."""
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", str(SCRIPT)], check=True)
    asked = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    assert len(asked) == SCRIPT.read_text().count("#SBATCH") and len(dict(asked)) == len(asked)
    assert {"requeue": "", "signal": "B:USR1@120", "open-mode": "append"}.items() <= dict(asked).items()
    assert (
        dict(asked)["nodes"] == "2" and dict(asked)["gpus-per-node"] == "8" and dict(asked)["ntasks-per-node"] == "1"
    )


@pytest.mark.parametrize("engine", ["zero3_2x8", "fsdp2_2x8"])
def test_what_the_nodes_run(engine, tmp_path):
    """Options in the order given, words with spaces in one piece, a rank for each node, and names that the launcher knows."""
    options = ["--config", "llada_8gpu", "--output_dir", "a directory"]
    job = Job(tmp_path, NOTING.format(then=""), options, {"ENGINE": engine, "SLURM_GPUS_ON_NODE": "8"})
    assert job.finished() == 0, job.log()
    assert set(job.calls()) == {"show hostnames node[0-1]"}
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=3"} == set((tmp_path / "srun_options").read_text().split())
    ports = set()
    for node in range(2):
        command, *words = words_of(job, node)
        assert command == "train" and words[-4:] == options
        known, rest = starting_parser("train").parse_own_args(words)
        assert rest == ["--resume_from_checkpoint", "true", "--output_dir", "a directory"]
        machines = {name: getattr(known, name) for name in MACHINES}
        launcher = launch_command("train", rest, known.accelerate_config, known.num_processes, **machines)
        launch = launch_command_parser().parse_args(launcher[3:])
        assert Path(launch.config_file) == ROOT / "recipes" / "accelerate" / f"{engine}.yaml"
        assert (launch.num_machines, launch.num_processes, launch.machine_rank) == (2, 16, node)
        assert launch.main_process_ip == "127.0.0.1"
        ports.add(launch.main_process_port)
    assert len(ports) == 1 and 20000 <= ports.pop() < 30000


def test_a_node_that_fails_ends_the_job(tmp_path):
    """With its exit code, without waiting for the other node, and without another try."""
    then = "[[ $SLURM_NODEID == 0 ]] || exit 3; exec sleep 1000"
    job = Job(tmp_path, NOTING.format(then=then), [], {})
    assert job.finished() == 3, job.log()
    assert not [call for call in job.calls() if call.startswith("requeue")]


def test_a_time_limit_requeues_and_the_training_goes_on_meanwhile(tmp_path):
    """The signal ends the script's waiting, and not the training. If the cluster lets it, the training may even end."""
    then = 'while [[ ! -e "$SLURM_HERE/go_on" ]]; do sleep 0.1; done; exit 4'
    job = Job(tmp_path, NOTING.format(then=then), [], {})
    codes = []

    def go_on(process: subprocess.Popen) -> None:
        (tmp_path / "go_on").touch()
        codes.append(process.wait(HANGS))

    job.requeued(lambda: all((tmp_path / f"words_{node}").exists() for node in range(2)), go_on)
    assert codes == [4] and "The time limit is near" in job.log()


# ------------------------------------------------------------------------------------------------------ a whole training

# Rewards that wait for as long as the test wants, in the first rollout after the third update.
REWARDS = """
import time
from pathlib import Path

def digits(completions, **kwargs):
    while Path("hold").exists() and Path("outputs/checkpoint-3/checkpoint_complete").exists():
        time.sleep(0.05)
    return [float(sum(int(one) * place for place, one in enumerate(text) if one.isdigit())) for text in completions]
"""
# Rollouts of two updates each, so that the checkpoint is inside one.
OPTIONS = """
    --train_file rows.jsonl --reward_funcs ./rewards.py:digits --max_steps 6 --save_steps 3 --num_iterations 2 --logging_steps 1
    --per_device_train_batch_size 4 --num_generations 4 --max_completion_length 9 --eval_size 2 --use_cpu true --output_dir outputs
""".split()


def training(directory: Path) -> Job:
    """A training of the embedded policy on two nodes with a process each (DDP, gloo)."""
    directory.mkdir()
    (directory / "rewards.py").write_text(REWARDS)
    rows = [json.dumps({"prompt": f"sudoku {index:016d}"}) for index in range(12)]
    (directory / "rows.jsonl").write_text("\n".join(rows))
    config = cpu_config("ddp", directory)
    several = {"num_machines": 2, "rdzv_backend": "static", "same_network": True}
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **several}))
    environment = {"ENGINE": str(config), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return Job(directory, COMMAND, OPTIONS, environment)


def outcome(directory: Path) -> tuple[dict, list[tuple]]:
    """The weights of a training, and the steps in its log."""
    log = json.loads((directory / "outputs" / "trainer_state.json").read_text())["log_history"]
    steps = [(one["step"], one["loss"], one["grad_norm"], one.get("reward")) for one in log if "loss" in one]
    return load_file(directory / "outputs" / "model.safetensors"), steps


@pytest.mark.distributed
def test_a_requeued_training_is_the_uninterrupted_one(tmp_path):
    """
    Both nodes are killed after the fourth update, of which nothing is kept, and the same script starts them again. Weights and log are
    bit for bit those of two processes of one machine that were never interrupted.
    """
    job, kept = training(tmp_path / "job"), tmp_path / "job" / "outputs" / "checkpoint-3" / "checkpoint_complete"
    (job.directory / "hold").touch()
    job.requeued(kept.exists)
    assert not (job.directory / "outputs" / "model.safetensors").exists()
    (job.directory / "hold").unlink()
    assert job.finished() == 0, job.log()
    for line in (
        "There is no complete checkpoint in outputs: training starts from the beginning.",
        "6 updates, each on 8",
        "; 3 are done.",
    ):
        assert job.log().count(line) == 1 + (line == "6 updates, each on 8"), (
            job.log()
        )  # the first machine speaks for both
    run_pair(train_here, str(training(tmp_path / "whole").directory), OPTIONS)
    (weights, steps), (expected, expected_steps) = outcome(job.directory), outcome(tmp_path / "whole")
    assert steps == expected_steps and [step for step, *_ in steps] == [1, 2, 3, 4, 5, 6]
    assert any(norm > 0 for _, _, norm, _ in steps)  # there was something to learn
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------------- a directory for all


def look(rank: int, directories: list[str]) -> str:
    """What a process says of the directory that should be that of all."""
    os.chdir(directories[rank])
    try:
        check_shared(Accelerator(cpu=True), "outputs")
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("shared", [True, False])
def test_a_directory_that_the_machines_do_not_share(shared, tmp_path):
    """It is found when training begins, and not when it should go on. Nothing is left behind."""
    directories = [tmp_path / ("same" if shared else name) for name in ("first", "second")]
    for directory in directories:
        directory.mkdir(exist_ok=True)
    first, second = run_pair(look, list(map(str, directories)))
    assert not list(tmp_path.rglob(".unfinished-*"))
    if shared:
        assert first == second == ""
    else:
        assert re.match(
            "ValueError: .*/second/outputs on .* is not the directory .*: choose an `output_dir` on a disk", second
        )
        assert re.match(
            "RuntimeError: Looking for `output_dir` failed on another process, .* process 1: ValueError", first
        )
