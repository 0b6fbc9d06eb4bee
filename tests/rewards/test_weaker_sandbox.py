"""
Every part of the sandbox holds something back: without it, hostile programs get what they want, and it shows. So a test
of a hostile program that passes says that the program was held back, not that nobody looked.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest

from tests.rewards.hostile import ATTEMPTS, RARE, REFUSED_CALLS
from tests.rewards.world import LIMITS, PATIENT, TESTS, World, limits_of, program_of_attempt, skip_elsewhere
from trl_diffusion.rewards import sandbox
from trl_diffusion.rewards.confined import confine
from trl_diffusion.rewards.sandbox import SandboxLimits, run_tests


NO_LIMITS = SandboxLimits(300, 60, memory=2**40, file_size=2**40, disk=2**40, files=10**6, output=2**20)


def has_an_effect(world: World, name: str, limits: SandboxLimits = LIMITS) -> bool:
    """Whether an attempt gets what it wants. What it would do to the trainer, it does to another process."""
    program = world.fill_in(program_of_attempt(name, seconds=1.5), trainer=world.process.pid)
    try:
        verdict = run_tests(program, TESTS, entry_point="solve", limits=limits_of(ATTEMPTS[name], limits))
    except json.JSONDecodeError:
        return True  # there are two verdicts
    return verdict.passed or "EFFECT" in verdict.output or not world.is_untouched()


def start_otherwise(patch: pytest.MonkeyPatch, **changes: Callable) -> None:
    """Changes options with which confined processes are started: `NAME=function of the option`."""
    start = subprocess.Popen

    def started(*arguments, **options):
        return start(*arguments, **options | {name: change(options[name]) for name, change in changes.items()})

    patch.setattr(sandbox.subprocess, "Popen", started)


def with_environment(patch, world):
    start_otherwise(patch, env=lambda _: None)


def with_descriptors(patch, world):
    start_otherwise(patch, pass_fds=lambda fds: [*fds, world.secret])


def with_verdict(patch, world):
    """The program has the end of the pipe that the verdict goes to."""
    pipes, pipe = [], os.pipe
    patch.setattr(os, "pipe", lambda: pipes.append(pipe()) or pipes[-1])
    start_otherwise(patch, pass_fds=lambda fds: [*fds, pipes[2][1]])


def with_tests(patch, world):
    """The program's process is told the tests."""
    confined = sandbox._Confined
    patch.setattr(
        sandbox, "_Confined", lambda stack, module, job, *more, **options: confined(
            stack, module, {"tests": TESTS} | job, *more, **options
        )
    )  # fmt: skip


def with_everything_readable(patch, world):
    patch.setattr(sandbox, "readable_files", lambda: ["/"])


def without_looking_at(**limits):
    """The trainer looks at other limits than the program's."""

    def change(patch, world):
        supervise = sandbox._supervise
        patch.setattr(sandbox, "_supervise", lambda *given: supervise(*given[:-1], replace(given[-1], **limits)))

    return change


def without_limit(name: str) -> str:
    return (
        "set_limit = resource.setrlimit\n"
        f"resource.setrlimit = lambda kind, value: kind == resource.{name} or set_limit(kind, value)"
    )


def allowing(*names: str) -> str:
    return f"_ALLOWED.update({ {name: REFUSED_CALLS[name] for name in names} })"


NO_CHECK = "_check_that_it_holds = lambda: None"
NO_LANDLOCK = f"_restrict_files = lambda *_: None\n{NO_CHECK}"
NO_SECCOMP = f"_filter_system_calls = lambda *_: None\n{NO_CHECK}"


class Hole(NamedTuple):
    """
    Args:
        shown_by (`list[str]`): attempts that get through.
        lines (`str`): what is added to `confine.py`.
        patch (`Callable`): what is changed in the trainer's process.
    """

    shown_by: list[str]
    lines: str = ""
    patch: Callable = lambda patch, world: None


HOLES: dict[str, Hole] = {
    "environment": Hole(["the environment", "the environment in C"], patch=with_environment),
    "descriptors": Hole(["descriptors left open"], patch=with_descriptors),
    "verdict": Hole(["a verdict to everyone"], patch=with_verdict),
    "tests": Hole(["looking for the tests"], patch=with_tests),
    "memory": Hole(["memory at once", "memory step by step", "memory mapped and shared"], without_limit("RLIMIT_AS")),
    "CPU time": Hole(["a long loop", "ignoring every signal"], without_limit("RLIMIT_CPU")),
    "size of a file": Hole(["one big file", "one big sparse file"], without_limit("RLIMIT_FSIZE")),
    "open files": Hole(["removed files that are still open", "many descriptors"], without_limit("RLIMIT_NOFILE")),
    "wall time": Hole(["sleeping"], patch=without_looking_at(wall_time=300)),
    "output": Hole(["much output"], patch=without_looking_at(output=2**20)),
    "disk": Hole(["filling the disk"], patch=without_looking_at(disk=2**40)),
    "number of files": Hole(
        ["many files", "removed files that are still mapped", "files put in the place of others"],
        patch=without_looking_at(files=10**6),
    ),
    "files without a name": Hole(["files without a name"], "_NAMELESS = 1 << 30"),
    "files that may be read": Hole(
        ["reading a file", "reading the users", "listing /", "a device", "its own environment"],
        NO_CHECK + "\n_PR_SET_DUMPABLE = 3  # asks, and sets nothing: files in /proc stay its user's own",
        patch=with_everything_readable,
    ),
    "Landlock": Hole(
        ["writing outside", "a new file outside", "removing a file", "moving a file out", "listing a folder"],
        NO_LANDLOCK,
    ),
    "seccomp": Hole(["pair of sockets", "another user", "priority", "system calls of another table"], NO_SECCOMP),
    "seccomp: fork": Hole(["fork bomb"], f"{allowing('clone', 'fork', 'wait4')}\n{without_limit('RLIMIT_NPROC')}"),
    "seccomp: threads": Hole(["thread bomb"], f"{allowing('clone', 'clone3')}\n{without_limit('RLIMIT_NPROC')}"),
    "seccomp: sockets": Hole(["pair of sockets", "Unix sockets"], f"{allowing('socket', 'socketpair')}\n{NO_CHECK}"),
    "seccomp: signals": Hole(["stopping itself"], f"{allowing('kill')}\n{NO_CHECK}"),
    "seccomp: ptrace": Hole(["tracing", "system calls"], allowing("ptrace")),
    "seccomp: keyctl": Hole(["system calls"], allowing("keyctl")),
    "seccomp: memfd_create": Hole(["memory in anonymous files"], allowing("memfd_create")),
    "seccomp: prlimit64": Hole(["its own limits", "killing another by its limits"], allowing("prlimit64")),
    "seccomp: setpriority": Hole(["priority"], allowing("setpriority")),
    "seccomp: sched_setaffinity": Hole(["cores of another"], allowing("sched_setaffinity")),
    "seccomp: setuid": Hole(["another user"], allowing("setuid")),
    "seccomp: permissions": Hole(["permissions"], allowing("chmod", "fchmodat")),
    "seccomp: owner": Hole(["owner"], allowing("chown", "fchownat")),
    "seccomp: times": Hole(["times"], allowing("utimensat")),
    "seccomp: owner of input and output": Hole(
        ["killing another by input and output"], "_FCNTL_COMMANDS = (*_FCNTL_COMMANDS, 8, 10)"
    ),
}


