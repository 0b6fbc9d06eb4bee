"""Hostile programs leave the trainer, the files and the other processes alone, within their limits, and fail."""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rewards.hostile import ATTEMPTS, PROGRAMS
from trl_diffusion.rewards import sandbox
from trl_diffusion.rewards.code import check_code, code_of_prompt, code_reward, program_of
from trl_diffusion.rewards.confined import confine
from trl_diffusion.rewards.sandbox import SandboxError, SandboxLimits, run_tests


LIMITS = SandboxLimits(wall_time=2, cpu_time=1, memory=256 * 2**20, disk=4 * 2**20, files=64, output=4096)
SLACK = 60.0  # seconds that two interpreters may take to start and end on a busy machine
SECRET = "swordfish"
TESTS = """
def check(candidate):
    number_expected = 4
    assert math.isclose(candidate(2), number_expected)
    assert candidate(2) == number_expected
    assert solve(5) == 10
"""
IMPORTS = "import os, signal, sys, time\n"


class World:
    """What hostile programs go for, and whether it is as it was."""

    def __init__(self, folder: Path):
        self.folder = folder / "others"
        self.folder.mkdir()
        self.canary = self.folder / "canary.txt"
        self.canary.write_text("alive")
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.process = subprocess.Popen(["sleep", "600"])
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        for listener in (self.tcp, self.udp):
            listener.setblocking(False)
        self.before = self.state()

    def state(self) -> dict:
        stat = self.canary.stat()
        return {
            "files": sorted(os.listdir(self.folder)),
            "text": self.canary.read_text(),
            "canary": (stat.st_mode, stat.st_uid, stat.st_mtime_ns, stat.st_nlink, os.listxattr(self.canary)),
            "temporary": os.listdir(self.temporary),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "processes": self.processes(),
            "priority": os.getpriority(os.PRIO_PROCESS, self.process.pid),
            "environment": os.environ.get("NAME_OF_SECRET"),
            "handlers": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)],
        }

    def processes(self) -> set[int]:
        """Our children, and processes that work in the temporary folder, whosever children they are."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent == os.getpid() or os.readlink(entry / "cwd").startswith(str(self.temporary)):
                        found.add(int(entry.name))
                except OSError:
                    continue
        return found

    def connections(self) -> int:
        count = 0
        for wait in (self.tcp.accept, lambda: self.udp.recv(1)):
            try:
                wait()
                count += 1
            except BlockingIOError:
                continue
        return count

    def fill_in(self, source: str) -> str:
        return (
            source.replace("NAME_OF_SECRET", "NAME_OF_")
            .replace("CANARY", str(self.canary))
            .replace("FOLDER", str(self.folder))
            .replace("HOME", str(Path.home()))
            .replace("PID", str(self.process.pid))
            .replace("TRAINER", str(os.getpid()))
            .replace("PORT", str(self.port))
            .replace("SECRET", SECRET)
            .replace("NAME_OF_", "NAME_OF_SECRET")
        )

    def assert_untouched(self) -> None:
        assert self.state() == self.before
        assert self.process.poll() is None
        assert self.connections() == 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.tcp.close()
        self.udp.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("NAME_OF_SECRET", SECRET)
    world = World(tmp_path_factory.mktemp("world"))
    patch.setattr(tempfile, "tempdir", str(world.temporary))
    yield world
    world.close()
    patch.undo()


def assert_harmless(world: World, program: str, reason: str) -> None:
    # What the limit of CPU time ends is given time to use it up, on however busy a machine.
    limits = replace(LIMITS, wall_time=30) if "ended" in reason else LIMITS
    start = time.monotonic()
    verdict = run_tests(world.fill_in(program), TESTS, entry_point="solve", limits=limits)
    assert time.monotonic() - start < limits.wall_time + SLACK
    assert not verdict.passed
    assert "EFFECT" not in verdict.output and SECRET not in verdict.output + verdict.reason
    assert re.search(reason, verdict.reason), verdict.reason
    assert len(verdict.output) <= LIMITS.output and len(verdict.reason) <= 2000
    world.assert_untouched()


@pytest.mark.parametrize("name", ATTEMPTS)
def test_hostile_function(world, name):
    if name in ("system calls", "32-bit system calls") and platform.machine() != "x86_64":
        pytest.skip("numbers and machine code are those of x86_64")
    body, reason = ATTEMPTS[name]
    lines = "\n    ".join(body.splitlines())
    assert_harmless(world, f"{IMPORTS}\ndef solve(number):\n    {lines}\n    return 0\n", reason)


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_program(world, name):
    assert_harmless(world, *PROGRAMS[name])


def test_the_right_program_passes(world):
    verdict = run_tests("def solve(number):\n    print('here')\n    return 2 * number", TESTS, "solve", limits=LIMITS)
    assert verdict.passed and verdict.reason == "" and set(verdict.output.split()) <= {"here"}
    world.assert_untouched()


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
with open("note.txt", "w") as file: file.write("kept")
def note(): return open("note.txt").read()
"""
    tests = """
values = [None, True, 0, -1, 2**53, -2**70, 10**5000, 1.5, -0.0, float("inf"), 2j, "a\\u20ac\\ud800", b"\\x00\\xff", [],
    [1, [2]], (1,), {1, 2}, frozenset({3}), {"a": 1}, {(1, 2): {3: [4]}}, ((), [()], {"x": ({},)})]
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
"""
    verdict = run_tests(program, tests)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    "text", ["same() == same()", "same() != 1", "same()", "same() < 1", "hash(same()) and same() in [1]"]
)
def test_objects_are_not_compared(text):
    verdict = run_tests("class Same: __eq__ = lambda *_: True\ndef same(): return Same()", f"assert {text}")
    assert not verdict.passed and "plain data" in verdict.reason


