"""What can be known of a row's tests before anything runs: what they call, and whether they could tell right from wrong."""

from __future__ import annotations

import ast
import builtins
import sys
from functools import lru_cache


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


@lru_cache(maxsize=1024)
def names_called(tests: str) -> frozenset[str]:
    """Names of functions that tests call and do not define; none if the tests are not valid Python."""
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    own = {node.name for node in nodes if isinstance(node, _DEFINITIONS[:3])}
    return frozenset(name for name in called - own if not hasattr(builtins, name))


@lru_cache(maxsize=1024)
def problem_of(setup: str, tests: str, entry_point: str | None) -> str | None:
    """
    Why a row can say nothing about a program, or `None` if it can.

    Args:
        setup (`str`): source that runs before the tests.
        tests (`str`): source of the tests.
        entry_point (`str`, *optional*): name of the function that `check` is called with.
    """
    try:
        tree = ast.parse(f"{setup}\n{tests}")
        body = ast.parse(tests).body
    except SyntaxError as error:
        return f"its tests are not valid Python: {error.msg} (line {error.lineno}: {(error.text or '').strip()!r})"
    except (ValueError, RecursionError, MemoryError) as error:
        return f"its tests are not valid Python: {error}"
    missing = sorted(_modules(tree) - sys.stdlib_module_names)
    if missing:
        return f"its tests import {', '.join(missing)}, and the sandbox has the standard library only"
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    if entry_point and "check" in functions:
        return None if _can_fail(functions["check"]) else "its `check` asserts nothing"
    test_functions = [node for name, node in functions.items() if name.startswith("test")]
    fixtures = [node.name for node in test_functions if len(node.args.args) > len(node.args.defaults)]
    if fixtures:
        return f"its test function {fixtures[0]} takes arguments, and there is nobody to give them"
    if any(ast.unparse(node.func) == "unittest.main" for node in _calls_at_top(body)):
        return "it calls unittest.main(); leave that out, test cases are run without it"
    cases = [
        node
        for node in body
        if isinstance(node, ast.ClassDef) and any("TestCase" in ast.unparse(base) for base in node.bases)
    ]
    run = [
        *test_functions,
        *cases,
        *(node for node in body if not isinstance(node, _DEFINITIONS) and not _is_main(node)),
    ]
    if any(map(_can_fail, run)):
        return None
    if "check" in functions:
        return "its tests define check(candidate), and `entry_point` does not say which function to check"
    return "its tests assert nothing when they are run"


def _can_fail(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Assert | ast.Raise | ast.Call) for inner in ast.walk(node))


def _is_main(node: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__"`, which does not hold in the sandbox."""
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _calls_at_top(body: list[ast.stmt]) -> list[ast.Call]:
    return [node.value for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]


def _modules(tree: ast.AST) -> set[str]:
    """Modules that are imported, other than within `try`."""
    found: set[str] = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif not isinstance(node, ast.Try):
            waiting.extend(ast.iter_child_nodes(node))
    return found