SHOWN = [
    pytest.param(name, attempt, marks=pytest.mark.long if attempt != hole.shown_by[0] else ())
    for name, hole in HOLES.items()
    for attempt in hole.shown_by
]


@pytest.mark.parametrize(("name", "attempt"), SHOWN)
def test_without_a_part(own_world, change_confined, monkeypatch, name, attempt):
    """Of the sandbox as a whole, one part is missing."""
    change_confined(HOLES[name].lines)
    HOLES[name].patch(monkeypatch, own_world)
    assert has_an_effect(own_world, attempt)


# What needs more than one part to be missing. All others have their effect in the test above.
OTHERS = [
    name
    for name, attempt in ATTEMPTS.items()
    if "effect" in attempt.body and not any(name in hole.shown_by for hole in HOLES.values())
]


@pytest.mark.parametrize("name", OTHERS)
def test_without_a_sandbox(own_world, change_confined, monkeypatch, name):
    """Everything that hostile programs look for is there to be found, and they find it."""
    skip_elsewhere(name)
    change_confined("confine = lambda *_: None")
    start_otherwise(monkeypatch, env=lambda _: None, pass_fds=lambda fds: [*fds, own_world.secret])
    with_tests(monkeypatch, own_world)
    without_looking_at(**vars(NO_LIMITS))(monkeypatch, own_world)
    if not has_an_effect(own_world, name, NO_LIMITS):
        assert name in RARE
        pytest.skip("this machine does not let it happen anyway")


# name of an attempt -> version of Landlock that refuses it by itself
LANDLOCK_ALONE = {
    "reading a file": 1,
    "a new folder outside": 1,
    "a pipe with a name": 1,
    "a link out": 1,
    "a hard link": 1,
    "emptying a file": 3,
    "emptying a file opened to read": 3,
    "TCP": 4,
    "killing another": 6,
}


@pytest.mark.parametrize("name", LANDLOCK_ALONE)
def test_landlock_alone(own_world, change_confined, name):
    """What is refused twice is refused by either."""
    version = confine._landlock(444, None, confine.ctypes.c_size_t(0), confine.ctypes.c_uint32(1))
    if version < LANDLOCK_ALONE[name]:
        pytest.skip(f"this kernel has version {version} of Landlock")
    change_confined(NO_SECCOMP)
    assert not has_an_effect(own_world, name)


def test_what_the_process_is(change_confined):
    """Of the parts that no program here notices, as others stand before them: what the kernel says."""
    change_confined(allowing("prctl", "prlimit64"))
    change_confined(
        "def restrict(readable, directory, old=_restrict_files): old(['/'], directory)\n_restrict_files = restrict\n"
        + NO_CHECK
    )
    program = """
import ctypes, json, resource
def look():
    libc, signal = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(2, ctypes.byref(signal), 0, 0, 0)
    with open("/proc/thread-self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in NAMES}
    capabilities = [int(lines[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")]
    return signal.value, libc.prctl(3, 0, 0, 0, 0), lines["NoNewPrivs"].strip(), lines["Seccomp"].strip(), limits, capabilities
"""
    names = [
        "RLIMIT_CPU",
        "RLIMIT_AS",
        "RLIMIT_FSIZE",
        "RLIMIT_NOFILE",
        "RLIMIT_NPROC",
        "RLIMIT_CORE",
        "RLIMIT_MEMLOCK",
    ]
    wanted = [PATIENT.cpu_time, PATIENT.memory, PATIENT.file_size, 32, 0, 0, 0]
    limits = {}
    for name, value in zip(names, wanted, strict=True):
        hard = resource.getrlimit(getattr(resource, name))[1]
        limits[name] = (value if hard == resource.RLIM_INFINITY else min(value, hard),) * 2
    expected = (9, 0, "1", "2", limits, [0] * 4)  # SIGKILL when the trainer dies; not dumpable; a filter
    verdict = run_tests(
        f"NAMES = {json.dumps(names)}\n{program}", f"assert look() == {expected}, look()", limits=PATIENT
    )
    assert verdict.passed, verdict.reason
