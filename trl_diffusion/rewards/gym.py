"""
Scores answers with the verifiers of reasoning-gym (`pip install 'trl-diffusion[tasks]'`), in processes of their own.

A verifier looks at any text that a policy writes: it may raise an exception, or take hours. Some verifiers run the text as Python. None
of this happens in the trainer's process; see `rewards/confined/gym_answers.py`.
"""

from __future__ import annotations

import ast
import inspect
import json
import pickle
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .answer_process import CONFINED, STARTED, AnswerProcess, workers
from .completions import texts
from .sandbox import SandboxError, readable_files


MISSING = "The tasks `reasoning_gym:NAME` need reasoning-gym, which is missing: pip install 'trl-diffusion[tasks]'."
_RUNNING = {"eval", "exec", "parse_expr", "sympify"}  # functions that run a text as Python
_CHUNK = 64  # answers of a process, where none of them is run
MAX_ANSWER = 20_000  # characters; a longer answer is wrong


@dataclass(frozen=True)
class GymLimits:
    """
    What scoring one answer may use. An answer that takes more gets 0.

    Args:
        cpu_time (`float`, *optional*, defaults to `2.0`): seconds of CPU time.
        wall_time (`float`, *optional*, defaults to `10.0`): seconds, for a machine that is too busy to give it CPU time.
        memory (`int`, *optional*, defaults to 2 GiB): bytes of address space, which numpy and sympy share.
    """

    cpu_time: float = 2.0
    wall_time: float = 10.0
    memory: int = 2**31


class GymScorer(AnswerProcess):
    """
    The process that scores answers to the questions of one generator. May be called from several threads at once.

    Args:
        name (`str`): name of the generator.
        options (`dict[str, Any]`, *optional*): its options.
        limits ([`GymLimits`], *optional*): what an answer may use.
    """

    purpose, needs = "scores answers with reasoning-gym", "reasoning_gym"

    def __init__(self, name: str, options: dict[str, Any] | None = None, limits: GymLimits | None = None):
        self.name, self.options, self.limits = name, options or {}, limits or GymLimits()
        super().__init__(workers(), _CHUNK * (self.limits.wall_time + 5))

    def __reduce__(self):
        return GymScorer, (self.name, self.options, self.limits)

    def command(self) -> list[str]:
        if find_spec("reasoning_gym") is None:
            raise ImportError(MISSING)
        task = {
            "name": self.name,
            "options": self.options,
            "runs_answers": runs_answers(self.name),
            "readable": [*readable_files(), sysconfig.get_paths()["purelib"], *_folders()],
            **asdict(self.limits),
        }
        return [str(CONFINED / "gym_answers.py"), json.dumps(task)]

    def scores(self, answers: Sequence[str], entries: Sequence[dict[str, Any]]) -> list[float]:
        """
        Scores answers.

        Args:
            answers (`Sequence[str]`): what was answered.
            entries (`Sequence[dict]`): for each answer, what the generator has made: `question`, `answer` and `metadata`.

        Returns:
            `list[float]`: what the verifier gives; 0 for an answer with which it fails, or takes more than the limits.

        Raises:
            ImportError: if reasoning-gym is not installed.
            RuntimeError: if no process can be started.
            SandboxError: if the verifier runs answers as Python, and there can be no sandbox on this machine.
        """
        jobs = [(answer.strip(), entry) for answer, entry in zip(answers, entries, strict=True)]
        size = 1 if runs_answers(self.name) else _CHUNK
        size = min(size, -(-len(jobs) // workers()) or 1)
        chunks = [jobs[begin : begin + size] for begin in range(0, len(jobs), size)]
        with ThreadPoolExecutor(workers()) as pool:
            return [score for found in pool.map(self._scores, chunks) for score in found]

    def _scores(self, jobs: list[tuple[str, dict[str, Any]]]) -> list[float]:
        """The scores of some answers. One that has ended its process gets 0, and those after it another process."""
        found: list[float] = []
        while len(found) < len(jobs):
            if len(jobs[len(found)][0]) > MAX_ANSWER:
                found.append(0.0)
                continue
            rest = [(answer if len(answer) <= MAX_ANSWER else "", entry) for answer, entry in jobs[len(found) :]]
            said = self.ask(pickle.dumps(rest)).removeprefix(STARTED)
            if said.startswith(b"!"):
                raise SandboxError(
                    f"The verifier of {self.name} runs answers as Python, for which there must be a sandbox: "
                    f"{said[1:].decode(errors='replace')}"
                )
            new = [_number(line) for line in said.split(b"\n")[:-1][: len(rest)]]
            found += new if len(new) == len(rest) else [*new, 0.0]
        return [0.0 if len(answer) > MAX_ANSWER else score for score, (answer, _) in zip(found, jobs, strict=True)]


def _number(line: bytes) -> float:
    try:
        return float(line)
    except ValueError:  # written by the answer
        return 0.0


@cache
def runs_answers(name: str) -> bool:
    """Whether the verifier of a generator may run answers as Python: whether its module calls what runs texts."""
    kind, _ = generators()[name]
    source = inspect.getsource(sys.modules[kind.__module__])
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = {one.id if isinstance(one, ast.Name) else getattr(one, "attr", "") for one in calls}
    return bool(names & _RUNNING)


def generators() -> dict[str, tuple[type, type]]:
    """
    The generators of reasoning-gym by their names: the class, and that of its options.

    Raises:
        ImportError: if reasoning-gym is not installed.
    """
    if find_spec("reasoning_gym") is None:
        raise ImportError(MISSING)
    import_module("reasoning_gym")
    return {
        name: both for name, both in import_module("reasoning_gym.factory").DATASETS.items() if name != "composite"
    }


def _folders() -> list[str]:
    """Where reasoning-gym and what it needs are, if not in the environment."""
    names = ("reasoning_gym", "sympy", "numpy", "mpmath", "magiccube", "pytz")
    found = (find_spec(name) for name in names)
    return sorted({str(Path(one.origin).parents[1]) for one in found if one is not None and one.origin})


@dataclass
class GymReward:
    """
    Reward function: what the verifier of reasoning-gym gives for a completion as a whole; `None` for a row of another task. A class and
    not a closure, so that it can be pickled.

    Args:
        scorer ([`GymScorer`]): the verifier.
        entries (`dict[str, dict]`): by the question, what the generator has made.
        whole (`bool`, *optional*, defaults to `False`): whether to give 1 for a right answer and 0 for any other.
    """

    scorer: GymScorer
    entries: dict[str, dict[str, Any]]
    whole: bool = False

    @property
    def __name__(self) -> str:  # TRL names metrics after it
        return f"{self.scorer.name}_{'solved' if self.whole else 'score'}"

    def __call__(self, completions, question, **kwargs) -> list[float | None]:
        known = [number for number, one in enumerate(question) if one is not None and one in self.entries]
        answers = texts(completions)
        entries = [self.entries[question[number]] for number in known]
        rewards: list[float | None] = [None] * len(answers)
        scores = self.scorer.scores([answers[number] for number in known], entries)
        for number, score in zip(known, scores, strict=True):
            rewards[number] = float(score >= 1.0) if self.whole else score
        return rewards
