"""
The process of the program under test: runs it, then calls its functions as the tests' process asks.

It knows neither the tests nor what they expect, and nothing it says is a verdict: it can only give answers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from start import start
from wire import Pipe, decode, encode


MAX_TEXT = 1000  # characters of an exception's message that travel


class Candidate:
    """The program's module, and the objects that have been referred to, by number; the module itself is number 0."""

    def __init__(self, module: ModuleType):
        self.objects: list[Any] = [module]

    def refer(self, value: Any) -> dict:
        self.objects.append(value)
        return {"type": "object", "id": len(self.objects) - 1, "class": type(value).__name__[:MAX_TEXT]}

    def encode(self, value: Any) -> Any:
        return encode(value, self.refer)

    def decode(self, value: Any) -> Any:
        return decode(value, self.objects.__getitem__)

    def answer(self, request: dict) -> dict:
        """Does what a request asks for. Raises whatever the program raises."""
        of = self.objects[request["of"]]
        arguments = self.decode(request.get("arguments", []))
        match request["do"]:
            case "call":
                reply = {"value": self.encode(of(*arguments, **self.decode(request["keywords"])))}
                after = self.encode(arguments)
                # What the call did to its arguments is part of the answer, as for functions that sort in place.
                return reply if after == request["arguments"] else reply | {"arguments": after}
            case "get":
                return {"value": self.encode(getattr(of, *arguments))}
            case "set":
                setattr(of, *arguments)
                return {"value": None}
            case "item":
                return {"value": self.encode(of[arguments[0]])}
            case "list":
                return {"value": self.encode(list(of))}
            case "len":
                return {"value": len(of)}
            case "str":
                return {"value": str(of)}
            case "repr":
                return {"value": repr(of)}
        raise ValueError(f"Unknown request {request['do']!r}.")


def failure(error: BaseException) -> dict:
    """An exception as a message, without trusting the exception."""
    try:
        text = str(error)[:MAX_TEXT]
    except BaseException:
        text = "(no message)"
    return {"raised": type(error).__name__[:MAX_TEXT], "message": text}


def main() -> None:
    job = start()
    pipe = Pipe(job["read_fd"], job["write_fd"])
    module = ModuleType("candidate")
    sys.modules["candidate"] = module
    candidate = Candidate(module)
    broken = None
    try:
        exec(compile(job["program"], "candidate.py", "exec"), module.__dict__)
    except BaseException as error:
        broken = failure(error)
    while True:
        try:
            request = pipe.receive()
        except EOFError:
            return
        try:
            reply = broken or candidate.answer(request)
        except BaseException as error:
            reply = failure(error)
        pipe.send(reply)
