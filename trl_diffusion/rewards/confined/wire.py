"""
What the two confined processes say to each other: a line of JSON per message.

Values that are plain data (numbers, strings, bytes, `None`, fractions, decimals, dates and times, ranges, and lists, tuples,
sets, deques, counters and dictionaries of those) travel as themselves; anything else stays where it is and travels as a
number that stands for it.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


MAX_MESSAGE = 16 * 2**20  # bytes
MAX_TEXT = 1000  # characters of an exception's message that travel
# What stands for a value: an object of the program's, a function of the tests', a function or class that is built in.
STAND_INS = ("object", "function", "builtin")
_PLAIN_INT = 2**53
_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}

# Classes of the standard library: module, name, how a value is taken apart, how it is made from the parts. A subclass comes
# before its base. None is imported here: a value of one can only be there if its module is.
_STANDARD: list[tuple[str, str, Callable[[Any], list], Callable[..., Any]]] = [
    ("builtins", "range", lambda v: [v.start, v.stop, v.step], lambda kind, *parts: kind(*parts)),
    ("fractions", "Fraction", lambda v: [v.numerator, v.denominator], lambda kind, *parts: kind(*parts)),
    ("decimal", "Decimal", lambda v: [str(v)], lambda kind, text: kind(text)),
    ("datetime", "datetime", lambda v: [v.isoformat()], lambda kind, text: kind.fromisoformat(text)),
    ("datetime", "date", lambda v: [v.isoformat()], lambda kind, text: kind.fromisoformat(text)),
    ("datetime", "time", lambda v: [v.isoformat()], lambda kind, text: kind.fromisoformat(text)),
    ("datetime", "timedelta", lambda v: [v.days, v.seconds, v.microseconds], lambda kind, *parts: kind(*parts)),
    ("collections", "deque", lambda v: [list(v), v.maxlen], lambda kind, items, most: kind(items, most)),
    ("collections", "Counter", lambda v: [dict(v)], lambda kind, items: kind(items)),
    ("collections", "OrderedDict", lambda v: [dict(v)], lambda kind, items: kind(items)),
]


class Pipe:
    """One end of a conversation, over a file descriptor to read from and another to write to."""

    def __init__(self, read_fd: int, write_fd: int):
        self._reader = os.fdopen(read_fd, "rb")
        self._write_fd = write_fd

    def send(self, message: dict) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._write_fd, data) :]

    def receive(self) -> dict:
        """The next message. Raises an `EOFError` if the other side has gone, a `ValueError` if it is no message."""
        line = self._reader.readline(MAX_MESSAGE + 1)
        if len(line) > MAX_MESSAGE:
            raise ValueError("The answer is too long.")
        if not line.endswith(b"\n"):
            raise EOFError("The program has ended.")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("The answer is not a message.")
        return message


def encode(value: Any, refer: Callable[[Any], dict]) -> Any:
    """`value` as JSON; `refer` makes the stand-in for what is not plain data."""
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value) if -_PLAIN_INT < value < _PLAIN_INT else {"type": "int", "hex": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"type": "complex", "parts": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"type": "bytes", "hex": bytes(value).hex()}
    if isinstance(value, list):
        return [encode(item, refer) for item in value]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {"type": name, "items": [encode(item, refer) for item in value]}
    for module, name, parts, _ in _STANDARD if type(value) is not dict else ():
        if isinstance(value, getattr(sys.modules.get(module), name, ())):
            return {"type": name, "items": [encode(part, refer) for part in parts(value)]}
    if isinstance(value, dict):
        return {"type": "dict", "items": [[encode(k, refer), encode(v, refer)] for k, v in value.items()]}
    return refer(value)


def decode(value: Any, resolve: Callable[[dict], Any]) -> Any:
    """What `encode` encoded; `resolve` finds what a stand-in stands for. Raises a `ValueError` for anything else."""
    if isinstance(value, list):
        return [decode(item, resolve) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    try:
        if kind == "int":
            return int(value["hex"], 16)
        if kind == "complex":
            return complex(*value["parts"])
        if kind == "bytes":
            return bytes.fromhex(value["hex"])
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](decode(item, resolve) for item in value["items"])
        if kind == "dict":
            return {decode(k, resolve): decode(v, resolve) for k, v in value["items"]}
        for module, name, _, make in _STANDARD:
            if kind == name:
                return make(getattr(import_module(module), name), *(decode(item, resolve) for item in value["items"]))
        if kind in STAND_INS:
            return resolve(value)
    except (KeyError, TypeError) as error:
        raise ValueError(f"The answer is not a value: {error}.") from error
    raise ValueError(f"The answer is of an unknown type, {kind!r}.")


def failure(error: BaseException) -> dict:
    """An exception as a message, without trusting the exception."""
    try:
        text = str(error)[:MAX_TEXT]
    except BaseException:
        text = "(no message)"
    return {"raised": type(error).__name__[:MAX_TEXT], "message": text}


def exception(name: str, message: str) -> Exception:
    """The built-in exception of a name, or a `RuntimeError` if there is none."""
    kind = getattr(builtins, name, None)
    ends_loops = (StopIteration, StopAsyncIteration)  # `all(map(f, inputs))` would end early, and be true
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends_loops):
        try:
            return kind(message)
        except TypeError:
            pass
    return RuntimeError(f"{name}: {message}")
