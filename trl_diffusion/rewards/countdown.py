"""Countdown: reach a target with the given numbers. A generator, a checker, and reward functions."""

from __future__ import annotations

import ast
import random
from collections import Counter
from collections.abc import Collection
from fractions import Fraction
from functools import cache
from itertools import permutations
from typing import Any

from .completions import texts


_MAX_LENGTH = 200  # characters of an answer that are looked at
_OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    """
    Value of an arithmetic expression and the numbers it uses.

    Args:
        text (`str`): whole numbers joined by `+ - * /` and parentheses.

    Returns:
        `tuple[Fraction, list[int]]`: the exact value, and the numbers from left to right.

    Raises:
        ValueError: if the text is anything else, is too long, or divides by zero.
    """
    text = text.strip()
    if not text or len(text) > _MAX_LENGTH or set(text) - set("0123456789+-*/() "):
        raise ValueError(f"Not an arithmetic expression: {text[:_MAX_LENGTH]!r}.")
    numbers: list[int] = []

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"Not an arithmetic expression: {text!r}.")

    try:
        return value(ast.parse(text, mode="eval").body), numbers
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"Not an arithmetic expression: {text!r}.") from error


def numbers_used(answer: str, numbers: list[int]) -> bool:
    """Whether `answer` is an expression that uses each of `numbers` exactly once, and no other number."""
    try:
        return Counter(evaluate_expression(answer)[1]) == Counter(numbers)
    except ValueError:
        return False


def is_solved(answer: str, numbers: list[int], target: int) -> bool:
    """Whether `answer` uses each of `numbers` exactly once and equals `target`."""
    return numbers_used(answer, numbers) and evaluate_expression(answer)[0] == target


def solve(numbers: list[int], target: int) -> str | None:
    """A solution found by trying everything, or `None` if there is none. Meant for up to four numbers."""

    def search(items: list[tuple[Fraction, str]]) -> str | None:
        if len(items) == 1:
            return items[0][1] if items[0][0] == target else None
        for (i, (a, left)), (j, (b, right)) in permutations(enumerate(items), 2):
            rest = [item for k, item in enumerate(items) if k not in (i, j)]
            for symbol, operator in zip("+-*/", _OPERATORS.values(), strict=True):
                if symbol == "/" and b == 0 or symbol in "+*" and i > j:
                    continue
                found = search([*rest, (operator(a, b), f"({left}{symbol}{right})")])
                if found is not None:
                    return found
        return None

    found = search([(Fraction(number), str(number)) for number in numbers])
    return found[1:-1] if found is not None and found.startswith("(") else found


def generate(num_puzzles: int, seed: int, limit: int = 99, exclude: Collection[tuple] = ()) -> list[dict[str, Any]]:
    """
    Makes different puzzles of three numbers joined by `+` and `-`.

    Args:
        num_puzzles (`int`): how many.
        seed (`int`): seed of a random state of its own.
        limit (`int`, *optional*, defaults to `99`): largest number and largest target.
        exclude (`Collection[tuple]`, *optional*): `(sorted numbers, target)` pairs that must not come up.

    Returns:
        `list[dict]` with `numbers`, `target` and a `solution`.
    """
    rng = random.Random(seed)
    seen = set(exclude)
    rows: list[dict] = []
    while len(rows) < num_puzzles:
        a, b, c = (rng.randint(1, limit) for _ in range(3))
        first, second = rng.choice("+-"), rng.choice("+-")
        solution = f"{a}{first}{b}{second}{c}"
        target = evaluate_expression(solution)[0]
        numbers = rng.sample([a, b, c], 3)
        key = key_of(numbers, int(target))
        if not 1 <= target <= limit or key in seen:
            continue
        seen.add(key)
        rows.append({"numbers": numbers, "target": int(target), "solution": solution})
    return rows


def key_of(numbers: list[int], target: int) -> tuple:
    """What makes two puzzles the same: the numbers, in whatever order, and the target."""
    return (*sorted(numbers), target)


def prompt(numbers: list[int], target: int) -> str:
    """The text that asks the embedded policy for a solution."""
    return f"countdown {','.join(map(str, numbers))}={target}"


def countdown_solved(completions, numbers, target, **kwargs) -> list[float | None]:
    """Reward function: 1 for a solved puzzle, 0 otherwise, `None` for a row whose `numbers` is `None`."""
    rows = zip(texts(completions), numbers, target, strict=True)
    return [None if ns is None else float(is_solved(answer, ns, t)) for answer, ns, t in rows]


def countdown_numbers(completions, numbers, **kwargs) -> list[float | None]:
    """
    Reward function: 1 for an expression that uses each number exactly once, whatever its value, 0 for any other, `None`
    for a row whose `numbers` is `None`.
    """
    rows = zip(texts(completions), numbers, strict=True)
    return [None if ns is None else float(numbers_used(answer, ns)) for answer, ns in rows]


def countdown_near(completions, numbers, target, **kwargs) -> list[float | None]:
    """
    Reward function: how near the value of an answer is to the target, if the answer uses each number exactly once:
    `1 / (1 + distance / max(1, abs(target)))`, which is 1 for the target itself and 0.5 for twice the target. Any other answer
    gets 0, and a row whose `numbers` is `None` gets `None`. Unlike `countdown_solved`, it tells two wrong answers apart.
    """
    rows = zip(texts(completions), numbers, target, strict=True)
    return [None if ns is None else _nearness(answer, ns, t) for answer, ns, t in rows]


def _nearness(answer: str, numbers: list[int], target: int) -> float:
    if not numbers_used(answer, numbers):
        return 0.0
    return float(1 / (1 + abs(evaluate_expression(answer)[0] - target) / max(1, abs(target))))


@cache
def evaluation_games() -> tuple[dict, ...]:
    """The 500 games kept for evaluation: no generator of training data in this project ever yields one of them."""
    return tuple(generate(500, seed=20260319))


def evaluation_keys() -> frozenset[tuple]:
    """What identifies the games kept for evaluation."""
    return frozenset(key_of(game["numbers"], game["target"]) for game in evaluation_games())
