"""If one process fails, all processes raise an error instead of waiting for it. All must share the directory that they write to."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object

from .utils import TEMPORARY


Processes: TypeAlias = Accelerator | PartialState


def fail_together(processes: Processes, error: Exception | None, what: str) -> None:
    """
    Raises an error on every process if one process has an error. Every process must call it.

    Args:
        processes ([`~accelerate.Accelerator`] or [`~accelerate.PartialState`]): connects the processes.
        error (`Exception`, *optional*): the error of this process, if any.
        what (`str`): what the processes were doing, for the message.

    Raises:
        Exception: `error` itself, on a process that has one.
        RuntimeError: on the other processes, with the processes that failed and their errors.
    """
    if processes.num_processes > 1:
        failed = gather(torch.tensor([error is not None], device=processes.device))
        texts = gather_object([f"{type(error).__name__}: {error}"]) if failed.any() else []
    if error is not None:
        raise error
    if processes.num_processes > 1 and failed.any():
        reasons = "; ".join(f"process {rank}: {texts[rank]}" for rank in failed.nonzero().flatten().tolist())
        raise RuntimeError(f"{what} failed on another process, so this one stops too. {reasons}")


def check_shared(processes: Processes, directory: str | Path) -> None:
    """
    Checks that all processes, on whichever machines, write to the same directory, which is made if it is not there. Every process must
    call it.

    Raises:
        ValueError: on a process that does not see what the main process writes there.
        RuntimeError: on the other processes.
    """
    if processes.num_processes == 1:
        return
    name = [""]
    failure: Exception | None = None
    if processes.is_main_process:
        name = [f"{TEMPORARY}{uuid4().hex}"]  # a new name, of which no file system remembers that it is missing
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            Path(directory, name[0]).touch()
        except OSError as error:
            name, failure = [""], error
    broadcast_object_list(name)
    if not Path(directory, name[0]).exists() and failure is None:
        failure = ValueError(
            f"{Path(directory).absolute()} on {socket.gethostname()} is not the directory that the first process writes to. Every "
            "process writes a part of what is kept there: choose an `output_dir` on a disk that all machines share."
        )
    try:
        fail_together(processes, failure, "Looking for `output_dir`")
    finally:
        if processes.is_main_process and name[0]:
            Path(directory, name[0]).unlink(missing_ok=True)
