"""
The process of the tests: runs them against functions that live in the process of the program, and gives the verdict.

No line of the program runs here. What it answers arrives as plain data, made anew from JSON, so that comparisons are
Python's own; an object of the program's own classes can be called and looked into, but not compared.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

from start import start
from wire import Pipe, decode, encode


MAX_REASON = 2000  # characters


class Program:
    """The program under test, seen from the tests."""

    def __init__(self, pipe: Pipe):
        self._pipe = pipe

    def ask(self, of: int, do: str, arguments: tuple = (), keywords: dict | None = None) -> Any:
        """Asks the program's process and waits. Raises what the program raised, as a built-in exception."""
        self._pipe.send(
            {
                "of": of,
                "do": do,
                "arguments": encode(list(arguments), _refer),
                "keywords": encode(keywords or {}, _refer),
            }
        )
        reply = self._pipe.receive()
        if "raised" in reply:
            raise _exception(str(reply["raised"]), str(reply.get("message")))
        changed = self.decode(reply.get("arguments", []))
        for argument, now in zip(arguments, changed, strict=False):
            _update(argument, now)
        return self.decode(reply.get("value"))

    def decode(self, value: Any) -> Any:
        return decode(value, lambda number: Remote(self, number))


def _update(argument: Any, now: Any) -> None:
    """Makes a list, set or dictionary that was passed to the program equal to what the program made of it."""
    if type(argument) is list and type(now) is list:
        argument[:] = now
    elif type(argument) in (set, dict) and type(now) is type(argument):
        argument.clear()
        argument.update(now)


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    ends_loops = (StopIteration, StopAsyncIteration)  # `all(map(f, inputs))` would end early, and be true
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends_loops):
        try:
            return kind(message)
        except TypeError:
            pass
    return RuntimeError(f"{name}: {message}")


class Remote:
    """An object that stays in the process of the program: a function, a class, or an instance of one."""

    def __init__(self, program: Program, number: int):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments, **keywords):
        return self._program.ask(self._number, "call", arguments, keywords)

    def __getattr__(self, name):
        return self._program.ask(self._number, "get", (name,))

    def __setattr__(self, name, value):
        self._program.ask(self._number, "set", (name, value))

    def __getitem__(self, key):
        return self._program.ask(self._number, "item", (key,))

    def __iter__(self):
        return iter(self._program.ask(self._number, "list"))

    def __len__(self):
        return self._program.ask(self._number, "len")

    def __str__(self):
        return self._program.ask(self._number, "str")

    def __repr__(self):
        return self._program.ask(self._number, "repr")

    def _refuse(self, *_):
        raise TypeError("The answer is an object of the program's own: only plain data can be compared.")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse
    __hash__ = object.__hash__


def _refer(value: Any) -> dict:
    if isinstance(value, Remote):
        return {"type": "object", "id": value._number}
    raise TypeError(f"The tests pass a {type(value).__name__} to the program: only plain data can be passed.")


def _names(tests: str) -> list[tuple[str, ModuleType | None]]:
    """
    Names that tests use and that are not built in, in order. A name that has attributes (`math.isclose`) is a module of
    the standard library if there is one: the program could bring a `math` of its own.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and not hasattr(builtins, node.id)} - {"check"}
    owners = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    modules: dict[str, ModuleType] = {}
    for name in names & owners & sys.stdlib_module_names:
        with suppress(ImportError):
            modules[name] = import_module(name)
    return [(name, modules.get(name)) for name in sorted(names)]


def run(program: Program, helpers: str, tests: str, entry_point: str | None) -> None:
    """
    Runs the tests. Returns if they pass and raises otherwise.

    Args:
        program (`Program`): the program under test.
        helpers (`str`): trusted source that runs before the tests; its functions hide the program's.
        tests (`str`): source of the tests. Names it does not define are the helpers', or those of modules of the
            standard library, or the program's, in this order.
        entry_point (`str`, *optional*): name of the function that is handed to the tests' `check`.
    """
    program.ask(0, "str")  # raises if the program broke
    namespace: dict[str, Any] = {"__name__": "tests"}
    for name, module in _names(tests):
        if module is not None:
            namespace[name] = module
            continue
        try:
            namespace[name] = program.ask(0, "get", (name,))
        except AttributeError:
            continue  # the tests' own, or a NameError when they come to it
    exec(compile(helpers, "helpers.py", "exec"), namespace)
    if entry_point is None:
        exec(compile(tests, "tests.py", "exec"), namespace)
        return
    candidate = namespace[entry_point] = program.ask(0, "get", (entry_point,))
    exec(compile(tests, "tests.py", "exec"), namespace)
    namespace["check"](candidate)


def main() -> None:
    job = start()
    program = Program(Pipe(job["read_fd"], job["write_fd"]))
    try:
        run(program, job["helpers"], job["tests"], job["entry_point"])
        verdict = {"passed": True, "reason": ""}
    except BaseException as error:
        verdict = {"passed": False, "reason": f"{type(error).__name__}: {error}"[:MAX_REASON]}
    os.write(job["verdict_fd"], json.dumps(verdict).encode() + b"\n")
    os._exit(0)
