"""
Processes of their own for functions of tests, alone or in pairs. They are forked from a server that has imported everything, so that
one starts, and can be killed, within a moment.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import re
import signal
import socket
import struct
import termios
import time
from pathlib import Path
from typing import Any

import torch


HANGS = 1800.0  # seconds after which a process is taken to hang; on a machine that is busy, starting one takes minutes
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.offline.kill_jobs"])


def run_pair(job, *arguments: Any, timeout: float = HANGS) -> list[Any]:
    """
    Runs `job(rank, *arguments)` in two processes that can form a process group (gloo), as `torchrun` starts them.

    Returns:
        What the job returned on rank 0 and on rank 1; a few kilobytes at most, since it waits in a pipe for their end.

    Raises:
        AssertionError: if one of them fails, or takes longer than `timeout` seconds. Both are ended then.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = CONTEXT.SimpleQueue()
    pair = [CONTEXT.Process(target=_run, args=(job, rank, port, results, arguments)) for rank in range(2)]
    for process in pair:
        process.start()
    end = time.monotonic() + timeout
    try:
        for process in pair:
            process.join(max(0.0, end - time.monotonic()))
        assert [process.exitcode for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    found = dict(results.get() for _ in pair)
    return [found[rank] for rank in range(2)]


ROOT = Path(__file__).resolve().parents[1]


def in_a_terminal(words: list[str], directory: Path, interrupt_at: str | None = None) -> tuple[int, str]:
    """
    Runs a command in a terminal of its own, 200 columns wide.

    Args:
        words (`list[str]`): the command.
        directory (`Path`): where it runs.
        interrupt_at (`str`, *optional*): a pattern; Ctrl-C is typed when the output matches it.

    Returns:
        Its exit code, and its output as the terminal got it.
    """
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(directory)
        os.environ.update(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TERM="xterm")
        os.environ.pop("TRANSFORMERS_VERBOSITY", None)  # of these tests
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it
        os.execv(words[0], words)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    output = b""
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        output += part
        if interrupt_at is not None and re.search(interrupt_at.encode(), output):
            os.write(terminal, b"\x03")
            interrupt_at = None
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), output.decode()


def _run(job, rank: int, port: int, results, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    results.put((rank, job(rank, *arguments)))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
