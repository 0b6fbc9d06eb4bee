"""What hostile programs go for, and how they are run."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rewards.hostile import ATTEMPTS, Attempt
from trl_diffusion.rewards.confined import confine
from trl_diffusion.rewards.sandbox import SandboxLimits


# Time enough on any machine; what is counted in bytes and files is as scarce as can be.
LIMITS = SandboxLimits(
    wall_time=300, cpu_time=60, memory=256 * 2**20, disk=4 * 2**20, files=64, file_size=2**20, output=4096
)
PATIENT = SandboxLimits(wall_time=300, cpu_time=60)
SECRET = "swordfish"
TESTS = """
def check(candidate):
    number_expected = 4
    assert math.isclose(candidate(2), number_expected)
    assert candidate(2) == number_expected
    assert solve(5) == 10
"""
# A mark that is written at once: whatever becomes of the program then, it is in the pipe.
EFFECT = """
import os, signal, sys, time
def effect(*what): os.write(1, f"EFFECT {what}\\n".encode())
def hold(): time.sleep(SECONDS)
"""


def give_up_capabilities() -> None:
    """Gives up capabilities, in programs that are run next as well: what has none is within the reach of what has none."""
    pr_set_securebits, secbit_noroot = 28, 1
    confine._libc.prctl(pr_set_securebits, secbit_noroot)
    confine._drop_capabilities()


class World:
    """What hostile programs go for, and whether it is as it was."""

    def __init__(self, folder: Path):
        self.folder = folder / "others"
        self.folder.mkdir()
        self.canary = self.folder / "canary.txt"
        self.canary.write_text("alive")
        (folder / "secret.txt").write_text(SECRET)
        self.secret = os.open(folder / "secret.txt", os.O_RDONLY)
        os.set_inheritable(self.secret, True)
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.process = subprocess.Popen(["sleep", "100000"], preexec_fn=give_up_capabilities)
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
        found: set[int] = set()
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

    def fill_in(self, source: str, trainer: int | None = None) -> str:
        return (
            source.replace("NAME_OF_SECRET", "NAME_OF_")
            .replace("CANARY", str(self.canary))
            .replace("FOLDER", str(self.folder))
            .replace("PID", str(self.process.pid))
            .replace("TRAINER", str(trainer or os.getpid()))
            .replace("PORT", str(self.port))
            .replace("SECRET", SECRET)
            .replace("NAME_OF_", "NAME_OF_SECRET")
        )

    def is_untouched(self) -> bool:
        now = self.state()
        # Children and descriptors of tests before this one may go in the meantime.
        return (
            now.pop("processes") <= self.before["processes"]
            and now.pop("descriptors") <= self.before["descriptors"]
            and all(now[name] == self.before[name] for name in now)
            and self.process.poll() is None
            and self.connections() == 0
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.tcp.close()
        self.udp.close()
        os.close(self.secret)


def program_of_attempt(name: str, seconds: float) -> str:
    lines = "\n    ".join(ATTEMPTS[name].body.splitlines())
    return f"{EFFECT.replace('SECONDS', str(seconds))}\ndef solve(number):\n    {lines}\n    return 0\n"


def limits_of(attempt: Attempt, limits: SandboxLimits = LIMITS) -> SandboxLimits:
    return replace(limits, wall_time=attempt.wall_time, cpu_time=attempt.cpu_time)


def skip_elsewhere(name: str) -> None:
    if name == "32-bit system calls" and platform.machine() != "x86_64":
        pytest.skip("machine code of x86_64")
