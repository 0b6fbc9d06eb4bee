"""Starts two processes with `accelerate launch`, and never waits for them longer than it said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "distributed" / "jobs.py"


def cpu_config(engine: str, directory: Path, num_processes: int = 2) -> Path:
    """The shipped `recipes/accelerate/ENGINE.yaml` with nothing changed but what two CPU processes need."""
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{engine}.yaml").read_text())
    config.update(num_processes=num_processes, mixed_precision="no", use_cpu=True)
    path = directory / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(engine: str, directory: Path, script: Path, *arguments: str, timeout: float = 300):
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
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(cpu_config(engine, directory)),
               "--main_process_port", "0", str(script), *arguments]  # fmt: skip
    log = directory / f"{engine}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"Not done after {timeout} seconds:\n{log.read_text()[-3000:]}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return code, log.read_text()


def run_cells(engine: str, cells: list[dict], directory: Path, timeout: float = 300) -> dict[str, Path]:
    """Runs the cells of [`jobs`] one after another in one launch. Returns the directory of each."""
    (directory / "cells.json").write_text(json.dumps(cells))
    code, output = launch(engine, directory, JOBS, "cells.json", str(directory), timeout=timeout)
    assert code == 0, output[-5000:]
    return {cell["name"]: directory / cell["name"] for cell in cells}
