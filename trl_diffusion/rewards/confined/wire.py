"""
What the two confined processes say to each other: a line of JSON per message.

Values that are plain data (numbers, strings, bytes, `None`, lists, tuples, sets, dictionaries of those) travel as
themselves; anything else stays where it is and travels as a number that stands for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any


MAX_MESSAGE = 16 * 2**20  # bytes
_PLAIN_INT = 2**53
_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}


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
    if isinstance(value, dict):
        return {"type": "dict", "items": [[encode(k, refer), encode(v, refer)] for k, v in value.items()]}
    return refer(value)


def decode(value: Any, resolve: Callable[[int], Any]) -> Any:
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
        if kind == "object":
            return resolve(int(value["id"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"The answer is not a value: {error}.") from error
    raise ValueError(f"The answer is of an unknown type, {kind!r}.")
