"""`trl-diffusion serve` in a process of its own, which can be killed."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.processes import CONTEXT
from tests.serving.conftest import Client, wait_until


def run(log: str, words: list[str]) -> None:
    """The process: what it prints goes to a file."""
    from trl_diffusion.commands import serve

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(serve.main(words))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def served(log: Path, words: list[str], port: int | None = None) -> Iterator[tuple[Any, Client]]:
    """The process, which has begun to serve, and a client. It is killed at the end."""
    port = port or free_port()
    process = CONTEXT.Process(target=run, args=(str(log), ["--port", str(port), *words]))
    process.start()
    try:
        wait_until(lambda: not process.is_alive() or (log.exists() and f":{port}/v1" in log.read_text()))
        assert process.is_alive(), log.read_text()
        yield process, Client(f"http://127.0.0.1:{port}/v1")
    finally:
        process.kill()
        process.join()
