"""
The process of the program under test: runs it, then calls its functions as the tests' process asks.

It knows neither the tests nor what they expect, and nothing it says is a verdict: it can only give answers.
"""

from __future__ import annotations

import builtins
import sys
from contextlib import suppress
from types import ModuleType
from typing import Any

from start import start
from wire import MAX_TEXT, Pipe, decode, encode, exception, failure


class Function:
    """A function of the tests, which is called in their process. Nothing of it is here but its number."""

    def __init__(self, candidate: Candidate, number: int):
        self._candidate = candidate
        self._number = number

    def __call__(self, *arguments, **keywords):
        return self._candidate.call_back(self._number, arguments, keywords)


class Candidate:
    """The program's module, and the objects that have been referred to, by number; the module itself is number 0."""

    def __init__(self, module: ModuleType, pipe: Pipe):
        self.objects: list[Any] = [module]
        self.pipe = pipe

    def refer(self, value: Any) -> dict:
        if type(value) is Function:
            return {"type": "function", "id": value._number}
        self.objects.append(value)
        return {"type": "object", "id": len(self.objects) - 1, "class": type(value).__name__[:MAX_TEXT]}

    def resolve(self, value: dict) -> Any:
        match value["type"]:
            case "object":
                return self.objects[value["id"]]
            case "builtin":
                return getattr(builtins, value["name"])
        return Function(self, value["id"])

    def encode(self, value: Any) -> Any:
        return encode(value, self.refer)

    def decode(self, value: Any) -> Any:
        return decode(value, self.resolve)

    def serve(self, broken: dict | None = None) -> dict:
        """Answers requests, with `broken` if that is given, until a message comes that is none: the end of a call back."""
        while True:
            message = self.pipe.receive()
            if "do" not in message:
                return message
            try:
                reply = broken or self.answer(message)
            except BaseException as error:
                reply = failure(error)
            self.pipe.send(reply)

    def call_back(self, number: int, arguments: tuple, keywords: dict) -> Any:
        """Calls a function of the tests. Raises what it raises, as a built-in exception."""
        self.pipe.send({"call": number, "arguments": self.encode(list(arguments)), "keywords": self.encode(keywords)})
        reply = self.serve()
        if "raised" in reply:
            raise exception(reply["raised"], reply["message"])
        return self.decode(reply["value"])

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


def main() -> None:
    job = start()
    pipe = Pipe(job["read_fd"], job["write_fd"])
    module = ModuleType("candidate")
    sys.modules["candidate"] = module
    candidate = Candidate(module, pipe)
    broken = None
    try:
        exec(compile(job["program"], "candidate.py", "exec"), module.__dict__)
    except BaseException as error:
        broken = failure(error)
    with suppress(EOFError):
        candidate.serve(broken)
