"""Small things that several parts share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from accelerate import PartialState


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Inside, what a user can set right (options, files, data, what is installed) ends the program with its message and
    code 2, without a traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def use_all_cores() -> None:
    """Shares the cores among the processes of this machine; `accelerate launch` gives each process just one."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def move_into_place(temporary: Path, path: Path) -> None:
    """Puts a finished file in its place, on the disk and not only in its cache: it is there whole or not at all."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def processes() -> PartialState:
    """The processes that share the work; on machines without an accelerator, too, where accelerate has to be told."""
    return PartialState(cpu=not torch.accelerator.is_available())
