"""Programs checked by their tests, as in HumanEval and MBPP, in the sandbox of `rewards/sandbox.py`."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

from .blocks import blocks_of, defines
from .code_tests import names_called, problem_of
from .completions import texts
from .sandbox import SandboxLimits, Verdict, require_sandbox, run_tests


def _is_valid(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def code_of_prompt(prompt: str, entry_point: str) -> str:
    """The start of a program that a prompt gives: its last block, or all of it, that has the head of `entry_point`."""
    blocks = blocks_of(prompt)
    for source in (blocks.last_defining([entry_point]), blocks.text):
        if source is not None and defines(source, [entry_point]) and _is_valid(_closed(source)):
            return source
    return ""


def _closed(start: str) -> str:
    """`start` as a source that is valid by itself: a head without even a docstring gets a body."""
    return start if _is_valid(start) else f"{start.rstrip()}\n    pass\n"


def program_of(
    completion: str,
    start: str = "",
    entry_point: str | None = None,
    names: Collection[str] = (),
    inside: bool = False,
) -> str:
    """
    The program that a completion stands for.

    It is the last of its fenced blocks that defines what is asked for, whatever comes after it; if none does, the text
    before the first fence, where that does or goes on from `start`; then the last block that is marked as Python or not
    marked; then all of the completion.

    Args:
        completion (`str`): what the policy wrote.
        start (`str`, *optional*): source that the completion may go on from, as in HumanEval.
        entry_point (`str`, *optional*): name of the function asked for. A completion that defines it comes after
            `start`, whose imports and helpers it may use; any other continues `start` where it breaks off.
        names (`Collection[str]`, *optional*): names of which the program defines some, where there is no `entry_point`.
        inside (`bool`, *optional*, defaults to `False`): whether the prompt ends within a block.
    """
    wanted = [entry_point] if entry_point else list(names)
    blocks = blocks_of(completion, inside)
    source = blocks.last_defining(wanted)
    if source is None and (defines(blocks.lead, wanted) or start and _goes_on(blocks.lead)):
        source = blocks.lead
    if source is None:
        source = blocks.last_of_python()
    if source is None:
        source = blocks.text
    if not start or entry_point is None:
        return source
    return f"{_closed(start)}\n\n{source}" if defines(source, [entry_point]) else start + source


def _goes_on(lead: str) -> bool:
    """Whether a text is the body of a function: its first line is indented."""
    return bool(lead.strip()) and lead.lstrip("\n")[:1] in (" ", "\t")


def check_code(
    completion: str,
    tests: str,
    prompt: str = "",
    entry_point: str | None = None,
    limits: SandboxLimits | None = None,
    conversation: bool = False,
) -> Verdict:
    """
    Runs a completion's program against its tests. See `run_tests` for what is returned and raised.

    Args:
        completion (`str`): what the policy wrote.
        tests (`str`): source that asserts, or, with an `entry_point`, that defines `check(candidate)`.
        prompt (`str`, *optional*): what the policy was asked. A completion goes on from it where it ends within a block, or
            has the head of the `entry_point`.
        entry_point (`str`, *optional*): name of the function asked for.
        limits (`SandboxLimits`, *optional*): what the program may use.
        conversation (`bool`, *optional*, defaults to `False`): whether the prompt is a message, which a completion answers and
            does not go on from in the middle of a block.
    """
    start = code_of_prompt(prompt, entry_point) if entry_point else ""
    program = program_of(
        completion, start, entry_point, names_called(tests), inside=not conversation and blocks_of(prompt).is_open
    )
    return run_tests(program, tests, entry_point, _closed(start), limits)


def code_reward(
    allow_execution: bool = False, limits: SandboxLimits | None = None, workers: int | None = None
) -> Callable[..., list[float | None]]:
    """
    Makes a reward function: 1 if a completion's program passes its tests, 0 if not, `None` for a row without tests.

    It needs columns in the manner of HumanEval (`test`, which defines `check(candidate)`, and `entry_point`) or of MBPP
    (`test_list`, a list of asserts or one string, and, if there, `test_setup_code` and `test_imports`). A `test` may also
    assert by itself, or define functions `test...()` or classes of `unittest.TestCase`, which are called.

    A program takes at most `limits.wall_time` once its two interpreters have started, and a call at most that for every
    `workers` programs.

    Args:
        allow_execution (`bool`, *optional*, defaults to `False`): must be `True`. Programs that a model wrote will be
            run on this machine, in a sandbox; read `trl_diffusion.rewards.sandbox` on what it leaves open.
        limits (`SandboxLimits`, *optional*): what a program may use.
        workers (`int`, *optional*): programs that run at the same time; by default one for every two cores that this
            process may use, since each has a second process for its tests.

    Raises:
        ValueError: if `allow_execution` is not `True`, or `workers` is not positive. When it is called: if the tests of a row
            are not valid, assert nothing, or need what the sandbox does not have; the row is named by its number.
        SandboxError: if there can be no sandbox on this machine.
    """
    if allow_execution is not True:
        raise ValueError(
            "code_reward runs programs that a model wrote on this machine, in a sandbox. If that is what you want, pass "
            "`allow_execution=True`."
        )
    if workers is None:
        workers = max(1, len(os.sched_getaffinity(0)) // 2)
    if workers < 1:
        raise ValueError(f"`workers` must be positive, got {workers}.")
    require_sandbox()
    return _CodeReward(limits or SandboxLimits(), workers)


class _CodeReward:
    """A class and not a closure, so that it can be pickled."""

    __name__ = "code_reward"  # TRL names metrics after it

    def __init__(self, limits: SandboxLimits, workers: int):
        self.limits = limits
        self.workers = workers

    def __call__(
        self,
        prompts,
        completions,
        test=None,
        entry_point=None,
        test_list=None,
        test_setup_code=None,
        test_imports=None,
        **kwargs,
    ) -> list[float | None]:
        nothing = [None] * len(completions)
        columns = [test, entry_point, test_list, test_setup_code, test_imports]
        rows = [_Row(*row) for row in zip(*(column or nothing for column in columns), strict=True)]
        for number, row in enumerate(rows):
            problem = row.tests.strip() and problem_of(row.setup, row.tests, row.entry_point)
            if problem:
                raise ValueError(f"code_reward, row {number} of {len(rows)}: {problem}.")
        jobs = zip(range(len(rows)), rows, prompts, texts(prompts), texts(completions), strict=True)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda job: self._reward(*job), jobs))

    def _reward(self, number: int, row: _Row, asked, prompt: str, completion: str) -> float | None:
        if not row.tests.strip():
            return None
        conversation = not isinstance(asked, str)
        verdict = check_code(
            completion, f"{row.setup}\n{row.tests}", prompt, row.entry_point, self.limits, conversation
        )
        if verdict.is_unsupported:
            raise ValueError(f"code_reward, row {number}: {verdict.reason}")
        return float(verdict.passed)


class _Row:
    """The tests of a row."""

    def __init__(self, test, entry_point, test_list, test_setup_code, test_imports):
        self.setup = "\n".join([*_lines(test_imports), *_lines(test_setup_code)])
        self.tests = "\n".join([*_lines(test_list), *_lines(test)])
        self.entry_point = entry_point or None if test else None


def _lines(value: str | Collection[str] | None) -> list[str]:
    """A column that holds a string, strings or nothing."""
    return [value] if isinstance(value, str) else [*(value or [])]
