"""
Takes everything from the calling process that a program under test does not need. There is no way back.

In this order: resource limits, death with the parent, capabilities, Landlock (which files may be opened) and seccomp
(which system calls may be made). All of it is open to an unprivileged user. The seccomp filter is a list of what is
allowed, so that what the kernel learns tomorrow is refused as well.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct


class ConfinementError(Exception):
    """A part of the sandbox could not be set up; the message names it."""


_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_libc = ctypes.CDLL(None, use_errno=True)

# System calls an interpreter needs to compute, to import, and to read and write files it may open: their numbers on
# x86_64 and aarch64 (None: there is no such call). What is not here fails with EPERM: sockets, new processes and
# threads, signals, exec, ptrace, limits of other processes, permissions and times of files, mounts, keys, ...
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "brk": (12, 214),
    "madvise": (28, 233),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "getrandom": (318, 278),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "pause": (34, None),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# Allowed for some arguments only.
_FCNTL, _OPEN, _OPENAT, _IOCTL = (72, 25), (2, None), (257, 56), (16, 29)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Not F_SETOWN and F_SETSIG, which send signals.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
_NAMELESS = 0o20000000  # the bit that O_TMPFILE adds to O_DIRECTORY
# AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64: numbers mean nothing without the architecture they are made for.
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def confine(limits: dict[str, int], readable: list[str], working_directory: str | None) -> None:
    """
    Confines the calling process, which must have a single thread.

    Args:
        limits (`dict[str, int]`): `cpu_time` in seconds; `memory` and `file_size` in bytes.
        readable (`list[str]`): files and folders that may be read; what does not exist is passed over.
        working_directory (`str`, *optional*): folder in which files may be made, read, changed and removed.

    Raises:
        ConfinementError: if a part could not be set up, or does not hold.
    """
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _ARCHITECTURES:
        raise ConfinementError(f"Linux on x86_64 or aarch64 is needed, this is {platform.system()} on {machine}.")
    _limit_resources(limits)
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, signal.SIGKILL)
    _drop_capabilities()
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)  # a crash is not handed to the machine's collector of crashes
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)
    _restrict_files(readable, working_directory)
    _filter_system_calls(*_ARCHITECTURES[machine])
    _check_that_it_holds()


def _check(result: int, what: str) -> int:
    if result < 0:
        raise ConfinementError(f"{what} failed: {os.strerror(ctypes.get_errno())}.")
    return result


def _prctl(name: str, *arguments: int) -> None:
    arguments += (0,) * (5 - len(arguments))
    _check(_libc.prctl(*(ctypes.c_ulong(argument) for argument in arguments)), f"prctl {name}")


def _limit_resources(limits: dict[str, int]) -> None:
    for name, value in {
        "RLIMIT_CPU": limits["cpu_time"],
        "RLIMIT_AS": limits["memory"],
        "RLIMIT_FSIZE": limits["file_size"],
        "RLIMIT_NOFILE": 32,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError) as error:
            raise ConfinementError(f"setrlimit({name}, {value}) failed: {error}.") from error


def _drop_capabilities() -> None:
    """Root without capabilities: what root may do besides owning files."""
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(_libc.capset(header, bytes(24)), "capset")


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 5, 1 << 8, 1 << 14


def _landlock(number: int, *arguments) -> int:
    return _libc.syscall(ctypes.c_long(number), *arguments)


def _restrict_files(readable: list[str], working_directory: str | None) -> None:
    version = _landlock(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        reason = os.strerror(ctypes.get_errno())
        raise ConfinementError(f"Landlock is not available ({reason}): it takes Linux 5.13 with Landlock turned on.")
    # Rights the kernel knows, by version: 13 of files, then REFER, TRUNCATE, IOCTL_DEV; TCP; signals and sockets.
    files = (1 << (13 + min(version, 3) - 1)) - 1 | (1 << 15 if version >= 5 else 0)
    ruleset = _Ruleset(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset_fd = _check(
        _landlock(444, ctypes.byref(ruleset), ctypes.c_size_t(size), ctypes.c_uint32(0)), "landlock_create_ruleset"
    )
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    rules.append(("/dev/null", _READ_FILE | _WRITE_FILE))
    if working_directory is not None:
        rights = _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE
        rules.append((working_directory, rights))
    for path, rights in rules:
        if not os.path.isdir(path):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = _PathBeneath(rights & files, parent)
        added = _landlock(445, ctypes.c_int(ruleset_fd), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0))
        _check(added, f"landlock_add_rule({path})")
        os.close(parent)
    _check(_landlock(446, ctypes.c_int(ruleset_fd), ctypes.c_uint32(0)), "landlock_restrict_self")
    os.close(ruleset_fd)


# Classic BPF: (code, jump if true, jump if false, constant); a jump counts instructions to skip.
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


def _filter_program(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """Instructions of the filter for one architecture; `column` picks its numbers in the tables above."""
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]

    def branch(number: int | None, body: list[tuple[int, int, int, int]]) -> None:
        """`body`, which must return, for the system call `number`."""
        if number is not None:
            program.extend([(_EQUAL, 0, len(body), number), *body])

    for numbers in _ALLOWED.values():
        branch(numbers[column], [(_RETURN, 0, 0, _ALLOW)])
    allowed = [step for command in _FCNTL_COMMANDS for step in ((_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW))]
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    branch(_FCNTL[column], [(_LOAD, 0, 0, _ARGUMENTS_AT + 8), *allowed, refuse])
    # A file opened to read, or for neither reading nor writing (3), must not be emptied on the way: the first versions
    # of Landlock do not see it. A file without a name takes disk space that the trainer does not see.
    refused = [step for flags in (os.O_TRUNC, 3, os.O_TRUNC | 3) for step in ((_EQUAL, 0, 1, flags), refuse)]
    for numbers, argument in ((_OPEN, 1), (_OPENAT, 2)):
        load = (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument)
        nameless = [load, (_AND, 0, 0, _NAMELESS), (_EQUAL, 0, 1, _NAMELESS), refuse]
        flags = [load, (_AND, 0, 0, os.O_TRUNC | os.O_ACCMODE)]
        branch(numbers[column], [*nameless, *flags, *refused, (_RETURN, 0, 0, _ALLOW)])
    branch(_IOCTL[column], [(_RETURN, 0, 0, _ERRNO | errno.ENOTTY)])
    program.append(refuse)
    return program


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _filter_system_calls(column: int, architecture: int) -> None:
    steps = _filter_program(column, architecture)
    program = _Program(len(steps), b"".join(struct.pack("HBBI", *step) for step in steps))
    filter_mode = 2
    _prctl("PR_SET_SECCOMP (the seccomp filter)", _PR_SET_SECCOMP, filter_mode, ctypes.addressof(program))


def _check_that_it_holds() -> None:
    """A kernel that says yes and does nothing must not go unnoticed."""
    attempts = {
        "seccomp (a socket could be made)": lambda: socket.socket().close(),
        "seccomp (a signal could be sent)": lambda: os.kill(os.getpid(), 0),
        "Landlock (/ could be listed)": lambda: os.listdir("/"),
        "Landlock (/proc could be read)": lambda: os.close(os.open("/proc/self/status", os.O_RDONLY)),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except PermissionError:
            continue
        except OSError as error:
            raise ConfinementError(f"{what.split()[0]} answers in an unexpected way: {error}.") from error
        raise ConfinementError(f"{what}: it was set up and does not hold.")
