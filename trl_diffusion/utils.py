"""Small things that recipes share."""

from __future__ import annotations

import os

import torch


def use_all_cores() -> None:
    """Shares the cores among the processes of this machine; `accelerate launch` gives each process just one."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
