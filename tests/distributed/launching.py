"""
Starts two processes with `accelerate launch`, and never waits for them longer than it said.

To start them and to import everything takes most of the time. So there are two launches for all tests, one without DeepSpeed
and one with it, and each runs many scenarios, one after another (`scenarios.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import psutil
import pytest
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from tests.processes import HANGS


ROOT = Path(__file__).resolve().parents[2]
START, SCENARIOS = (ROOT / "tests" / "distributed" / name for name in ("start.py", "scenarios.py"))

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def cpu_config(engine: str, directory: Path, partition_all: bool = False) -> Path:
    """
    The shipped `recipes/accelerate/ENGINE.yaml` with nothing changed but what two CPU processes need.

    `partition_all`: ZeRO-3 keeps weights of fewer than 100,000 elements whole on every process, which are all of a small
    policy's; this makes it share them like others.
    """
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{engine}.yaml").read_text())
    config.update(num_processes=2, mixed_precision="no", use_cpu=True)
    if partition_all:
        shipped = config["deepspeed_config"]
        settings = {
            "zero_optimization": {
                "stage": shipped["zero_stage"],
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": shipped["zero3_save_16bit_model"],
            },
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": shipped["gradient_accumulation_steps"],
            "gradient_clipping": shipped["gradient_clipping"],
        }
        (directory / "deepspeed.json").write_text(json.dumps(settings))
        del config["mixed_precision"]  # accelerate takes it from one file only
        config["deepspeed_config"] = {
            "deepspeed_config_file": str(directory / "deepspeed.json"),
            "zero3_init_flag": shipped["zero3_init_flag"],
        }
    path = directory / f"{engine}{'-all' * partition_all}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment_of(engine: str, directory: Path, partition_all: bool = False) -> dict[str, str]:
    """What `accelerate launch` tells the processes of a DeepSpeed engine about it."""
    config = cpu_config(engine, directory, partition_all)
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(config), "--main_process_port", "0", "script.py"]
    )
    with mock.patch("accelerate.commands.launch.deepspeed_launcher") as launcher:
        launch_command(arguments)
    _, environment = prepare_deepspeed_cmd_env(*launcher.call_args.args)
    return {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}


def launch(engine: str, directory: Path, scenarios: list[dict], timeout: float = HANGS) -> tuple[int, str]:
    """
    Runs scenarios on two processes.

    Args:
        engine (`str`): the file of `recipes/accelerate` that the processes are started with.
        directory (`Path`): where each scenario gets a directory of its name.
        scenarios (`list[dict]`): see `scenarios.py`.
        timeout (`float`): in seconds.

    Returns:
        `(return code, output)`, standard output and error together.

    Raises:
        AssertionError: if it is not done within `timeout` seconds. All its processes are ended then.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    config = cpu_config(engine, directory)
    (directory / "scenarios.json").write_text(json.dumps(scenarios))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
               "--main_process_port", "0", str(START), str(SCENARIOS), str(directory)]  # fmt: skip
    log = directory / f"{engine}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"Not done after {timeout} seconds:\n{log.read_text()[-3000:]}") from None
        finally:
            if process.poll() is None:
                family = psutil.Process(process.pid)
                for member in [*family.children(recursive=True), family]:  # the workers are in sessions of their own
                    member.kill()
    return code, log.read_text()
