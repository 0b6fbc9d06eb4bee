"""
What the two processes of a launch run, one scenario after another: `scenarios.py DIRECTORY`, which holds `scenarios.json`.

Each scenario is a mapping with the `name` of its directory and, with DeepSpeed, the `environment` that `accelerate launch`
makes of a config. It is a recipe, if it has a `recipe`, the words of its command line; something that goes wrong, if it has
a `fault` (see `faults.py`); else a cell of `jobs.py`. At last one process dies without a word.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import time
from contextlib import chdir, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState

from tests.distributed import faults, jobs


ROOT = Path(__file__).resolve().parents[2]
RANK = os.environ["LOCAL_RANK"]


def run_recipe(words: list[str], directory: Path) -> None:
    """Runs a file of `recipes/` with its arguments, in `directory`, and leaves what it printed in `output_RANK.txt`."""
    directory.mkdir(exist_ok=True)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    path = ROOT / "recipes" / words[0]
    with chdir(directory), Path(f"output_{RANK}.txt").open("w") as output:
        with redirect_stdout(output), mock.patch.object(sys, "argv", [str(path), *words[1:]]):
            runpy.run_path(str(path), run_name="__main__")


def run(scenario: dict, directory: Path) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        if "environment" in scenario:
            del os.environ[name]
    os.environ.update(scenario.get("environment", {}))
    if "recipe" in scenario:
        run_recipe(scenario["recipe"], directory)
    elif "fault" in scenario:
        faults.run(scenario["fault"], scenario, directory)
    else:
        jobs.run(scenario, directory)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.enable()
    gc.freeze()  # or every training looks for garbage among all that has been imported
    where = Path(sys.argv[1])
    for one in json.loads((where / "scenarios.json").read_text()):
        run(one, where / one["name"])
    (where / f"finished_{RANK}").touch()
    torch.distributed.barrier()  # the launcher ends the other process at once
    if RANK == "1":
        os._exit(3)
    time.sleep(600)
