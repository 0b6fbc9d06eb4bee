"""Hostile programs leave the trainer, the files and the other processes alone, within their limits, and fail."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.processes import HANGS
from tests.rewards.hostile import ATTEMPTS, PROGRAMS, REFUSED_CALLS, Attempt
from tests.rewards.world import LIMITS, PATIENT, SECRET, TESTS, World, limits_of, program_of_attempt, skip_elsewhere
from trl_diffusion.rewards import sandbox
from trl_diffusion.rewards.code import check_code, code_of_prompt, code_reward, program_of
from trl_diffusion.rewards.confined import confine
from trl_diffusion.rewards.sandbox import SandboxError, SandboxLimits, run_tests


def assert_harmless(world: World, program: str, attempt: Attempt) -> None:
    verdict = run_tests(world.fill_in(program), TESTS, entry_point="solve", limits=limits_of(attempt))
    assert not verdict.passed
    assert "EFFECT" not in verdict.output and SECRET not in verdict.output + verdict.reason
    assert re.search(attempt.reason, verdict.reason), verdict.reason
    assert len(verdict.output) <= LIMITS.output and len(verdict.reason) <= 2000
    assert world.is_untouched(), (world.before, world.state())


# Each ends at a limit of processor time or of output that others end at, too.
MORE_OF_A_KIND = ("endless loop in C", "huge integers", "endless output in small pieces")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in MORE_OF_A_KIND else ()) for name in ATTEMPTS]
)
def test_hostile_function(world, name):
    skip_elsewhere(name)
    assert_harmless(world, program_of_attempt(name, 10**6), ATTEMPTS[name])


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program(world, name):
    assert_harmless(world, PROGRAMS[name].body, PROGRAMS[name])


def test_the_right_program_passes(world):
    verdict = run_tests("def solve(number):\n    print('here')\n    return 2 * number", TESTS, "solve", limits=LIMITS)
    assert verdict.passed and verdict.reason == "" and verdict.output == "here\n" * 3
    assert world.is_untouched()


def test_output_of_a_killed_program():
    """What it printed is there, whoever ended it."""
    limits = replace(PATIENT, cpu_time=1)
    verdict = run_tests("print('before')\nwhile True:\n    pass", "", limits=limits)
    assert not verdict.passed and verdict.output == "before\n"


def test_values_and_objects_cross():
    program = """
import collections, fractions
def same(*values, **named): return (values, named) if named else values[0]
def change(items): items.append(3); items.sort()
def fail(text): raise KeyError(text)
def pairs(): yield from [(1, 2), (3, 4)]
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
    def __len__(self): return 1 + (len(self.next) if self.next else 0)
    def __iter__(self): yield self.value; yield from self.next or ()
    def __repr__(self): return f"Node({self.value})"
def last(node): return last(node.next) if node.next else node
def apply(function, *values, **named): return function(*values, **named)
def compose(f, g): return lambda x: f(g(x))
def rotate(items): items.rotate(1)
def secrets(function): return [name for name in dir(function) if name.strip("_") in ("globals", "code", "closure", "self")]
with open("note.txt", "w") as file: file.write("kept")
def note(): return open("note.txt").read()
"""
    tests = """
values = [None, True, 0, -1, 2**53, -2**70, 10**5000, 1.5, -0.0, float("inf"), 2j, "a\\u20ac\\ud800", b"\\x00\\xff", [],
    [1, [2]], (1,), {1, 2}, frozenset({3}), {"a": 1}, {(1, 2): {3: [4]}}, ((), [()], {"x": ({},)}),
    fractions.Fraction(1, 3), decimal.Decimal("1.50"), datetime.date(2024, 2, 29), datetime.datetime(2024, 1, 1, 3, 4, 5, 6),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc), datetime.time(3, 4), datetime.timedelta(1, 2, 3),
    collections.deque([1, 2], 3), collections.Counter("aab"), collections.OrderedDict(a=1), range(1, 9, 2),
    {fractions.Fraction(1, 2): [range(3)]}]
for value in values:
    got = same(value)
    assert got == value and type(got) is type(value)
assert math.isnan(same(float("nan")))
assert same(1, 2, of=3, do=4) == ((1, 2), {"of": 3, "do": 4})
items = [5, 4]
assert change(items) is None and items == [3, 4, 5]
try:
    fail("x")
