"""A server of the embedded policy on a free port, and a client without manners."""

from __future__ import annotations

import copy
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.processes import HANGS
from trl_diffusion import DecodingConfig
from trl_diffusion.policies.policy import Policy, open_policy
from trl_diffusion.policies.tiny import tiny_policy_path


LIMIT = 24  # most tokens of a response
SETTINGS = {"tokens_per_step": 2}


def wait_until(condition: Callable[[], Any]) -> None:
    """Waits for something that another thread or process does."""
    end = time.monotonic() + HANGS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for does not happen")
        time.sleep(0.01)


class Client:
    """Sends requests to a server, each on a connection of its own."""

    def __init__(self, url: str):
        self.url = url
        self.host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
        self.port = int(port)

    def send(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer. A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=HANGS)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(
            "GET" if body is None else "POST", path, content, {"Content-Type": "application/json", **(headers or {})}
        )
        answer = connection.getresponse()
        found = json.loads(answer.read())
        connection.close()
        return answer.status, found

    def complete(self, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
        """The choices of a completion."""
        status, found = self.send("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, found
        return found["choices"]

    def stream(self, prompt: Any, **fields: Any) -> list[Any]:
        """The events of a stream."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=HANGS)
        body = json.dumps({"prompt": prompt, "stream": True, **fields})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        lines = connection.getresponse().read().decode().split("\n\n")
        connection.close()
        assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def load(self) -> dict[str, Any]:
        """What `/health` says."""
        return self.send("/health")[1]

    def wait_until_idle(self) -> None:
        wait_until(lambda: not self.load()["decoding"] and not self.load()["waiting"])

    def raw(self) -> socket.socket:
        """A connection, on which anything can be sent."""
        return socket.create_connection((self.host, self.port), timeout=HANGS)


@contextmanager
def serving(policy: Policy, port: int = 0, settings: dict[str, Any] | None = None, api_key=None, **options: Any):
    """A server in a thread of this process, with a copy of the policy: a model is not for several threads."""
    from trl_diffusion.serving.server import Server, ServerOptions, listen_at, make_service

    config = DecodingConfig(LIMIT, **(SETTINGS if settings is None else settings))
    service = make_service(copy.deepcopy(policy), config, ServerOptions(**options), "tiny", api_key)
    server = Server(service, listen_at("127.0.0.1", port))
    thread = threading.Thread(target=server.serve_here)
    url = server.url
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        yield Client(url), server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason="needs the extra `serve`")


@pytest.fixture(scope="session")
def embedded() -> Policy:
    return open_policy(tiny_policy_path(), device="cpu")


@pytest.fixture(scope="module")
def client(embedded) -> Iterator[Client]:
    with serving(embedded, max_batch=8) as (found, _):
        yield found
