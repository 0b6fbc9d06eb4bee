"""Starts two processes with `accelerate launch`, and never waits for them longer than it said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

from tests.processes import HANGS


ROOT = Path(__file__).resolve().parents[2]
START, JOBS = (ROOT / "tests" / "distributed" / name for name in ("start.py", "jobs.py"))

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
    path = directory / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(
    engine: str, directory: Path, script: Path, *arguments: str, timeout: float = HANGS, partition_all: bool = False
) -> tuple[int, str]:
    """
    Runs a script on two processes.

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
    config = cpu_config(engine, directory, partition_all)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
               "--main_process_port", "0", str(START), str(script), *arguments]  # fmt: skip
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


def run_cells(engine: str, cells: list[dict], directory: Path, timeout: float = HANGS) -> dict[str, Path]:
    """Runs the cells of [`jobs`] one after another in one launch. Returns the directory of each."""
    (directory / "cells.json").write_text(json.dumps(cells))
    code, output = launch(
        engine, directory, JOBS, "cells.json", str(directory), timeout=timeout, partition_all=engine == "zero3"
    )
    assert code == 0, output[-5000:]
    return {cell["name"]: directory / cell["name"] for cell in cells}