except KeyError as error:
    assert "x" in str(error)
else:
    raise AssertionError
assert list(pairs()) == [(1, 2), (3, 4)]
node = Node(1, Node(2))
node.next.next = Node(3)
assert len(node) == 3 and list(node) == [1, 2, 3] and last(node).value == 3 and repr(node) == "Node(1)"
assert note() == "kept"
items = collections.deque([1, 2, 3])
assert rotate(items) is None and items == collections.deque([3, 1, 2])
assert apply(lambda x, y=2: x * y, 4, y=3) == 12 and apply(max, [1, 5, 2]) == 5 and apply(int, "7") == 7
assert compose(lambda x: x + 1, lambda x: x * 2)(5) == 11 and apply(lambda f: f(3), lambda x: x + 1) == 4
assert apply(sorted, [(1, 3), (2, 1)], key=lambda pair: pair[1]) == [(2, 1), (1, 3)]
assert same(values.append) is not None and apply(values.append, 9) is None and values[-1] == 9
assert apply(lambda node: node.value, node) == 1 and secrets(lambda: 0) == []
try:
    apply(fail_here := lambda x: {}[x], 1)
except KeyError:
    pass
else:
    raise AssertionError
"""
    verdict = run_tests(program, tests, limits=PATIENT)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    "text", ["same() == same()", "same() != 1", "same()", "same() < 1", "hash(same()) and same() in [1]"]
)
def test_objects_are_not_compared(text):
    verdict = run_tests(
        "class Same: __eq__ = lambda *_: True\ndef same(): return Same()", f"assert {text}", limits=PATIENT
    )
    assert not verdict.passed and "plain data" in verdict.reason


def test_helpers_hide_the_programs_functions():
    program = "def double(x): return 4\ndef solve(x): return 1"
    tests = "def check(candidate):\n    assert candidate(2) == double(2)"
    for helpers in ("def double(x): return 2 * x", "def double(x): return 2 * x\ndef solve(x):\n    return 4"):
        assert not run_tests(program, tests, "solve", helpers, PATIENT).passed
    right = program.replace("return 1", "return 4")
    assert run_tests(right, tests, "solve", "def double(x): return 2 * x", PATIENT).passed


def children(parent: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and status(int(entry.name))[1] == str(parent):
                found.add(int(entry.name))
    return found


def status(process: int) -> list[str]:
    """State and parent of a process, and more."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def is_alive(process: int) -> bool:
    try:
        return status(process)[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition) -> None:
    deadline = time.monotonic() + HANGS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it hangs")
        time.sleep(0.05)


