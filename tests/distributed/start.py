"""
Starts a script, `start.py SCRIPT ...`, without DeepSpeed's shared memory between processes on a CPU, which its first run compiles
for most of a minute: no GPU uses it, and gloo does the same.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
from pathlib import Path

import torch


gc.disable()  # while the script imports; it has it enabled again
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
del sys.argv[0]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
if torch.distributed.is_initialized():  # threads that are left to the end of a process may abort it
    torch.distributed.destroy_process_group()
