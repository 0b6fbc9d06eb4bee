"""
Answers that are meant to take long, take much memory or raise in a checker of answers. None of them is right.

`python -m tests.rewards.hostile_answers [COUNT [NAME ...]]` gives COUNT of them (1000 by default) to every reward and metric
of the package, or to those that are named, alone and 64 at once, and prints what took longest.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from trl_diffusion import metrics
from trl_diffusion.rewards import countdown, math, sudoku
from trl_diffusion.rewards.code import code_reward
from trl_diffusion.rewards.length import truncation_penalty


TOKENS = [
    "#", "####", "#### ", "####\n", "\\boxed{", "\\boxed{}", "\\fbox{", "{", "}", "{}", "$", "$$", "\\(", "\\[", "(", ")", "[", "|",
    " ", "\n", "\t", "\r\n", "\u00a0", "9", "1,", "1.", "-", "+", "*", "/", "^", "!", "=", "<", "%", "&", "_", "\\", "\\\\", "\\,",
    "answer ", "answer: ", "final answer is ", "the answer is $", "\\frac", "\\frac{", "\\frac{1}", "\\sqrt", "\\sqrt{", "^{", "_{",
    "\\text{", "\\text", "\\left(", "\\begin{pmatrix}", "a ", "x^", "and ", ", or $", "def f", "```", "```\n", "```python\n", "~~~\n",
    "````", "async ", "<<", ">>", "1 2 ", "0x", "1e", "\u0660", "\u00b2", "\u20ac", "\U0001f600", "\ufffd", "\u200b", "\u202e",
]  # fmt: skip
NESTS = [
    "{%s}", "(%s)", "[%s]", "-%s", "\\frac{1}{%s}", "\\frac{%s}{2}", "\\sqrt{%s}", "\\sqrt[%s]{2}", "x^{%s}", "{%s}^2", "a_{%s}",
    "\\left(%s\\right)", "\\boxed{%s}", "\\text{%s}", "|%s|", "\\sin(%s)", "\\{%s\\}", "(%s,1)", "[1,%s]", "\\overline{%s}",
    "\\begin{pmatrix}%s\\end{pmatrix}", "\\lim_{x\\to 0}%s", "\\int %s dx", "\\sum_{i=1}^{9}%s", "%s!", "2+%s", "%s=1", "$%s$",
]  # fmt: skip
HUGE = [
    "%d!", "%d!!", "(%d!)!", "9^{%d}", "9^{9^{%d}}", "9^{9^{9^{%d}}}", "9**9**%d", "10^{10^{%d}}", "2^{%d}!", "1e%d", "0.1^{-%d}",
    "\\binom{%d}{12345}", "\\sqrt[%d]{3^{%d}}", "\\sum_{i=1}^{%d} i^i", "\\prod_{i=1}^{%d} i", "\\int_0^{%d} x^x dx",
    "\\lim_{x\\to %d} x^{x^x}", "(x+1)^{%d}", "(x+y+z)^{%d}", "\\gcd(%d!, 7)", "\\lfloor e^{%d} \\rfloor", "%d \\bmod 7", "\\log(%d!)",
    "\\sin(10^{%d})", "x^{%d}+x+1=0", "|x|^{%d}<1", "\\cos^{%d}(x)", "\\frac{%d!}{%d!}", "\\{x | x^{%d} = 1\\}", "%d%%",
]  # fmt: skip
WRAPS = [
    "%s",
    "#### %s",
    "work\n#### %s",
    "\\boxed{%s}",
    "$%s$",
    "the final answer is $%s$",
    "```python\n%s\n```",
    "%s a b",
    "\\[%s\\]",
]


def _runs(rng: random.Random) -> str:
    return rng.choice(TOKENS) * rng.choice([20, 200, 2000, 20_000])


def _nests(rng: random.Random) -> str:
    outer, text, depth = (
        rng.choice(NESTS).split("%s"),
        rng.choice(["1", "x", "", "9!"]),
        rng.choice([5, 30, 200, 3000]),
    )
    return outer[0] * depth + text + outer[1] * depth


def _numbers(rng: random.Random) -> str:
    pattern = rng.choice(HUGE)
    number = rng.choice([10**3 + 9, 10**5 + 3, 99_999_999, 10**13, 10**40 + 1, int("7" * 4000)])
    return pattern.replace("%d", str(number)).replace("%%", "%")


def _digits(rng: random.Random) -> str:
    return rng.choice(["", "-", "0.", "1/", "\\frac{1}"]) + rng.choice("1379") * rng.choice([400, 5000, 50_000])


def _controls(rng: random.Random) -> str:
    codes = [*range(32), 127, 0x85, 0xA0, 0x2028, 0xFEFF, 0xFFFF, 0x10FFFF, 0x301]
    return "".join(chr(rng.choice(codes)) for _ in range(rng.choice([1, 30, 3000])))


def _mixtures(rng: random.Random) -> str:
    return "".join(rng.choice(TOKENS + ["7", "x"]) for _ in range(rng.choice([10, 100, 1000])))


KINDS: list[Callable[[random.Random], str]] = [_runs, _nests, _numbers, _digits, _controls, _mixtures]


def hostile_answers(count: int, seed: int = 0) -> list[str]:
    """`count` different answers, of every kind in turn."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[rng.choice(WRAPS).replace("%s", KINDS[len(found) % len(KINDS)](rng))] = None
    return list(found)