def test_processes_die_with_the_trainer(tmp_path):
    program = "import time\nopen('running', 'w').close()\ntime.sleep(10**6)"
    code = (
        "from trl_diffusion.rewards.sandbox import SandboxLimits, run_tests\n"
        f"run_tests({program!r}, 'assert f()', limits=SandboxLimits(wall_time=10**6))"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        wait_for(lambda: list(tmp_path.glob("sandbox-*/running")) or trainer.poll() is not None)
        confined = children(trainer.pid)
        assert len(confined) == 2 and all(map(is_alive, confined))
    finally:
        trainer.kill()
        trainer.wait()
    wait_for(lambda: not any(map(is_alive, confined)))


BROKEN = {
    "Landlock is not available": "_landlock = lambda *_: (ctypes.set_errno(38), -1)[1]",
    "landlock_restrict_self failed": "old = _landlock\n_landlock = lambda n, *a: (ctypes.set_errno(1), -1)[1] if n == 446 else old(n, *a)",
    "Landlock .* does not hold": "_restrict_files = lambda *_: None",
    "seccomp filter.* failed": "_filter_program = lambda *_: [(0xFFFF, 0, 0, 0)]",
    "seccomp .* does not hold": "_filter_system_calls = lambda *_: None",
    "capset failed": "_libc.capset = lambda *_: (ctypes.set_errno(1), -1)[1]",
    "setrlimit.RLIMIT_CPU.* failed": "resource.setrlimit = lambda *_: (_ for _ in ()).throw(OSError('no'))",
    "Linux on x86_64 or aarch64 is needed, this is Darwin": "platform.system = lambda: 'Darwin'",
    "ModuleNotFoundError|did not start": "import no_such_module",
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_missing_part_is_an_error(world, change_confined, message):
    """And nothing of the program runs."""
    change_confined(BROKEN[message])
    program = world.fill_in("open('FOLDER/new', 'w')\ndef f(): return 1")
    with pytest.raises(SandboxError, match=message):
        run_tests(program, "assert f() == 1")
    with pytest.raises(SandboxError, match=message):
        code_reward(allow_execution=True)
    assert world.is_untouched()


def test_no_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(SandboxError, match="/no/such/python"):
        run_tests("", "")


def test_files_that_cannot_be_counted(world, monkeypatch):
    """The kernel has no more records of files to give."""
    libc = SimpleNamespace(inotify_init1=lambda flags: -1)
    monkeypatch.setattr(sandbox.ctypes, "CDLL", lambda *_, **options: libc)
    with pytest.raises(SandboxError, match="could not be set up: inotify_init1 failed"):
        run_tests("", "")
    assert world.is_untouched()


@pytest.mark.parametrize(
    "version", [1, *(pytest.param(version, marks=pytest.mark.long) for version in (2, 3, 4, 5)), 6]
)
def test_older_landlock(world, change_confined, version):
    """What the first versions do not see, seccomp refuses."""
    change_confined(f"old = _landlock\n_landlock = lambda n, *a: {version} if a[0] is None else old(n, *a)")
    names = [
        "emptying a file",
        "emptying a file opened to read",
        "emptying a file opened for neither",
        "moving a file out",
        "killing another",
        "reading a file",
    ]
    for name in names:
        test_hostile_function(world, name)
    assert run_tests("def f(): return 1", "assert f() == 1", limits=PATIENT).passed


@pytest.mark.parametrize("name", vars(SandboxLimits()))
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=name):
        SandboxLimits(**{name: 0})


def run_filter(program: list[tuple[int, int, int, int]], architecture: int, number: int, *arguments: int) -> int:
    """What a seccomp filter says to a system call."""
    memory = {0: number, 4: architecture} | {16 + 8 * i: value for i, value in enumerate(arguments)}
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, constant = program[at]
        at += 1
        if code == confine._RETURN:
            return constant
        elif code == confine._LOAD:
            accumulator = memory[constant]
        elif code == confine._AND:
            accumulator &= constant
        elif code == confine._EQUAL:
            at += if_true if accumulator == constant else if_false


@pytest.mark.parametrize("machine", confine._ARCHITECTURES)
def test_filter_of_system_calls(machine):
    column, architecture = confine._ARCHITECTURES[machine]
    program = confine._filter_program(column, architecture)
    allow, refuse = confine._ALLOW, confine._ERRNO | errno.EPERM
    assert max(max(step[1:3]) for step in program) < 256 and len(program) < 4096

    def answer(number: int, *arguments: int) -> int:
        return run_filter(program, architecture, number, *arguments)

    allowed = {numbers[column] for numbers in confine._ALLOWED.values()} - {None}
    special = {numbers[column] for numbers in (confine._FCNTL, confine._OPEN, confine._OPENAT, confine._IOCTL)}
    for number in range(600):
        if number not in special:
            assert answer(number) == (allow if number in allowed else refuse)
        assert answer(number + 2**30) == refuse
        assert run_filter(program, architecture ^ 1, number) == confine._KILL
    assert [answer(confine._FCNTL[column], 0, command) for command in (1, 8, 10, 1030, 1031)] == [
        allow, refuse, refuse, allow, refuse,
    ]  # fmt: skip
    for flags in range(4):
        assert answer(confine._OPENAT[column], 0, 0, flags) == (refuse if flags == 3 else allow)
        emptying = flags | os.O_TRUNC | os.O_CLOEXEC
        assert answer(confine._OPENAT[column], 0, 0, emptying) == (allow if flags in (1, 2) else refuse)
        for nameless in (0o20000000, 0o20200000):  # O_TMPFILE's own bit, and the whole of it on x86_64
            assert answer(confine._OPENAT[column], 0, 0, flags | nameless) == refuse
    assert answer(confine._IOCTL[column], 0, 0) == confine._ERRNO | errno.ENOTTY
    for name, numbers in REFUSED_CALLS.items():
        assert numbers[column] is None or answer(numbers[column]) == refuse, name


def test_names_of_modules():
    """A program's function may be called as a module is."""
    assert run_tests("def bisect(x): return x", "assert bisect(1) == 1 and copy.copy(2) == 2", limits=PATIENT).passed


def test_more_than_1024_descriptors():
    """Whatever the trainer has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert run_tests("def f(): return 1", "assert f() == 1", limits=PATIENT).passed
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# The reward


@pytest.mark.parametrize("options", [{}, {"allow_execution": False}, {"allow_execution": "yes"}])
def test_off_unless_asked_for(options):
    with pytest.raises(ValueError, match="allow_execution=True"):
        code_reward(**options)
    with pytest.raises(ValueError, match="workers"):
        code_reward(allow_execution=True, workers=0)


PROMPT = 'from typing import List\n\ndef one(): return 1\n\ndef count(items: List[int]) -> int:\n    """How many?"""\n'
CHECK = "def check(candidate):\n    assert candidate([3, 4]) == 1 + one()"


ANSWERS = [
    ("    return len(items)\n", 1.0),
    ("    return len(items) + one()\n", 0.0),
    ("```python\ndef count(items: List[int]) -> int:\n    return one() + len(items) - 1\n```", 1.0),
    ("First ```python\ndef count(items): return 0\n```, or ```py\ndef count(items): return len(items)\n```.", 1.0),
    ("```python\ndef count(items): return len(items)\n```, no, ```python\ndef count(items): return 0\n```", 0.0),
    ("```python\n    return len(items)\n```", 1.0),
    ("```python\ndef count(items): return len(items)\n", 1.0),
    ("def one(): return 6\ndef count(items): return 7", 0.0),
    ("", 0.0),
    ("```\ndef count(items): return len(items)\n```", 1.0),
    ("```Python\ndef count(items): return len(items)\n```", 1.0),
    ("```python\r\ndef count(items):\r\n    return len(items)\r\n```\r\n", 1.0),
    ("~~~python\ndef count(items): return len(items)\n~~~", 1.0),
    ("````py\ndef count(items): return len(items)\n````", 1.0),
    ("1. So:\n   ```python\n   def count(items):\n       return len(items)\n   ```", 1.0),
    ("```python\ncount = lambda items: len(items)\n```\nUse:\n```python\nprint(count == 1)\n```", 1.0),
    ("```python\ndef count(items): return len(items)\n```\nUse:\n```python\nprint(count(1))\n```", 1.0),
    ("```python\ndef count(items): return len(items)\n```\nOut:\n```\n2\n```", 1.0),
    (
        "```python\ndef count(items): return 0\n```\nBetter:\n```text\ndef count(items): return len(items)\n```",
        1.0,
    ),
    ("    return len(items)\n```\nThis counts, see ```python\ncount([])\n```", 1.0),
    ("Use ```len``` here:\n```python\ndef count(items): return len(items)\n```", 1.0),
    ("```python\nx = 1\n```python\ndef count(items): return len(items)\n", 1.0),
]
# How messages are taken apart does not depend on how an answer is: bare code, code that is wrong, and fenced code show it.
WHOLE = [
    (answer, value, conversational)
    for conversational in (False, True)
    for answer, value in (ANSWERS[:3] if conversational else ANSWERS)
]


@pytest.fixture(scope="module")
def reward_of_tests():
    """Making one runs a program already."""
    return code_reward(True, PATIENT, workers=1)


@pytest.mark.parametrize(("completion", "reward", "conversational"), WHOLE)
def test_code_reward_with_an_entry_point(reward_of_tests, completion, reward, conversational):
    prompt = PROMPT
    if conversational:
        prompt = [{"role": "user", "content": f"Please complete:\n```python\n{PROMPT}```\nThank you."}]
        completion = [{"role": "assistant", "content": completion}]
    assert reward_of_tests([prompt], [completion], test=[CHECK], entry_point=["count"]) == [reward]


def test_code_reward_with_asserts():
    reward = code_reward(allow_execution=True, limits=PATIENT, workers=2)
    assert reward.__name__ == "code_reward"
    right = "```python\ndef add(a, b):\n    return a + b\n```"
    columns = {
        "test_list": [["assert add(1, 2) == 3", "assert add(X, 1) == 6"]] * 3
        + [[], None, [""], "assert add(1, 2) == 3", "assert add(1, 2) == 3"],
        "test_setup_code": ["X = 5", "X = 6", "X = 5", "", None, "X = 5", "", ""],
        "test_imports": [[], None, ["import math"], [], None, [], "import math", None],
        "other": [0] * 8,
    }
    usage = f"{right}\nLike this:\n```python\nadd(1)\n```"
    wrong = "def add(a, b): return 3"
    completions = [
        right,
        right,
        wrong,
        right,
        right,
        wrong,
        usage,
        "def add(a, b):\n    return a + b\n```\nThat is all.",
    ]
    prompts = ["Add."] * 7 + ["Add.\n```python\n"]
    assert reward(prompts, completions, **columns) == [1.0, 0.0, 0.0, None, None, None, 1.0, 1.0]
    assert reward(["Add."], [right]) == [None]


CASES = "class T(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(f(), 1)"


@pytest.mark.parametrize(
    ("test", "entry_point"),
    [
        ("def test_it():\n    assert f() == 1", None),
        (f"import unittest\n{CASES}\nif __name__ == '__main__':\n    unittest.main()", None),
        ("assert f() == 1", "f"),
        ("def check(candidate):\n    assert candidate() == 1\n\ncheck(f)", None),
        (
            f"from unittest import TestCase\n{CASES.replace('unittest.', '')}\n    def test_no(self): self.skipTest('')",
            "f",
        ),
    ],
)
def test_tests_that_are_called(test, entry_point):
    """A wrong program does not pass because the tests were defined and never run."""
    reward = code_reward(allow_execution=True, limits=PATIENT, workers=2)
    programs = ["def f(): return 1", "def f(): return 2"]
    assert reward(["F."] * 2, programs, test=[test] * 2, entry_point=[entry_point] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"test": "def check(candidate):\n    assert candidate() == 1"},
            "check.candidate., and `entry_point` does not say",
        ),
        ({"test": "def check(candidate):\n    pass", "entry_point": "f"}, "its `check` asserts nothing"),
        ({"test": "def helper():\n    assert f() == 1"}, "assert nothing when they are run"),
        ({"test_list": ["f"], "test_setup_code": "print(1)"}, "assert nothing when they are run"),
        ({"test": "if __name__ == '__main__':\n    assert f()"}, "assert nothing when they are run"),
        ({"test_list": ["# nothing"]}, "assert nothing when they are run"),
        ({"test_list": ["assert f() =="]}, r"not valid Python: invalid syntax \(line 2: 'assert f\(\) =='"),
        ({"test_list": "assert f()\0"}, "not valid Python"),
        ({"test": "import numpy as np, math\nassert f()"}, "its tests import numpy, and the sandbox has the standard"),
        ({"test": "def test_it(fixture):\n    assert f()"}, "test_it takes arguments"),
        ({"test": f"import unittest\n{CASES}\nunittest.main()"}, "leave that out"),
        (
            {"test": "class Own: pass\nassert f(Own()) == 1"},
            "its tests pass a Own to the program: only plain data and",
        ),
    ],
)
def test_tests_that_say_nothing(columns, message):
    """They are an error of their row, and no program is right or wrong by them."""
    names = ("test", "entry_point", "test_list", "test_setup_code")
    right = {"test_list": ["assert f(0) == 1"]}
    columns = {name: [right.get(name), columns.get(name)] for name in names}
    reward = code_reward(allow_execution=True, limits=PATIENT, workers=2)
    with pytest.raises(ValueError, match=f"code_reward, row 1.*{message}"):
        reward(["F."] * 2, ["def f(x): return 1"] * 2, **columns)


def test_the_start_of_a_program():
    assert code_of_prompt(PROMPT, "count") == PROMPT
    assert code_of_prompt("def count(items):\n", "count") == "def count(items):\n"
    assert code_of_prompt("Write a function count, def count please", "count") == ""
    assert code_of_prompt("Look: ```python\nx = 1\n```", "count") == ""
    assert program_of("    return 1", "def count(items):\n", "count") == "def count(items):\n    return 1"
    compile(program_of("def count(items): return 1", "def count(items):\n", "count"), "", "exec")
    assert check_code("    return 2", CHECK, "def one(): return 1\ndef count(items):\n", "count", PATIENT).passed
