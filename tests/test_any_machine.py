"""No test depends on the vector units, the speed or the load of a machine: what can be seen of that in their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path


TESTS = Path(__file__).parent
CLOSE = ("assert_close", "allclose", "isclose", "assert_allclose")  # of torch and numpy: `atol`, `rtol`
CLOCKS = ("time", "monotonic", "perf_counter", "process_time")


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """The calls and assertions in the source of the tests, each with its place."""
    return [
        (f"{path.relative_to(TESTS)}:{node.lineno}", node)
        for path in sorted(TESTS.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Assert)
    ]


def calls() -> Iterator[tuple[str, str, dict[str | None, ast.expr]]]:
    """Place, name of the function and named arguments of every call."""
    for place, node in nodes():
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield place, name, {keyword.arg: keyword.value for keyword in node.keywords}


def is_positive(value: ast.expr | None) -> bool:
    """Whether an argument is there and is no 0."""
    return value is not None and not (isinstance(value, ast.Constant) and value.value == 0)


def test_every_tolerance_has_a_relative_part():
    """Processors sum in the order of their vector units: large numbers differ by more. `closeness.py` scales by itself."""
    wrong = []
    for place, name, given in calls():
        absolute, relative = ("abs", "rel") if name == "approx" else ("atol", "rtol")
        if name in (*CLOSE, "approx") and is_positive(given.get(absolute)) and not is_positive(given.get(relative)):
            wrong.append(place)
    assert [place for place in wrong if not place.startswith("closeness.py")] == []


def test_no_process_is_given_a_time_of_its_own():
    """`tests.processes.HANGS` is for those that hang. A busy machine takes minutes to start one."""
    limits = [place for place, _, given in calls() if isinstance(given.get("timeout"), ast.Constant)]
    assert limits == []


def test_no_assertion_looks_at_a_clock():
    def reads_a_clock(node: ast.AST) -> bool:
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        return is_call and node.func.attr in CLOCKS and getattr(node.func.value, "id", "") == "time"

    asserted = [
        place for place, node in nodes() if isinstance(node, ast.Assert) and any(map(reads_a_clock, ast.walk(node)))
    ]
    assert asserted == []
