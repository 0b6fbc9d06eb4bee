"""Measuring a policy: benchmarks of its own, and the model for lm-evaluation-harness."""

from __future__ import annotations

from importlib.resources import files


def tasks_path() -> str:
    """Directory of the tasks for lm-evaluation-harness that ship with the package, for its `--include_path`."""
    return str(files("trl_diffusion.evaluation") / "tasks")
