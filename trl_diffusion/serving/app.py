"""The endpoints: requests in, answers and streams out. Nothing here computes."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..decoding.config import DecodingConfig
from ..policies.policy import Policy
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import no_repeated_keys
from .answers import Answer, Choice, sse, stop_tokens
from .engine import Engine, Job
from .errors import ApiError
from .requests import Asked, Limits, read_request


T = TypeVar("T")
logger = logging.getLogger(__name__)
GONE = Response(status_code=499)  # to a client that does not wait any more
MOST_DISCARDED = (
    8  # times the largest size of a request: up to here, a client that has sent it all can read why it is refused
)
UNREAD = {"connection": "close"}  # the rest of the body is not read, so the connection cannot be used again
HEADERS = {408: UNREAD, 413: UNREAD, 415: UNREAD, 429: {"retry-after": "1"}, 503: {"retry-after": "5"}}


class Service:
    """
    The endpoints of a policy.

    Args:
        policy ([`Policy`]): the policy.
        engine ([`Engine`]): what denoises.
        config ([`DecodingConfig`]): settings, unless a request says otherwise.
        limits ([`Limits`]): what is accepted.
        names (`list[str]`): what the policy is called. Answers have the first name.
        facts (`dict`): what `/v1/models` says of the policy, beside its name.
        api_key (`str`, *optional*): what clients must send.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        config: DecodingConfig,
        limits: Limits,
        names: list[str],
        facts: dict[str, Any],
        api_key: str | None = None,
    ):
        self.policy, self.engine, self.config, self.limits = policy, engine, config, limits
        self.names, self.facts, self.api_key = names, facts, api_key
        self.texts = ThreadPoolExecutor(1, "tokenizing")  # the tokenizer is not for several threads

    def app(self) -> Starlette:
        """The ASGI application. Its engine starts and ends with it."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            try:
                yield
            finally:
                await asyncio.to_thread(self.engine.close)
                self.texts.shutdown(wait=False, cancel_futures=True)

        routes = [
            Route("/health", self.health),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.model)),
            Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self.chat_completions), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _unknown_address})

    def _guarded(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """An endpoint whose errors are in the format of the OpenAI API."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except ApiError as error:
                return JSONResponse(error.body(), error.status, HEADERS.get(error.status))
            except ClientDisconnect:
                return GONE
            except RecursionError:
                return JSONResponse(ApiError(400, "The request is nested too deeply.").body(), 400)
            except Exception as error:
                logger.exception("A request failed.")
                return JSONResponse(ApiError(500, f"The server failed ({type(error).__name__}).").body(), 500)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise ApiError(
                401, "This server needs its API key, as `Authorization: Bearer KEY`.", code="invalid_api_key"
            )

    # -------------------------------------------------------------------------------------------------- endpoints

    async def health(self, request: Request) -> Response:
        alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "failed", **self.engine.load()}, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.names:
            raise ApiError(404, f"There is no model {name!r:.200} here.", "model", "model_not_found")
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "trl_diffusion", "denoising": self.facts}

    async def completions(self, request: Request) -> Response:
        return await self._respond(request, chat=False)

    async def chat_completions(self, request: Request) -> Response:
        return await self._respond(request, chat=True)

    async def _respond(self, request: Request, chat: bool) -> Response:
        body = await read_body(request, self.limits)
        asked = await self._text(read_request, body, chat, self.names, self.policy, self.config, self.limits)
        stops = stop_tokens(asked.config, self.policy.spec.stop_token_ids)
        choices = [Choice(asked, index, self.policy.tokenizer, stops) for index in range(len(asked.wishes))]
        ticket = Ticket(self.engine, asked)
        answer = Answer(asked, self.names[0], self.facts["system_fingerprint"], choices)
        if asked.stream:
            return Stream(self._events(answer, ticket), ticket)
        try:
            return await unless_disconnected(request, self._whole(answer, ticket))
        finally:
            ticket.cancel()

    async def _whole(self, answer: Answer, ticket: Ticket) -> Response:
        async for choice, event in ticket.events(answer.choices):
            await self._text(self._take, choice, event, ticket)
        return JSONResponse(await self._text(answer.body))

    async def _events(self, answer: Answer, ticket: Ticket) -> AsyncIterator[bytes]:
        """The events of a stream. An error in the middle is an event, too."""
        try:
            yield answer.event(*(choice.part("", first=True) for choice in answer.choices))
            async for choice, event in ticket.events(answer.choices):
                if isinstance(event, dict):
                    if answer.asked.canvas:
                        yield answer.event(choice.part("", canvas=event))
                    continue
                text = await self._text(self._take, choice, event, ticket)
                ended = ticket.has_ended(choice.index)
                if text or ended:
                    yield answer.event(choice.part(text, last=ended))
            if answer.asked.usage:
                yield answer.event(usage=answer.usage)
        except ApiError as error:
            yield sse(error.body())
            return
        yield sse(b"[DONE]")

    @staticmethod
    def _take(choice: Choice, event: Any, ticket: Ticket) -> str:
        """What an event adds to the text of a choice. A text that is cut needs no more steps."""
        if isinstance(event, TrajectoryBatch):
            return choice.finish(event)
        text = choice.settle(event)
        if choice.is_cut and not choice.asked.logprobs:
            ticket.end(choice.index)
        return text

    async def _text(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function that tokenizes, in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self.texts, function, *arguments)