GOLD, GAME, PUZZLE = r"$\frac{123457}{2}$", {"numbers": [30, 100, 93], "target": 23}, "3102200002100320"
TEST = "def check(candidate):\n    assert candidate(2) == 123457"


def rewards(with_code: bool = True) -> dict[str, Callable[[list[str]], list[float]]]:
    """Every reward of the package and every metric, from answers to a reward for each (of a metric, one for all)."""
    cache = tempfile.mkdtemp()
    code = code_reward(allow_execution=True) if with_code else None
    found: dict[str, Callable] = {
        "math_accuracy": lambda texts: math.math_accuracy(texts, [GOLD] * len(texts)),
        "answer_format": lambda texts: [reward == 2 for reward in math.answer_format(texts)],
        "sudoku_solved": lambda texts: sudoku.sudoku_solved(texts, puzzle=[PUZZLE] * len(texts)),
        "sudoku_units": lambda texts: sudoku.sudoku_units(texts, puzzle=[PUZZLE] * len(texts)),
        "countdown_solved": lambda texts: countdown.countdown_solved(
            texts, numbers=[GAME["numbers"]] * len(texts), target=[GAME["target"]] * len(texts)
        ),
        "countdown_near": lambda texts: [
            reward == 1
            for reward in countdown.countdown_near(
                texts, numbers=[GAME["numbers"]] * len(texts), target=[GAME["target"]] * len(texts)
            )
        ],
        "countdown_numbers": lambda texts: countdown.countdown_numbers(texts, numbers=[GAME["numbers"]] * len(texts)),
        "truncation_penalty": lambda texts: truncation_penalty([2])(completion_ids=[[2]] * len(texts)),
    }
    if code is not None:
        found["code_reward"] = lambda texts: code(
            ["Write f."] * len(texts), texts, test=[TEST] * len(texts), entry_point=["f"] * len(texts)
        )
    for kind, reference, name in (
        (metrics.MathExactMatch, GOLD, "exact_match"),
        (metrics.SudokuSolved, PUZZLE, "solved"),
        (metrics.CountdownSolved, GAME, "solved"),
    ):
        metric = kind(cache_dir=cache, keep_in_memory=True)
        found[kind.__name__] = lambda texts, metric=metric, reference=reference, name=name: [
            metric.compute(predictions=texts, references=[reference] * len(texts))[name]
        ]
    return found


def batches(texts: list[str], size: int) -> Iterator[list[str]]:
    for begin in range(0, len(texts), size):
        yield texts[begin : begin + size]


def main(count: int, names: list[str]) -> None:
    texts = hostile_answers(count)
    for name, reward in rewards(with_code=not names or "code_reward" in names).items():
        for size in (1, 64) if not names or name in names else ():
            slowest, wrong, begin = (0.0, ""), 0, time.monotonic()
            for batch in batches(texts, size):
                start = time.monotonic()
                wrong += sum(value != 0 for value in reward(batch))
                slowest = max(slowest, (time.monotonic() - start, batch[0][:60]))
            took = f"{time.monotonic() - begin:.1f} s, at most {slowest[0]:.2f} s ({slowest[1]!r})"
            print(f"{name}, {count} answers, {size} at once: {took}, {wrong} rewarded", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, sys.argv[2:])
