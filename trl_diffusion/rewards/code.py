"""Programs checked by their tests, as in HumanEval and MBPP, in the sandbox of `rewards/sandbox.py`."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .completions import texts
from .sandbox import SandboxLimits, Verdict, require_sandbox, run_tests


_BLOCK = re.compile(r"```(?:python3?|py)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def last_block(text: str) -> str | None:
    """The last block of `text` fenced by three backticks and marked as Python, or `None`."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


def _defines(source: str, name: str) -> bool:
    """Whether `source` has a function or class `name`. By its look: what a model wrote is not parsed out here."""
    return re.search(rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b", source, re.MULTILINE) is not None


def _is_valid(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def code_of_prompt(prompt: str, entry_point: str) -> str:
    """The start of a program that a prompt gives: its last block, or all of it, if that has the head of `entry_point`."""
    for source in (last_block(prompt), prompt):
        if source is not None and _defines(source, entry_point) and _is_valid(_closed(source)):
            return source
    return ""


def _closed(start: str) -> str:
    """`start` as a source that is valid by itself: a head without even a docstring gets a body."""
    return start if _is_valid(start) else f"{start.rstrip()}\n    pass\n"


def program_of(completion: str, start: str = "", entry_point: str | None = None) -> str:
    """
    The program that a completion stands for.

    Args:
        completion (`str`): its last Python block is taken, or all of it if there is none.
        start (`str`, *optional*): source that the completion may go on from, as in HumanEval.
        entry_point (`str`, *optional*): name of the function asked for. A completion that defines it comes after
            `start`, whose imports and helpers it may use; any other continues `start` where it breaks off.
    """
    block = last_block(completion)
    source = completion if block is None else block
    if not start or entry_point is None:
        return source
    return f"{_closed(start)}\n\n{source}" if _defines(source, entry_point) else start + source


def check_code(
    completion: str,
    tests: str,
    prompt: str = "",
    entry_point: str | None = None,
    limits: SandboxLimits | None = None,
) -> Verdict:
    """
    Runs a completion's program against its tests. See `run_tests` for what is returned and raised.

    Args:
        completion (`str`): what the policy wrote.
        tests (`str`): source that asserts, or, with an `entry_point`, that defines `check(candidate)`.
        prompt (`str`, *optional*): what the policy was asked; used with an `entry_point` only.
        entry_point (`str`, *optional*): name of the function asked for.
        limits (`SandboxLimits`, *optional*): what the program may use.
    """
    start = code_of_prompt(prompt, entry_point) if entry_point else ""
    helpers = _closed(start)
    return run_tests(program_of(completion, start, entry_point), tests, entry_point, helpers, limits)


def code_reward(
    allow_execution: bool = False, limits: SandboxLimits | None = None, workers: int | None = None
) -> Callable[..., list[float | None]]:
    """
    Makes a reward function: 1 if a completion's program passes its tests, 0 if not, `None` for a row without tests.

    It needs columns in the manner of HumanEval (`test`, which defines `check(candidate)`, and `entry_point`) or of MBPP
    (`test_list`, a list of asserts, and, if there, `test_setup_code` and `test_imports`).

    Args:
        allow_execution (`bool`, *optional*, defaults to `False`): must be `True`. Programs that a model wrote will be
            run on this machine, in a sandbox; read `trl_diffusion.rewards.sandbox` on what it leaves open.
        limits (`SandboxLimits`, *optional*): what a program may use.
        workers (`int`, *optional*): programs that run at the same time; by default one for every two cores that this
            process may use, since each has a second process for its tests.

    Raises:
        ValueError: if `allow_execution` is not `True`, or `workers` is not positive.
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
        rows = zip(texts(prompts), texts(completions), *(column or nothing for column in columns), strict=True)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda row: self._reward(*row), rows))

    def _reward(self, prompt, completion, test, entry_point, test_list, setup, imports) -> float | None:
        if not test and not test_list:
            return None
        tests = "\n".join([*(imports or []), setup or "", *(test_list or []), test or ""])
        entry_point = entry_point or None if test else None
        return float(check_code(completion, tests, prompt, entry_point, self.limits).passed)
