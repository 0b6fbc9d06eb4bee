"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..fields import check_at_least, nearest
from .cells import CELL_TASKS
from .code import is_named_object, named_object, object_file
from .countdown import make_countdown
from .gsm8k import make_gsm8k
from .gym import PREFIX, make_gym_task
from .sudoku import make_sparse_sudoku, make_sudoku, make_sudoku_12
from .task import Task, check_task, parameters
from .word_sums import make_word_sums


TASKS: dict[str, Callable[..., Task]] = {
    "sudoku": make_sudoku,
    "sparse_sudoku": make_sparse_sudoku,
    "countdown": make_countdown,
    "gsm8k": make_gsm8k,
    "word_sums": make_word_sums,
    "sudoku_12": make_sudoku_12,
    **CELL_TASKS,
}
OTHERS = f"{PREFIX}NAME, and FILE.py:FUNCTION"  # what else there is


def check_task_name(name: str, further: Iterable[str] = ()) -> None:
    """
    Checks the name of a task, without loading it.

    Args:
        name (`str`): a name that [`load_task`] takes.
        further (`Iterable[str]`, *optional*): other names that are allowed.

    Raises:
        ValueError: if there can be no such task.
    """
    known = sorted({*TASKS, *further})
    if isinstance(name, str) and (name in known or name.startswith(PREFIX) or is_named_object(name)):
        return
    near = nearest(str(name), known)
    hint = f" Is it meant to be {' or '.join(near)}?" if near else ""
    raise ValueError(f"Unknown task {name!r}; there are {known}, {OTHERS}.{hint}")


def load_task(
    name: str,
    train_file: str | None = None,
    eval_file: str | None = None,
    train_size: int = 10_000,
    eval_size: int = 500,
    seed: int = 0,
) -> Task:
    """
    Makes or reads a task.

    Args:
        name (`str`): `"sudoku"` (4x4), `"sparse_sudoku"` (4x4, two clues), `"countdown"` (three numbers), `"gsm8k"`,
            `"word_sums"` (sums in words, for small language models), `"sudoku_12"` (4x4, four clues), `"chain"`, `"backward_chain"`,
            `"game_tree"` (rows of cells that follow from each other, [`rewards.cells`]), `"reasoning_gym:NAME"` (a generator of reasoning-gym, with
            options as in `"reasoning_gym:mini_sudoku+min_empty:8+max_empty:10"`), or `"FILE.py:FUNCTION"`, a function that
            returns a [`Task`]. It is called with those of the arguments below that it names.
        train_file (`str`, *optional*): rows to train on. The puzzles are generated without it; GSM8K needs it.
        eval_file (`str`, *optional*): rows to measure on. Training rows that are among them are dropped.
        train_size (`int`, *optional*, defaults to `10_000`): most training rows.
        eval_size (`int`, *optional*, defaults to `500`): most evaluation rows.
        seed (`int`, *optional*, defaults to `0`): seed of the generator of training rows.

    Raises:
        ValueError: for an unknown name, a size below 1, or a file with a missing column or an unreadable row, which it names.
        FileNotFoundError: for a file that is not there.
        ImportError: if a package is missing.
    """
    check_task_name(name)
    for option, size in (("train_size", train_size), ("eval_size", eval_size)):
        check_at_least(option, size)
    given: dict[str, Any] = {
        "train_file": train_file,
        "eval_file": eval_file,
        "train_size": train_size,
        "eval_size": eval_size,
        "seed": seed,
    }
    if name.startswith(PREFIX):
        return make_gym_task(name, **given)
    if name in TASKS:
        return TASKS[name](**given)
    return _own_task(name, given)


def _own_task(name: str, given: dict[str, Any]) -> Task:
    """The task that a function of a file makes."""
    function, where = named_object(name, "task"), object_file(name)
    if not callable(function):
        raise ValueError(f"{where} must be a function that returns a `Task`, got {function!r:.80}.")
    found = parameters(function)
    takes_all = any(one.kind is one.VAR_KEYWORD for one in found.values())
    needed = [one.name for one in found.values() if one.default is one.empty and one.kind < one.VAR_POSITIONAL]
    needed += [one.name for one in found.values() if one.default is one.empty and one.kind is one.KEYWORD_ONLY]
    if unknown := sorted(set(needed) - set(given)):
        raise ValueError(f"{where} needs {unknown}, but gets only those of {list(given)} that it names.")
    taken = {one: value for one, value in given.items() if takes_all or one in found}
    for option in ("train_file", "eval_file"):
        if given[option] is not None and option not in taken:
            raise ValueError(f"{where} does not take `{option}`. Give it this parameter, or leave `--{option}` out.")
    try:
        task = function(**taken)
    except Exception as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    check_task(task, where)
    for rows, size in (("train", "train_size"), ("evaluation", "eval_size")):
        if len(getattr(task, rows)) > given[size]:
            setattr(task, rows, getattr(task, rows).select(range(given[size])))
    return task
