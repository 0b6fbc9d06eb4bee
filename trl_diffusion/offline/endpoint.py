"""A client of OpenAI-compatible servers: SGLang, vLLM, LMDeploy, `trl-diffusion serve`. It needs nothing but Python."""

from __future__ import annotations

import http.client
import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..fields import check_at_least


T = TypeVar("T")
logger = logging.getLogger(__name__)

TIMEOUT = 600.0  # seconds in which the server sends nothing
BUSY = (408, 425, 429, 502, 503, 504)  # statuses of temporary failures
FAILED, MOST_FAILURES = 500, 5  # a status that may be temporary, and the number of times after which it is not
FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0  # seconds


class EndpointError(ValueError):
    """
    A server refuses a request.

    Attributes:
        status (`int`): the HTTP status.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Endpoint:
    """
    An OpenAI-compatible server. A request is repeated while the server is busy, cannot be reached, or restarts.

    Args:
        url (`str`): its address, with or without `/v1`.
        api_key (`str`, *optional*): its API key.
        patience (`float`, *optional*, defaults to `600.0`): seconds after which a request is not repeated any more.

    Raises:
        ValueError: if `url` is not an HTTP address.
    """

    def __init__(self, url: str, api_key: str | None = None, patience: float = 600.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The address of a server is like http://127.0.0.1:8000/v1, got {url!r}.")
        self.url = url.rstrip("/") + ("" if parts.path.rstrip("/") else "/v1")
        self.patience, self._stopped, self._said = patience, threading.Event(), False
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        near = parts.hostname in ("localhost", "127.0.0.1", "::1")  # reached without a proxy
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if near else []))

    def stop(self) -> None:
        """From now on, a request that fails is not repeated."""
        self._stopped.set()

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """
        Sends a request, and returns the JSON object that the server answers.

        Args:
            path (`str`): such as `/completions`.
            body (`dict`, *optional*): body of a POST request. Without it, a GET request is sent.

        Raises:
            EndpointError: a `ValueError`, if the server refuses the request.
            ValueError: if the answer is not a JSON object.
            ConnectionError: if the request does not succeed within `patience` seconds.
        """
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, self._headers)
        begun, wait, failures = time.monotonic(), FIRST_WAIT, 0
        while True:
            pause = None
            try:
                with self._opener.open(request, timeout=TIMEOUT) as answer:
                    content = answer.read()
                return self._object(content)
            except urllib.error.HTTPError as error:
                why = f"{error.code}: {_message(error)}"
                failures += error.code == FAILED
                if error.code not in (*BUSY, FAILED) or failures == MOST_FAILURES:
                    raise EndpointError(error.code, f"The server {self.url} refuses a request ({why}).") from error
                pause = error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if time.monotonic() - begun > self.patience or self._stopped.is_set():
                raise ConnectionError(
                    f"The server {self.url} did not answer for {self.patience:g} seconds ({why}). Is it still there? Give the "
                    "same command again to go on."
                )
            self._say(why, time.monotonic() - begun)
            self._stopped.wait(min(float(pause), LONGEST_WAIT) if pause and pause.isdecimal() else wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"{self.url} answers {content[:80]!r}, which is not a JSON object. Is it the address of an OpenAI-compatible server?"
            )
        return found

    def _say(self, why: str, waited: float) -> None:
        """Warns once that the server does not answer, after it has `waited` for more than 5 seconds."""
        if waited > 5 and not self._said:
            self._said = True
            logger.warning(
                f"The server {self.url} does not answer ({why}); the request is repeated for up to {self.patience:g} seconds."
            )

    def find_model(self, name: str | None) -> dict[str, Any]:
        """
        The entry of a model in `/models`. Without a name, the server must have exactly one model.

        Raises:
            ValueError: if there is no model with this name, or no name was given and there are several.
        """
        try:
            found = self.call("/models").get("data")
        except EndpointError as error:
            if error.status == 404 and name is not None:  # a server without a list
                return {"id": name}
            raise
        models = [one for one in found or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
        names = [one["id"] for one in models]
        if name is None and len(names) == 1:
            return models[0]
        if name not in names:
            wrong = f"has no model {name!r}" if name else "has several models, of which `--served_model` chooses one"
            raise ValueError(f"The server {self.url} {wrong}; there are {names}.")
        return models[names.index(name)]


def _message(error: urllib.error.HTTPError) -> str:
    """The message of a server that refuses a request."""
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        return str(found.get("message", found) if isinstance(found, dict) else found)[:500]
    except (AttributeError, ValueError):
        return text[:500]


class Pool:
    """
    Threads that wait for a server. Unlike those of `concurrent.futures`, they do not keep the program from ending.

    Args:
        size (`int`): number of threads.
    """

    def __init__(self, size: int):
        check_at_least("concurrency", size)
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._size, self._is_closed = size, False
        for _ in range(size):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Calls a function in one of the threads."""
        future: Future[T] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Ends the threads. Calls that have not begun are dropped."""
        self._is_closed = True
        for _ in range(self._size):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._is_closed:
            future, function, arguments = task
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
