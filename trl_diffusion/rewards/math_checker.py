"""
Compares mathematical answers in processes of their own: what a policy wrote is not parsed in the trainer's process.

math-verify and sympy can take hours, fill the memory or abort the interpreter on a short answer (`9^{9^{9^9}}`, `99999999!`),
and their own time limits are signals, which hold in the main thread only and not inside of a C library. `rewards/answer_process.py`
ends the process of an answer at its limits.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from .answer_process import CONFINED, AnswerProcess, workers


_PROGRAM = str(CONFINED / "math_answers.py")
_GOLD_READ, _RIGHT = b"g", b"1"


@dataclass(frozen=True)
class MathLimits:
    """
    What comparing one answer with its gold answer may use. An answer that takes more is wrong.

    Args:
        cpu_time (`float`, *optional*, defaults to `2.0`): seconds of CPU time.
        wall_time (`float`, *optional*, defaults to `10.0`): seconds, for a machine that is too busy to give it CPU time.
        memory (`int`, *optional*, defaults to 1 GiB): bytes of address space, of which math-verify takes 80 MiB.
    """

    cpu_time: float = 2.0
    wall_time: float = 10.0
    memory: int = 2**30


class MathChecker(AnswerProcess):
    """The process that compares answers, started when it is first needed. May be called from several threads at once."""

    purpose, needs = "compares mathematical answers", "math_verify"

    def __init__(self, limits: MathLimits | None = None):
        self.limits = limits or MathLimits()
        super().__init__(workers(), self.limits.wall_time + 5)

    def command(self) -> list[str]:
        if find_spec("math_verify") is None:
            raise ImportError("Mathematical answers are compared by math-verify: pip install 'trl-diffusion[eval]'.")
        return [_PROGRAM]

    def compare(self, pairs: list[tuple[str, str]]) -> list[bool | None]:
        """
        Compares answers, as many at a time as there are `workers()`.

        Args:
            pairs (`list[tuple[str, str]]`): gold answers and given ones, each as math-verify takes it: `$...$` for LaTeX.

        Returns:
            `list`: whether they are equal; `None` where the gold answer cannot be read. It takes at most
            `ceil(len(pairs) / workers())` times `limits.wall_time`, and what it takes to start the process.

        Raises:
            ImportError: if math-verify is not installed.
            RuntimeError: if the process cannot be started.
        """
        if not pairs:
            return []
        with ThreadPoolExecutor(min(len(pairs), workers())) as pool:
            return list(pool.map(self._compare, pairs))

    def _compare(self, pair: tuple[str, str]) -> bool | None:
        job = json.dumps({"gold": pair[0], "answer": pair[1], **asdict(self.limits)}).encode()
        said = self.ask(job)
        return said.endswith(_RIGHT) if _GOLD_READ in said else None