class Ticket:
    """The responses of a request, in the engine. Raises an [`ApiError`] if it takes no more."""

    def __init__(self, engine: Engine, asked: Asked):
        self.engine, self.loop = engine, asyncio.get_running_loop()
        self.mailbox: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        watch: Literal["blocks", "steps"] | None = "blocks" if asked.stream or asked.stop else None
        watch = "steps" if asked.canvas else watch
        self.jobs = [
            Job(prompt, asked.config, asked.new_tokens, seed, self._listener(index), watch)
            for index, (prompt, seed) in enumerate(asked.wishes)
        ]
        self.running = set(range(len(self.jobs)))
        engine.submit(self.jobs)

    def _listener(self, index: int) -> Callable[[Any], None]:
        def listen(event: Any) -> None:
            try:
                self.loop.call_soon_threadsafe(self.mailbox.put_nowait, (index, event))
            except RuntimeError:
                pass  # the event loop has ended, and nobody listens

        return listen

    async def events(self, choices: list[Choice]) -> AsyncIterator[tuple[Choice, Any]]:
        """What the engine says, with the choice that it is about, until all have ended."""
        while self.running:
            index, event = await self.mailbox.get()
            if index not in self.running:
                continue
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, TrajectoryBatch):
                self.running.discard(index)
            yield choices[index], event

    def has_ended(self, index: int) -> bool:
        return index not in self.running

    def end(self, index: int) -> None:
        """Nobody needs the rest of a response."""
        self.running.discard(index)
        self.engine.cancel([self.jobs[index]])

    def cancel(self) -> None:
        """Nobody waits any more."""
        self.engine.cancel(self.jobs)


class Stream(StreamingResponse):
    """Server-sent events. When they end, or the client has gone, the responses leave the engine."""

    def __init__(self, events: AsyncIterator[bytes], ticket: Ticket):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.cancel()


async def read_body(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object of a request. Raises an [`ApiError`] if it is none, too large, or does not arrive."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page of another site cannot send
        raise ApiError(415, f"Send the request with `Content-Type: application/json`, got {kind!r:.80}.")
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body_bytes:
                    content += part
                elif size > MOST_DISCARDED * limits.body_bytes:
                    break
    except TimeoutError:
        raise ApiError(408, f"The request did not arrive within {limits.body_seconds:g} seconds.") from None
    if size > limits.body_bytes:
        raise ApiError(413, f"A request has at most {limits.body_bytes} bytes.", code="request_too_large")
    try:
        body = json.loads(content, object_pairs_hook=no_repeated_keys, parse_constant=_no_number)
    except (RecursionError, ValueError) as error:
        raise ApiError(400, f"The request is not JSON ({error!s:.200}).", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"The request must be a JSON object, got {body!r:.80}.", code="invalid_json")
    return body


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


async def unless_disconnected(request: Request, answer: Any) -> Response:
    """Waits for an answer. If the client goes before, the answer is cancelled."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else GONE
    finally:
        for task in tasks:
            task.cancel()


async def _unknown_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"There is no {request.method} {request.url.path} here ({error.detail})."
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)
