"""
Compares mathematical answers in processes of their own: what a policy wrote is not parsed in the trainer's process.

math-verify and sympy can take hours, fill the memory or abort the interpreter on a short answer (`9^{9^{9^9}}`, `99999999!`),
and their own time limits are signals, which hold in the main thread only and not inside of a C library. Here the kernel
ends the process of an answer at its limits, so it does not matter what the process is doing or which thread waits for it.
Processes run on all cores at once, and one that is ended takes no other with it.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path


_PROGRAM = str(Path(__file__).parent / "confined" / "math_answers.py")
_START_TIME = 120.0  # seconds that the process may take to import math-verify
_READY, _STARTED, _GOLD_READ, _RIGHT = b"ready", b"s", b"g", b"1"


@dataclass(frozen=True)
class MathLimits:
    """
    What comparing one answer with its gold answer may use. An answer that takes more is wrong.

    Args:
        cpu_time (`float`, *optional*, defaults to `2.0`): seconds of CPU time.
        wall_time (`float`, *optional*, defaults to `10.0`): seconds, for a machine that is too busy to give it CPU time.
        memory (`int`, *optional*, defaults to 1 GiB): bytes of address space, of which math-verify takes 80 MiB.
    """

    cpu_time: float = 2.0
    wall_time: float = 10.0
    memory: int = 2**30


def workers() -> int:
    """How many answers are compared at the same time: one for each core that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class MathChecker:
    """The process that compares answers, started when it is first needed. May be called from several threads at once."""

    def __init__(self, limits: MathLimits | None = None):
        self.limits = limits or MathLimits()
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(workers())
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen | None = None

    def compare(self, pairs: list[tuple[str, str]]) -> list[bool | None]:
        """
        Compares answers, as many at a time as there are `workers()`.

        Args:
            pairs (`list[tuple[str, str]]`): gold answers and given ones, each as math-verify takes it: `$...$` for LaTeX.

        Returns:
            `list`: whether they are equal; `None` where the gold answer cannot be read. It takes at most
            `ceil(len(pairs) / workers())` times `limits.wall_time`, and what it takes to start the process.

        Raises:
            ImportError: if math-verify is not installed.
            RuntimeError: if the process cannot be started.
        """
        if not pairs:
            return []
        with ThreadPoolExecutor(min(len(pairs), workers())) as pool:
            return list(pool.map(self._compare, pairs))

    def _compare(self, pair: tuple[str, str]) -> bool | None:
        job = json.dumps({"gold": pair[0], "answer": pair[1], **asdict(self.limits)}).encode()
        with self._free:
            for _ in range(2):
                server = self._server()
                said = self._ask(server, job)
                if said.startswith(_STARTED):
                    return said.endswith(_RIGHT) if _GOLD_READ in said else None
                self._drop(server)  # it has been killed: the answers of that moment get another
        raise RuntimeError("The process that compares mathematical answers ended twice; is there memory for another?")

    def _ask(self, server: socket.socket, job: bytes) -> bytes:
        """What the process of one answer said before it ended, or was ended."""
        said, deadline = b"", time.monotonic() + self.limits.wall_time + 5
        ours, theirs = socket.socketpair()
        with ours, theirs, suppress(OSError):  # the process, or the one it forks from, has ended
            socket.send_fds(server, [b"j"], [theirs.fileno()])
            theirs.close()
            ours.sendall(job)
            ours.shutdown(socket.SHUT_WR)
            while _wait(ours, deadline - time.monotonic()) and (chunk := ours.recv(16)):
                said += chunk
        return said

    def _server(self) -> socket.socket:
        with self._lock:
            if self._socket is None:
                self._socket, self._process = _start()
            return self._socket

    def _drop(self, server: socket.socket) -> None:
        with self._lock:
            if self._socket is server and self._process is not None:
                server.close()
                self._process.kill()
                self._process.wait()
                self._socket = None


def _wait(connection: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds * 1000)))


def _start() -> tuple[socket.socket, subprocess.Popen]:
    """Starts the process. It ends when the trainer closes the socket, or ends."""
    if find_spec("math_verify") is None:
        raise ImportError("Mathematical answers are compared by math-verify: pip install 'trl-diffusion[eval]'.")
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", _PROGRAM, json.dumps([os.path.abspath(path) for path in sys.path])],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    said = ours.recv(16) if _wait(ours, _START_TIME) else b""
    if said != _READY:
        ours.close()
        process.kill()
        process.wait()
        raise RuntimeError(
            "The process that compares mathematical answers did not start: does `import math_verify` work?"
        )
    return ours, process
