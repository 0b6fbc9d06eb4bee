"""
The process of the tests: runs them against functions that live in the process of the program, and gives the verdict.

No line of the program runs here. What it answers arrives as plain data, made anew from JSON, so that comparisons are
Python's own; an object of the program's own classes can be called and looked into, but not compared. The program
can call the functions that the tests pass to it, and nothing else of theirs.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from start import start
from wire import Pipe, decode, encode, exception, failure


MAX_REASON = 2000  # characters


class Program:
    """The program under test, seen from the tests."""

    def __init__(self, pipe: Pipe):
        self._pipe = pipe
        self._functions: list[Any] = []  # of the tests, that the program may call

    def ask(self, of: int, do: str, arguments: tuple = (), keywords: dict | None = None) -> Any:
        """Asks the program's process and waits. Raises what the program raised, as a built-in exception."""
        self._pipe.send(
            {
                "of": of,
                "do": do,
                "arguments": encode(list(arguments), self._refer),
                "keywords": encode(keywords or {}, self._refer),
            }
        )
        while "call" in (reply := self._pipe.receive()):
            self._pipe.send(self._call_back(reply))
        if "raised" in reply:
            raise exception(str(reply["raised"]), str(reply.get("message")))
        changed = self.decode(reply.get("arguments", []))
        for argument, now in zip(arguments, changed, strict=False):
            _update(argument, now)
        return self.decode(reply.get("value"))

    def decode(self, value: Any) -> Any:
        return decode(value, self._resolve)

    def _call_back(self, request: dict) -> dict:
        """Calls a function of the tests that the program was given, as it asks."""
        try:
            function = self._functions[request["call"]]
            arguments, keywords = self.decode(request["arguments"]), self.decode(request["keywords"])
            return {"value": encode(function(*arguments, **keywords), self._refer)}
        except Exception as error:
            return failure(error)

    def _resolve(self, value: dict) -> Any:
        if value["type"] == "function":
            return self._functions[value["id"]]
        return Remote(self, int(value["id"]))

    def _refer(self, value: Any) -> dict:
        """What stands for a value that is no plain data. Raises `Unsupported` for an object of the tests' own."""
        if isinstance(value, Remote):
            return {"type": "object", "id": value._number}
        name = getattr(value, "__name__", "")
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return {"type": "builtin", "name": name}
        if isinstance(value, FunctionType | BuiltinFunctionType | MethodType | partial):
            self._functions.append(value)
            return {"type": "function", "id": len(self._functions) - 1}
        raise Unsupported(
            f"its tests pass a {type(value).__name__} to the program: only plain data and functions can be passed"
        )


def _update(argument: Any, now: Any) -> None:
    """Makes a list, deque, set or dictionary that was passed to the program equal to what the program made of it."""
    if type(argument) is list and type(now) is list:
        argument[:] = now
    elif type(argument) is deque and type(now) is deque:
        argument.clear()
        argument.extend(now)
    elif type(argument) in (set, dict, Counter, OrderedDict) and type(now) is type(argument):
        argument.clear()
        argument.update(now)


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


class Unsupported(BaseException):
    """The tests need what there is not here. No `except Exception` of theirs hides it."""


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
        entry_point (`str`, *optional*): name of the function that is handed to the tests' `check`, if they have one. Where
            they have none, functions `test...()` and classes of `unittest.TestCase` are run.
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
    candidate = None
    if entry_point is not None:
        candidate = namespace[entry_point] = program.ask(0, "get", (entry_point,))
    exec(compile(tests, "tests.py", "exec"), namespace)
    if entry_point is not None and "check" in namespace:
        namespace["check"](candidate)
        return
    for name, value in list(namespace.items()):
        if isinstance(value, FunctionType) and value.__code__.co_filename == "tests.py" and name.startswith("test"):
            value()
    if "unittest" in sys.modules:
        _run_cases(namespace)


def _run_cases(namespace: dict[str, Any]) -> None:
    """Runs the classes of `unittest.TestCase` among the tests. Raises unless all of their tests were run and passed."""
    import unittest

    cases = [value for value in namespace.values() if isinstance(value, type) and issubclass(value, unittest.TestCase)]
    suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases))
    result = unittest.TestResult()
    if suite.countTestCases() == 0:
        return
    suite.run(result)
    if not result.wasSuccessful() or len(result.skipped) == result.testsRun:
        failed = [text for _, text in [*result.failures, *result.errors]]
        raise AssertionError(
            failed[0].strip().splitlines()[-1] if failed else "the test cases passed in an unexpected way"
        )


def main() -> None:
    job = start()
    program = Program(Pipe(job["read_fd"], job["write_fd"]))
    try:
        run(program, job["helpers"], job["tests"], job["entry_point"])
        verdict = {"passed": True, "reason": ""}
    except Unsupported as error:
        verdict = {"passed": False, "reason": str(error), "is_unsupported": True}
    except BaseException as error:
        verdict = {"passed": False, "reason": f"{type(error).__name__}: {error}"[:MAX_REASON]}
    os.write(job["verdict_fd"], json.dumps(verdict).encode() + b"\n")
    os._exit(0)
