"""
Runs a program that a model wrote against tests, where it can do no harm and cannot forge the verdict.

Two bare interpreters (`python -I -S`: standard library only, empty environment, no inherited file descriptors) are
started for each verdict. One runs the program. The other runs the tests and calls the program's functions over a pipe;
answers travel as plain data. Both confine themselves before they run anything, with what an unprivileged user has on
Linux:

- seccomp lets through the system calls that computing takes. There are no sockets, no new processes or threads, no
  signals to anyone, no exec, no ptrace. Since there is one process and it stays one, killing it ends everything.
- Landlock lets files be opened for reading in the standard library and the system's shared libraries only, and files
  be made in one empty working directory only, which is removed at the end. There is no /proc.
- Resource limits bound CPU time, memory, file size and open files; the trainer bounds wall time, output, disk space and
  the number of files that are made. Every file has a name when it is made, so the trainer hears of all of them.
- Capabilities are given up, so that root in a container is no better off than anyone else.

Namespaces are not used: many containers and distributions forbid them, and what they would add, a view without other
processes and files, the above already refuses. A part that is missing or does not hold is a `SandboxError`, never a
weaker sandbox.

The tests and the verdict live in a process where no line of the program runs, so printing, exiting, patching builtins
or searching the interpreter's memory gains nothing: the most a program can do is to answer. Only plain data can be
compared; an object with an `__eq__` of its own fails the test.

What is left:

- The kernel is shared: a hole in it is a hole in the sandbox.
- Metadata of files outside (names, sizes, times, targets of links) can be queried, though not their content. Packages
  installed beside the standard library can be read.
- Timing and load are visible. Up to `workers` programs compete with the trainer for CPU and memory, within their limits.
  Disk space is looked at every 0.05 s, and files that were removed and are still open or mapped are not seen, so a
  program may write more than `disk` before it is stopped, but never more than `files` times `file_size`.
- Tests are trusted, and only as good as they are. A program can answer their inputs by heart; it can change a list it
  is given, and with it what a test compares with later (`assert f(xs) == sorted(xs)`); a name that tests use and do not
  define is the program's (`isclose` without an import); so is the word for what an object of its own does
  (`assert f(x).is_right() is True`).
- A function that tests pass to a program is called in the tests' process as often and with what the program likes, and the
  program may hide what it raises. Nothing else of it can be reached.
- If the trainer itself is killed, the processes die with it, but the working directory stays behind.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path


_CONFINED = str(Path(__file__).parent / "confined")
_START_TIME = 60.0  # seconds that an interpreter may take to start and to confine itself
_POLL = 0.05  # seconds between two looks at the working directory


class SandboxError(RuntimeError):
    """The sandbox could not be set up. The message names the part that is missing."""


@dataclass(frozen=True)
class SandboxLimits:
    """
    What a program may use.

    Args:
        wall_time (`float`, *optional*, defaults to `10.0`): seconds, for the program and its tests together.
        cpu_time (`int`, *optional*, defaults to `5`): seconds of CPU time, for the program and for its tests each.
        memory (`int`, *optional*, defaults to 512 MiB): bytes of address space, of which an interpreter takes 20 MiB.
        file_size (`int`, *optional*, defaults to 1 MiB): bytes of one file in the working directory.
        disk (`int`, *optional*, defaults to 16 MiB): bytes of all files in the working directory. Looked at every
            0.05 s: a program that writes fast is stopped a little above.
        files (`int`, *optional*, defaults to `256`): files that are made in the working directory, counting those that
            are removed again.
        output (`int`, *optional*, defaults to 64 KiB): bytes of standard output and error that are kept; a program
            that prints more is stopped.
    """

    wall_time: float = 10.0
    cpu_time: int = 5
    memory: int = 512 * 2**20
    file_size: int = 2**20
    disk: int = 16 * 2**20
    files: int = 256
    output: int = 64 * 2**10

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")


@dataclass(frozen=True)
class Verdict:
    """
    What came of a program.

    Attributes:
        passed (`bool`): whether the tests passed.
        reason (`str`): why not.
        output (`str`): what the program printed, up to the limit.
        is_unsupported (`bool`): whether the tests need what the sandbox does not have, so that no program can pass.
    """

    passed: bool
    reason: str = ""
    output: str = ""
    is_unsupported: bool = False


def run_tests(
    program: str,
    tests: str,
    entry_point: str | None = None,
    helpers: str = "",
    limits: SandboxLimits | None = None,
) -> Verdict:
    """
    Runs a program and its tests in the sandbox. May be called from several threads at once.

    Args:
        program (`str`): source of the program. Not trusted.
        tests (`str`): source of the tests, which use the program's functions and classes by their names.
        entry_point (`str`, *optional*): if given, and the tests define a function `check`, that is called with the
            program's function of this name. Otherwise functions `test...()` and classes of `unittest.TestCase` are run.
        helpers (`str`, *optional*): source that runs before the tests. Trusted: what it defines is used by the tests
            in place of what the program defines under the same name (other than `entry_point`).
        limits (`SandboxLimits`, *optional*): what the program may use.

    Returns:
        `Verdict`: passed if the tests ran to their end, within the limits, without an exception.

    Raises:
        SandboxError: if the sandbox cannot be set up. Nothing of the program has run then.
    """
    limits = limits or SandboxLimits()
    with ExitStack() as stack:
        directory = tempfile.mkdtemp(prefix="sandbox-")
        stack.callback(shutil.rmtree, directory)
        files = _FilesMade(stack, directory)
        questions, answers, verdicts, output = (_Pipe(stack) for _ in range(4))
        program_job = {"program": program, "read_fd": questions.read, "write_fd": answers.write}
        candidate = _Confined(stack, "candidate", program_job, limits, directory, stdout=output.write)
        tests_job = {
            "tests": tests,
            "helpers": helpers,
            "entry_point": entry_point,
            "read_fd": answers.read,
            "write_fd": questions.write,
            "verdict_fd": verdicts.write,
        }
        checker = _Confined(stack, "checker", tests_job, limits, None, stdout=subprocess.DEVNULL)
        for pipe in (questions, answers):
            pipe.close_read()
        for pipe in (questions, answers, verdicts, output):
            pipe.close_write()
        checker.send_job()
        checker.wait_until_confined()
        candidate.send_job()  # the program is let go last
        candidate.wait_until_confined()
        return _supervise(verdicts.read, output.read, directory, files, limits)


def require_sandbox() -> None:
    """Raises a `SandboxError` unless the sandbox works here."""
    verdict = run_tests("def f(): return 1", "assert f() == 1", limits=SandboxLimits(wall_time=60))
    if not verdict.passed:
        raise SandboxError(f"The sandbox was set up, but a correct program failed in it: {verdict.reason}")


class _Pipe:
    """A pipe whose ends are closed with the stack, if not before."""

    def __init__(self, stack: ExitStack):
        self.read, self.write = os.pipe()
        self._open = {self.read, self.write}
        stack.callback(self._close_all)

    def close_read(self) -> None:
        self._close(self.read)

    def close_write(self) -> None:
        self._close(self.write)

    def _close_all(self) -> None:
        for fd in self._open:
            os.close(fd)

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.remove(fd)
            os.close(fd)


class _Confined:
    """One confined process. It ends, for certain, with the stack."""

    def __init__(
        self,
        stack: ExitStack,
        module: str,
        job: dict,
        limits: SandboxLimits,
        working_directory: str | None,
        stdout: int,
    ):
        self._ready = _Pipe(stack)
        self._module = module
        self._job = job | {
            "limits": {"cpu_time": limits.cpu_time, "memory": limits.memory, "file_size": limits.file_size},
            "readable": readable_files(),
            "working_directory": working_directory,
            "ready_fd": self._ready.write,
        }
        start = f"import sys; sys.path.insert(0, {_CONFINED!r}); import {module}; sys.path.pop(0); {module}.main()"
        fds = [value for name, value in self._job.items() if name.endswith("_fd")]
        try:
            self._process = subprocess.Popen(
                # -u: what a program printed is here when it is killed.
                [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", "-c", start],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                cwd=working_directory or "/",
                env={},
                pass_fds=fds,
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"The sandbox needs to start {sys.executable!r}: {error}") from error
        stack.callback(self._end)
        assert self._process.stdin is not None  # it is a pipe
        self._stdin = self._process.stdin
        self._ready.close_write()

    def send_job(self) -> None:
        with suppress(BrokenPipeError):  # then it will not be ready either
            self._stdin.write(json.dumps(self._job).encode())
            self._stdin.close()

    def wait_until_confined(self) -> None:
        """Raises a `SandboxError` unless the process reports that it has confined itself."""
        report, deadline = b"", time.monotonic() + _START_TIME
        while _wait([self._ready.read], deadline - time.monotonic()):
            chunk = os.read(self._ready.read, 2**16)
            report += chunk
            if not chunk:
                break
        if report != b"ready":
            reason = report.decode(errors="replace") or "its interpreter did not start."
            raise SandboxError(f"The sandbox could not be set up: {reason}")

    def _end(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._process.wait()


class _FilesMade:
    """
    Counts the files that are made in a directory from now on, whether or not they are still there when it looks: the
    kernel keeps a record (inotify). A file that was removed takes disk space for as long as it is open or mapped.
    """

    _CREATE, _OVERFLOW = 0x100, 0x4000
    # With moves and removals in between, two files of one name are not taken for the same event.
    _EVENTS = _CREATE | 0x40 | 0x80 | 0x200  # IN_MOVED_FROM, IN_MOVED_TO, IN_DELETE
    _HEAD = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows

    def __init__(self, stack: ExitStack, directory: str):
        self._count = 0
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._check(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")
        stack.callback(os.close, self._fd)
        self._check(libc.inotify_add_watch(self._fd, os.fsencode(directory), self._EVENTS), "inotify_add_watch")

    @staticmethod
    def _check(result: int, what: str) -> int:
        if result < 0:
            raise SandboxError(f"The sandbox could not be set up: {what} failed: {os.strerror(ctypes.get_errno())}.")
        return result

    def are_more_than(self, limit: int) -> bool:
        while self._count <= limit:
            try:
                events = os.read(self._fd, 2**16)
            except BlockingIOError:
                return False
            while events:
                _, mask, _, length = self._HEAD.unpack_from(events)
                self._count += limit + 1 if mask & self._OVERFLOW else bool(mask & self._CREATE)
                events = events[self._HEAD.size + length :]
        return True


def _wait(fds: list[int], seconds: float) -> list[int]:
    """Those of `fds` that can be read, or have been closed at the other end, after `seconds` at most."""
    poll = select.poll()  # not `select`, which knows the first 1024 descriptors only
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(max(0.0, seconds * 1000))]


def _supervise(verdict_fd: int, output_fd: int, directory: str, files: _FilesMade, limits: SandboxLimits) -> Verdict:
    """Waits for the verdict, or for a limit to be passed."""
    deadline = time.monotonic() + limits.wall_time
    verdict, output, fds = b"", b"", [verdict_fd, output_fd]

    def failed(reason: str) -> Verdict:
        return Verdict(False, reason, output[: limits.output].decode(errors="replace"))

    while verdict_fd in fds and not verdict.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return failed(f"It took more than {limits.wall_time:g} s.")
        for fd in _wait(fds, min(_POLL, remaining)):
            chunk = os.read(fd, 2**16)
            if not chunk:
                fds.remove(fd)
            elif fd == verdict_fd:
                verdict += chunk
            else:
                output += chunk
        if len(output) > limits.output:
            return failed(f"It printed more than {limits.output} bytes.")
        if files.are_more_than(limits.files):
            return failed(f"It made more than {limits.files} files.")
        if _uses_more_disk_than(limits.disk, directory):
            return failed(f"It wrote more than {limits.disk} bytes.")
    if not verdict:
        return failed("The process of the tests ended before the tests.")
    if output_fd in fds and _wait([output_fd], 0):
        output += os.read(output_fd, 2**16)
    result = json.loads(verdict)
    return replace(failed(result["reason"]), **result)


def _uses_more_disk_than(limit: int, directory: str) -> bool:
    size = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                size += entry.stat(follow_symlinks=False).st_blocks * 512
            if size > limit:
                return True
    return False


@cache
def readable_files() -> list[str]:
    """Files and folders an interpreter needs to import the standard library."""
    paths = sysconfig.get_paths()
    libraries = [f"{root}/{name}" for root in ("", "/usr") for name in ("lib", "lib64")]
    devices = ["/dev/urandom", "/dev/random", "/dev/zero"]
    standard = [paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib")]
    return [*standard, *libraries, *devices, "/etc/ld.so.cache"]
