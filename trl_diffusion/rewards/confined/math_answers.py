"""
The process that compares mathematical answers, started by `rewards/math_checker.py`: a program, not a module to import.

It imports math-verify once and then forks: each answer is read and compared in a process of its own, which the kernel ends
at its limits. So an answer that takes too long, takes too much memory or brings the interpreter down costs nobody else.
The process has the trainer's search path, unlike its neighbours in this folder.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any


# No pattern here backtracks.
BASE = re.compile(r"\d++_\{?+(\d++)\}?+", re.ASCII)
ORDER = re.compile(r"\\(?:geqslant|geq|ge|gt|leqslant|leq|le|lt|neq|ne)(?![A-Za-z])|[<>\u2264\u2265\u2260]")
READY, STARTED, GOLD_READ, RIGHT = b"ready", b"s", b"g", b"1"


def items_of(text: str) -> tuple[str, list[str]] | None:
    """
    The items of a list, `(1, [2, 3])`, `\\{1, 2\\}` or `1, 2`, or `None` if `text` is none.

    Returns:
        The brackets, which are empty for a set and for a list without them, and at least two items.
    """
    for command in ("\\left", "\\right"):
        text = text.replace(command, "")
    if text.startswith("\\boxed{"):
        text = text.removeprefix("\\boxed{").removesuffix("}")
    text = text.strip().removeprefix("$").removesuffix("$").strip()
    brackets = ""
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        brackets, text = text[0] + text[-1], text[1:-1]
    items, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None  # (1, 2) + (3, 4)
        if character == "," and depth == 0:
            items.append(text[begin:place])
            begin = place + 1
    return (brackets, [*items, text[begin:]]) if items and depth == 0 else None


def digits_after_point(found: list[Any]) -> int:
    """The number of digits after its point of a decimal number that was read; 0 of anything else."""
    written = found[-1] if found and isinstance(found[-1], str) else ""
    whole, _, part = written.strip().lstrip("+-").partition(".")
    return len(part) if (whole + part).isdecimal() else 0


def read(text: str) -> list[Any]:
    """What math-verify reads in `text`: an expression of sympy, a string, both or neither."""
    from math_verify import parse

    found = parse(text, parsing_timeout=None)
    # (3, 3) is an empty interval to math-verify, equal to any other: it is not what was written.
    return [] if found and getattr(found[0], "is_empty", None) and "emptyset" not in text else found


def value(expression: Any) -> Any:
    """The number that an expression stands for, with every symbol replaced by a fixed number; `None` if it is none."""
    from sympy import Expr, Rational

    if not isinstance(expression, Expr):
        return None
    symbols = sorted(expression.free_symbols, key=str)
    numbers = {symbol: Rational(37 + 10 * i, 101) for i, symbol in enumerate(symbols)}
    try:
        number = expression.subs(numbers).doit().evalf(40)
        return number if number.is_number and number.is_finite else None
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def differ(gold: Any, answer: Any, digits: int) -> bool:
    """
    Whether two expressions that math-verify takes for equal are not: it rounds to six digits after the point, drops what is
    below 1e-15, takes the right side of any equation, and a list that says one number twice for the number.

    Args:
        gold, answer (`sympy.Basic` or `str`): the expressions.
        digits (`int`): digits after the point of the one that is a decimal number, 0 if neither is.
    """
    from sympy import Eq, Expr, Float, Set, UnevaluatedExpr

    if isinstance(gold, Expr) and isinstance(answer, Set):
        return len(getattr(answer, "_unsorted_args", answer.args)) > 1
    sides = getattr(answer, "_unsorted_args", [answer])  # a = b = c is several equations
    if not isinstance(gold, Eq) and all(isinstance(side, Eq) for side in sides):
        for side in sides:
            left, right = value(side.lhs), value(side.rhs)
            if not side.lhs.free_symbols and left is not None and right is not None and abs(left - right) > 1e-6:
                return True
        answer = sides[-1].rhs
    if any(getattr(side, "has", lambda _: False)(UnevaluatedExpr) for side in (gold, answer)):
        return False  # a percentage, which may stand for its number
    left, right = value(gold), value(answer)
    if left is None or right is None:
        return False
    if digits >= 6:
        tolerance = 0.5001 * 10.0**-digits  # rounded, or cut off
    elif digits:
        tolerance = 1e-13 * abs(left)  # as exact as a float is
    else:
        # Of 40 digits; what is 0 by cancelling may be off by its own.
        tolerance = (2e-6 if gold.has(Float) or answer.has(Float) else 1e-25) * (abs(left) or 1e-10)
    return bool(abs(left - right) > tolerance)


def words(found: list[Any]) -> str | None:
    r"""The words that were read, such as those of `\text{Tuesday}`, in small letters; `None` if it was anything else."""
    written = found[-1].strip() if found and isinstance(found[-1], str) else ""
    for command in ("\\text{", "\\textbf{", "\\mathrm{"):
        if written.startswith(command) and written.endswith("}"):
            written = written.removeprefix(command).removesuffix("}").strip()
    return written.casefold() if len(written) > 1 and written.replace(" ", "").isalpha() else None


def of_another_kind(gold: list[Any], answer: list[Any]) -> bool:
    r"""Whether an answer that was read is a number in another base than the gold one, or an inequality, `\ge 5`, where that is none."""
    left, right = (found[-1].strip() if found and isinstance(found[-1], str) else "" for found in (gold, answer))
    first, second = BASE.fullmatch(left), BASE.fullmatch(right)
    if first and second:
        return first[1] != second[1]
    return ORDER.match(right) is not None and ORDER.search(left) is None


def equal(gold: str, answer: str) -> bool:
    """Whether two answers, as math-verify takes them (`$x$` for LaTeX), are the same."""
    from math_verify import verify

    expected, given = items_of(gold), items_of(answer)
    if expected and given and (expected[0] or given[0]):
        same_kind = expected[0] == given[0] and len(expected[1]) == len(given[1])
        return same_kind and all(map(equal_items, expected[1], given[1]))
    lefts, rights = read(gold), read(answer)
    if "\\text" in gold and words(lefts) is not None and words(lefts) == words(rights):
        return True  # Tuesday is not the product of its letters
    if of_another_kind(lefts, rights):
        return False
    digits = max(digits_after_point(lefts), digits_after_point(rights))
    same = any(
        verify(left, right, timeout_seconds=None) and not differ(left, right, digits)
        for left in lefts
        for right in rights
    )
    if same and expected and given and len(expected[1]) == len(given[1]):
        waiting = list(given[1])  # in any order, but not only nearly equal
        for left in expected[1]:
            found = next((right for right in waiting if equal_items(left, right)), None)
            if found is None:
                return False
            waiting.remove(found)
    return same


def equal_items(gold: str, answer: str) -> bool:
    return equal(f"${gold.strip()}$", f"${answer.strip()}$")


def limit(cpu_time: float, wall_time: float, memory: int) -> None:
    """Has the kernel end this process at its limits. No line of Python needs to run for it."""
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    for number, timer, seconds in (
        (signal.SIGPROF, signal.ITIMER_PROF, cpu_time),
        (signal.SIGALRM, signal.ITIMER_REAL, wall_time),
    ):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        signal.setitimer(timer, seconds)


def compare(connection: socket.socket) -> None:
    """Reads a pair of answers, and says how far it came: `STARTED`, `GOLD_READ`, `RIGHT`."""
    with connection.makefile("rb") as file:
        job = json.load(file)
    limit(job["cpu_time"], job["wall_time"], job["memory"])
    connection.sendall(STARTED)
    if (items_of(job["gold"]) or ("", []))[0] or read(job["gold"]):
        connection.sendall(GOLD_READ)
        if equal(job["gold"], job["answer"]):
            connection.sendall(RIGHT)


def serve(trainer: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """Says that all is imported, and forks a process for each connection that the trainer sends. `handle` runs there."""
    logging.disable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes of answers
    gc.freeze()  # so that the processes share this memory, which a collection of garbage would write to
    trainer.sendall(READY)
    while True:
        received, fds, *_ = socket.recv_fds(trainer, 1, 1)
        if not received:
            return
        connection = socket.socket(fileno=fds[0])
        try:
            if os.fork() == 0:
                try:
                    trainer.close()
                    handle(connection)
                finally:
                    os._exit(0)
        except OSError:
            pass  # no more processes: the trainer sees that this one has not started
        connection.close()


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    trainer = socket.socket(fileno=0)
    equal("$(1, x^2)$", r"$(\frac{1}{1}, x \cdot x)$")  # what is imported and prepared on the way is so for all
    serve(trainer, compare)


if __name__ == "__main__":
    main()