def test_helpers_hide_the_programs_functions():
    program = "def double(x): return 4\ndef solve(x): return 1"
    tests = "def check(candidate):\n    assert candidate(2) == double(2)"
    assert not run_tests(program, tests, "solve", "def double(x): return 2 * x").passed
    assert not run_tests(program, tests, "solve", "def double(x): return 2 * x\ndef solve(x):\n    return 4").passed


def test_processes_die_with_the_trainer(tmp_path):
    code = (
        "from trl_diffusion.rewards.sandbox import run_tests\n"
        "run_tests('import time\\nprint(1)\\ntime.sleep(60)', 'assert f()')"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})

    def at_work() -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and os.readlink(entry / "cwd").startswith(str(tmp_path)):
                    found.append(entry.name)
            except OSError:
                continue
        return found

    def wait(condition) -> bool:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        return condition()

    try:
        assert wait(at_work)
        time.sleep(0.5)
    finally:
        trainer.kill()
        trainer.wait()
    assert wait(lambda: not at_work())


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
def test_a_missing_part_is_an_error(world, tmp_path, monkeypatch, message):
    """And nothing of the program runs."""
    confined = tmp_path / "confined"
    shutil.copytree(sandbox._CONFINED, confined)
    with (confined / "confine.py").open("a") as file:
        file.write("\n\n" + BROKEN[message] + "\n")
    monkeypatch.setattr(sandbox, "_CONFINED", str(confined))
    program = world.fill_in("open('FOLDER/new', 'w')\ndef f(): return 1")
    with pytest.raises(SandboxError, match=message):
        run_tests(program, "assert f() == 1")
    with pytest.raises(SandboxError, match=message):
        code_reward(allow_execution=True)
    world.assert_untouched()


def test_no_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(SandboxError, match="/no/such/python"):
        run_tests("", "")


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_older_landlock(world, tmp_path, monkeypatch, version):
    """What the first versions do not see, seccomp refuses."""
    confined = tmp_path / "confined"
    shutil.copytree(sandbox._CONFINED, confined)
    with (confined / "confine.py").open("a") as file:
        file.write(f"\n\nold = _landlock\n_landlock = lambda n, *a: {version} if a[0] is None else old(n, *a)\n")
    monkeypatch.setattr(sandbox, "_CONFINED", str(confined))
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
    assert run_tests("def f(): return 1", "assert f() == 1").passed


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
    assert answer(confine._IOCTL[column], 0, 0) == confine._ERRNO | errno.ENOTTY


def test_names_of_modules():
    """A program's function may be called as a module is."""
    assert run_tests("def bisect(x): return x", "assert bisect(1) == 1 and copy.copy(2) == 2").passed


def test_more_than_1024_descriptors():
    """Whatever the trainer has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert run_tests("def f(): return 1", "assert f() == 1").passed
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


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("    return len(items)\n", 1.0),
        ("    return len(items) + one()\n", 0.0),
        ("```python\ndef count(items: List[int]) -> int:\n    return one() + len(items) - 1\n```", 1.0),
        ("First ```python\ndef count(items): return 0\n```, or ```py\ndef count(items): return len(items)\n```.", 1.0),
        ("```python\ndef count(items): return len(items)\n```, no, ```python\ndef count(items): return 0\n```", 0.0),
        ("```python\n    return len(items)\n```", 1.0),
        ("```python\ndef count(items): return len(items)\n", 1.0),
        ("def one(): return 6\ndef count(items): return 7", 0.0),
        ("", 0.0),
    ],
)
@pytest.mark.parametrize("conversational", [False, True])
def test_code_reward_with_an_entry_point(completion, reward, conversational):
    prompt = PROMPT
    if conversational:
        prompt = [{"role": "user", "content": f"Please complete:\n```python\n{PROMPT}```\nThank you."}]
        completion = [{"role": "assistant", "content": completion}]
    verdicts = code_reward(True, workers=1)([prompt], [completion], test=[CHECK], entry_point=["count"])
    assert verdicts == [reward]


def test_code_reward_with_asserts():
    reward = code_reward(allow_execution=True, limits=LIMITS, workers=2)
    assert reward.__name__ == "code_reward"
    right = "```python\ndef add(a, b):\n    return a + b\n```"
    columns = {
        "test_list": [["assert add(1, 2) == 3", "assert add(X, 1) == 6"]] * 3 + [[], None],
        "test_setup_code": ["X = 5", "X = 6", "X = 5", "", None],
        "test_imports": [[], None, ["import math"], [], None],
        "other": [0] * 5,
    }
    completions = [right, right, "def add(a, b): return 3", right, right]
    assert reward(["Add."] * 5, completions, **columns) == [1.0, 0.0, 0.0, None, None]
    assert reward(["Add."], [right]) == [None]


def test_the_start_of_a_program():
    assert code_of_prompt(PROMPT, "count") == PROMPT
    assert code_of_prompt("def count(items):\n", "count") == "def count(items):\n"
    assert code_of_prompt("Write a function count, def count please", "count") == ""
    assert code_of_prompt("Look: ```python\nx = 1\n```", "count") == ""
    assert program_of("    return 1", "def count(items):\n", "count") == "def count(items):\n    return 1"
    compile(program_of("def count(items): return 1", "def count(items):\n", "count"), "", "exec")
    assert check_code("    return 2", CHECK, "def one(): return 1\ndef count(items):\n", "count").passed
