"""
Functions of the tasks in `tasks/`: rows from local files (`--metadata data_dir=DIRECTORY`) or from the hub, and the
checkers of `trl_diffusion.rewards`. Code runs in the sandbox, and only with the harness's `--confirm_run_unsafe_code`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from datasets import Dataset, get_dataset_config_names, load_dataset

from ..tasks.gsm8k import gsm8k_row
from . import harness  # noqa: F401  (a task file of ours is what makes a plain `lm_eval` know the model)
from .benchmarks import BENCHMARKS, code_checker, human_eval_row, math_row, mbpp_row


def _local(name: str, data_dir: str | None = None, **unused: Any) -> dict[str, Dataset]:
    if data_dir is None and BENCHMARKS[name].packaged is None:
        raise ValueError(
            f"The task {name}_local reads {BENCHMARKS[name].file} from a directory of yours: add "
            "--metadata data_dir=DIRECTORY"
        )
    return {"test": Dataset.from_list(BENCHMARKS[name].read(data_dir))}


def gsm8k(**metadata: Any) -> dict[str, Dataset]:
    """Rows of GSM8K, from a local file."""
    return _local("gsm8k", **metadata)


def humaneval(**metadata: Any) -> dict[str, Dataset]:
    """Problems of HumanEval, from a local file."""
    return _local("humaneval", **metadata)


def countdown(**metadata: Any) -> dict[str, Dataset]:
    """Games of countdown, from a local file."""
    return _local("countdown", **metadata)


def sudoku(**metadata: Any) -> dict[str, Dataset]:
    """Puzzles of 4x4 sudoku, from a local file."""
    return _local("sudoku", **metadata)


def _hub(path: str, convert: Callable[[dict], dict], configs: list[str | None] | None = None) -> dict[str, Dataset]:
    rows = [row for config in configs or [None] for row in load_dataset(path, config, split="test")]
    return {"test": Dataset.from_list([convert(row) for row in rows])}


def math500_hub(**metadata: Any) -> dict[str, Dataset]:
    """Problems of MATH-500, from the hub."""
    return _hub("HuggingFaceH4/MATH-500", math_row)


def math_hub(**metadata: Any) -> dict[str, Dataset]:
    """The 5000 test problems of MATH, from the hub."""
    path = "EleutherAI/hendrycks_math"
    return _hub(path, math_row, sorted(get_dataset_config_names(path)))


def gsm8k_hub(**metadata: Any) -> dict[str, Dataset]:
    """Questions of GSM8K, from the hub."""
    return _hub("openai/gsm8k", gsm8k_row, ["main"])


def humaneval_hub(**metadata: Any) -> dict[str, Dataset]:
    """Problems of HumanEval, from the hub."""
    return _hub("openai/openai_humaneval", human_eval_row)


def humaneval_plus_hub(**metadata: Any) -> dict[str, Dataset]:
    """Problems of HumanEval+, from the hub."""
    return _hub("evalplus/humanevalplus", human_eval_row)


def mbpp_plus_hub(**metadata: Any) -> dict[str, Dataset]:
    """Problems of MBPP+, from the hub."""
    return _hub("evalplus/mbppplus", mbpp_row)


@cache
def _checker(name: str) -> Callable:
    return BENCHMARKS[name].check()


def _score(name: str, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The score of an answer. A row whose gold answer cannot be read counts as wrong: the harness knows no other."""
    (solved,) = BENCHMARKS[name].score([doc], results[:1], _checker(name))
    return {"solved": solved or 0.0}


def score_gsm8k(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the final answer is right."""
    return _score("gsm8k", doc, results)


def score_countdown(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the game is solved."""
    return _score("countdown", doc, results)


def score_sudoku(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the puzzle is solved."""
    return _score("sudoku", doc, results)


@cache
def _code_checker() -> Callable:
    return code_checker()


def score_code(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the program passes its tests."""
    columns = {name: [value] for name, value in doc.items() if name not in ("prompt", "chat_prompt")}
    (solved,) = _code_checker()(prompts=[doc["prompt"]], completions=results[:1], **columns)
    return {"solved": solved or 0.0}
