"""Benchmarks whose questions are in local files or in the package: what is asked, and how answers are checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rewards import countdown, math, sudoku
from ..rewards.code import code_reward
from ..rewards.code_tests import problem_of
from ..tasks.countdown import countdown_rows
from ..tasks.gsm8k import gsm8k_rows
from ..tasks.rows import read_rows
from ..tasks.sudoku import sudoku_rows
from ..tasks.task import Task


# Where a function that a model goes on writing has come to its end.
CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")

_CODE_QUESTION = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```\n"
)

# What the tests of EvalPlus use of numpy, which the sandbox does not have.
_NUMPY = """
class np:
    class ndarray: pass
    float32 = float64 = float
    def allclose(a, b, rtol=1e-05, atol=1e-08):
        if isinstance(a, (list, tuple)) or isinstance(b, (list, tuple)):
            a = a if isinstance(a, (list, tuple)) else [a] * len(b)
            b = b if isinstance(b, (list, tuple)) else [b] * len(a)
            return len(a) == len(b) and all(np.allclose(x, y, rtol, atol) for x, y in zip(a, b))
        return a == b or abs(a - b) <= atol + rtol * abs(b) < float("inf")
"""


@dataclass(frozen=True)
class Benchmark:
    """
    Attributes:
        name (`str`): what it is called.
        file (`str`): where its rows are, under the directory of the data.
        rows (`Callable`): reads the rows of a file. Each has a `prompt`, the text of the question (`chat_prompt`, if
            that should be another one in a conversation), and what the checker needs.
        check (`Callable`): makes the checker, a reward function whose 0 or 1 says whether an answer is right and whose
            `None` says that there is no telling.
        max_new_tokens (`int`): most tokens of an answer, unless the caller says.
        conversational (`bool`): whether a policy with a chat template is asked in a conversation.
        stops (`tuple[str, ...]`): strings that end an answer outside of a conversation.
        runs_code (`bool`): whether checking runs what the policy wrote.
        packaged (`Callable`, *optional*): gives the rows that come with the package, which are asked without a file.
    """

    name: str
    file: str
    rows: Callable[[str], list[dict[str, Any]]]
    check: Callable[[], Callable]
    max_new_tokens: int
    conversational: bool = False
    stops: tuple[str, ...] = ()
    runs_code: bool = False
    packaged: Callable[[], list[dict[str, Any]]] | None = None

    def read(self, data_dir: str | Path | None = None) -> list[dict[str, Any]]:
        """The rows of the file under `data_dir`, or else those of the package."""
        if self.packaged is not None and not self.is_in(data_dir):
            return self.packaged()
        return self.rows(str(Path(data_dir or ".") / self.file))

    def is_here(self, data_dir: str | Path | None) -> bool:
        """Whether its rows are under `data_dir` or in the package."""
        return self.packaged is not None or self.is_in(data_dir)

    def is_in(self, data_dir: str | Path | None) -> bool:
        """Whether its file is under `data_dir`."""
        return data_dir is not None and (Path(data_dir) / self.file).is_file()

    def question(self, row: dict[str, Any], chat: bool) -> str | list[dict[str, str]]:
        """What to ask: text, or, with `chat`, a conversation."""
        if chat and self.conversational:
            return [{"role": "user", "content": row.get("chat_prompt", row["prompt"])}]
        return row["prompt"]

    def score(self, rows: list[dict[str, Any]], answers: list[str], checker: Callable) -> list[float | None]:
        """1 for a right answer, 0 for a wrong one, `None` for a row whose gold answer cannot be read."""
        names = sorted({name for row in rows for name in row} - {"prompt", "chat_prompt"})
        columns = {name: [row.get(name) for row in rows] for name in names}
        # A completion that goes on from source code is told from one that quotes it by what was asked.
        return checker(prompts=[row["prompt"] for row in rows], completions=answers, **columns)


@dataclass(frozen=True)
class TaskBenchmark(Benchmark):
    """
    The evaluation rows of a task, as a benchmark.

    Attributes:
        task ([`Task`], *optional*): the task.
    """

    task: Task | None = None

    def question(self, row: dict[str, Any], chat: bool) -> str | list[dict[str, str]]:
        prompt = row["prompt"]
        if not isinstance(prompt, str) and not chat:
            raise ValueError(
                f"The prompts of {self.name} are messages, and the policy's tokenizer has no chat template. Take a policy that has one, "
                "or prompts that are text."
            )
        return prompt

    def score(self, rows: list[dict[str, Any]], answers: list[str], checker: Callable) -> list[float | None]:
        assert self.task is not None  # as `benchmark_of` makes it
        prompts = [row["prompt"] for row in rows]
        columns = {
            name: [row.get(name) for row in rows] for name in self.task.evaluation.column_names if name != "prompt"
        }
        return [*self.task.rate(prompts, answers, columns)]


def benchmark_of(task: Task, name: str | None = None) -> TaskBenchmark:
    """
    The evaluation rows of a task, as a benchmark.

    Args:
        task ([`Task`]): the task.
        name (`str`, *optional*): what the benchmark is called. Defaults to the name of the task.
    """
    return TaskBenchmark(
        name or task.name,
        "",
        lambda path: task.evaluation.to_list(),
        lambda: task.solved,
        256,
        conversational=True,
        packaged=task.evaluation.to_list,
        task=task,
    )


def code_rows(path: str) -> list[dict[str, Any]]:
    """
    The problems of a file in the manner of HumanEval: `prompt`, `test` and `entry_point`.

    Raises:
        ValueError: if a row lacks one of them, or its tests can say nothing about a program.
    """
    rows = []
    for number, row in enumerate(read_rows(path)):
        missing = [name for name in ("prompt", "test", "entry_point") if not row.get(name)]
        if missing:
            raise ValueError(f"{path}, row {number}: {missing} is missing; it has {sorted(row)}.")
        rows.append(human_eval_row(row))
        problem = problem_of("", rows[-1]["test"], row["entry_point"])
        if problem:
            raise ValueError(f"{path}, row {number}: {problem}.")
    return rows


def human_eval_row(row: dict[str, Any]) -> dict[str, Any]:
    """A problem of HumanEval or HumanEval+ as the checker takes it."""
    return {
        "prompt": row["prompt"],
        "chat_prompt": _CODE_QUESTION.format(row["prompt"]),
        "test": without_numpy(row["test"]),
        "entry_point": row["entry_point"],
    }


def mbpp_row(row: dict[str, Any]) -> dict[str, Any]:
    """A problem of MBPP or MBPP+ as the checker takes it."""
    question = f"{row.get('prompt') or row.get('text')} Your code should satisfy the following assertion:\n"
    plus = row.get("test")
    return {
        "prompt": f"{question}{row['test_list'][0]}\n```python\n",
        "chat_prompt": f"{question}{row['test_list'][0]}",
        "test_list": [without_numpy(plus)] if plus else row["test_list"],
        "test_imports": row.get("test_imports") or [],
    }


def math_row(row: dict[str, Any]) -> dict[str, Any]:
    """A problem of MATH or MATH-500 as the checker takes it; the gold answer is in a column or boxed in the solution."""
    return {
        "prompt": f"{row['problem']}\nThink step by step and put the final answer within \\boxed{{}}.",
        "answer": f"${row['answer']}$" if row.get("answer") else row["solution"],
    }


def without_numpy(tests: str) -> str:
    """Tests of EvalPlus that run without numpy."""
    return tests.replace("import numpy as np", _NUMPY, 1)


def packaged_puzzles() -> list[dict[str, Any]]:
    """The 500 puzzles of 4x4 sudoku on which `train` measures as well."""
    return [{"puzzle": puzzle, "prompt": sudoku.prompt(puzzle)} for puzzle in sudoku.evaluation_puzzles()]


def packaged_games() -> list[dict[str, Any]]:
    """The 500 games of countdown on which `train` measures as well."""
    games = [(game["numbers"], game["target"]) for game in countdown.evaluation_games()]
    return [
        {"numbers": numbers, "target": target, "prompt": countdown.prompt(numbers, target)}
        for numbers, target in games
    ]


def code_checker() -> Callable:
    """The checker of programs; whoever calls this has been told that they will be run."""
    return code_reward(allow_execution=True)


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("gsm8k", "gsm8k/test.jsonl", gsm8k_rows, lambda: math.math_accuracy, 256, conversational=True),
        Benchmark(
            "humaneval",
            "humaneval/HumanEval.jsonl",
            code_rows,
            code_checker,
            512,
            conversational=True,
            stops=CODE_STOPS,
            runs_code=True,
        ),
        Benchmark(
            "countdown",
            "countdown/cd3_test.jsonl",
            countdown_rows,
            lambda: countdown.countdown_solved,
            16,
            packaged=packaged_games,
        ),
        Benchmark(
            "sudoku", "sudoku/4x4_test.csv", sudoku_rows, lambda: sudoku.sudoku_solved, 17, packaged=packaged_puzzles
        ),
    )
}
