"""
A process that looks at answers for the trainer, and forks one of its own for each answer.

What an answer brings about, a loop without end, a full memory, the end of an interpreter, happens there, and the kernel ends it at its
limits. It does not matter what the process is doing or which thread waits for it. Processes run on all cores at once, and one that
is ended takes no other with it.
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
from contextlib import suppress
from pathlib import Path


CONFINED = Path(__file__).parent / "confined"  # where the programs are
_START_TIME = 120.0  # seconds that the process may take to import what it needs
_READY, STARTED = b"ready", b"s"


def workers() -> int:
    """How many answers are looked at at the same time: one for each core that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class AnswerProcess:
    """
    The process, started when it is first needed. May be used from several threads at once.

    Args:
        number (`int`): most answers at the same time.
        seconds (`float`): how long an answer may take.
    """

    purpose = ""  # what the process does, for messages
    needs = ""  # what it must be able to import, for messages

    def __init__(self, number: int, seconds: float):
        self._seconds = seconds
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(number)
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen | None = None

    def command(self) -> list[str]:
        """The program, one of `rewards/confined`, and its arguments."""
        raise NotImplementedError

    def ask(self, job: bytes) -> bytes:
        """
        Gives a job to a process of its own.

        Args:
            job (`bytes`): what it reads.

        Returns:
            `bytes`: what it said before it ended, or was ended. It begins with `STARTED`.

        Raises:
            RuntimeError: if the process cannot be started.
        """
        with self._free:
            for _ in range(2):
                server = self._server()
                said = self._ask(server, job)
                if said.startswith(STARTED):
                    return said
                self._drop(server)  # it has been killed: the answers of that moment get another
        raise RuntimeError(f"The process that {self.purpose} ended twice; is there memory for another?")

    def _ask(self, server: socket.socket, job: bytes) -> bytes:
        said, deadline = b"", time.monotonic() + self._seconds
        ours, theirs = socket.socketpair()
        with ours, theirs, suppress(OSError):  # the process, or the one it forks from, has ended
            socket.send_fds(server, [b"j"], [theirs.fileno()])
            theirs.close()
            ours.sendall(job)
            ours.shutdown(socket.SHUT_WR)
            while _wait(ours, deadline - time.monotonic()) and (chunk := ours.recv(4096)):
                said += chunk
        return said

    def _server(self) -> socket.socket:
        with self._lock:
            if self._socket is None:
                self._socket, self._process = self._start()
            return self._socket

    def _drop(self, server: socket.socket) -> None:
        with self._lock:
            if self._socket is server and self._process is not None:
                server.close()
                self._process.kill()
                self._process.wait()
                self._socket = None

    def _start(self) -> tuple[socket.socket, subprocess.Popen]:
        """Starts the process. It ends when the trainer closes the socket, or ends."""
        program, *arguments = self.command()
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", program, search_path(), *arguments],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a thread for each core takes address space
            )
        said = ours.recv(16) if _wait(ours, _START_TIME) else b""
        if said != _READY:
            ours.close()
            process.kill()
            process.wait()
            raise RuntimeError(f"The process that {self.purpose} did not start: does `import {self.needs}` work?")
        return ours, process


def search_path() -> str:
    """Where this process finds modules, as JSON."""
    return json.dumps([os.path.abspath(path) for path in sys.path])


def _wait(connection: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds * 1000)))
