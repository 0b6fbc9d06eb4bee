"""Mathematical answers: which one counts, what is equal, and what hostile ones may take."""

from __future__ import annotations

import ast
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from re import _parser

import pytest

import trl_diffusion
from tests.processes import HANGS
from tests.rewards.hostile_answers import batches, hostile_answers, rewards
from tests.rewards.wrong_answers import MATH
from trl_diffusion.rewards import math, math_checker
from trl_diffusion.rewards.confined import math_answers
from trl_diffusion.rewards.math_checker import MathChecker, MathLimits


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", "72"),
        ("work #### 3 #### 4\n", "4"),
        ("#### Step 3\nso \\boxed{7}", "7"),
        ("\\boxed{7}\n#### Step 3", "7"),
        ("\\boxed{7}\n#### 3", "3"),
        ("#### 3 \\boxed{7}", "7"),
        ("#### \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{3}, or \\fbox {4}", "4"),
        ("\\boxed{\\boxed{7}}", "{7}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{7", None),
        ("\\\\boxed{7}", None),
        ("#### 72 dollars", "72 dollars"),
        ("#### The answer is 72", "The answer is 72"),
        ("#### 72 dollars\n\nGood.", None),
        ("#### 3. Add\nThere are 7.", None),
        ("#### Step 3", ""),
        ("#### 71 or 72", ""),
        ("##### 72", None),
        ("######", None),
        ("#### \\text{dollars}", "\\text{dollars}"),
        ("####\n72", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert math.final_answer(text) == answer


def test_answer_format():
    texts = [
        "######",
        "a #### 3",
        "#### 72",
        "work ####",
        "work #### 72\n",
        "work #### !",
        "# #### 7",
        "a #### b c",
        "#" * 2000 + " a b",
        "a ##### 1",
    ]
    assert math.answer_format(texts) == [0.0, 1.0, 0.2, 0.0, 1.0, 0.0, 0.2, 0.0, 0.0, 0.2]  # fmt: skip


@pytest.mark.parametrize(("gold", "right", "wrong"), MATH)
def test_equal_and_not(gold, right, wrong):
    """Answers in a box, behind the marker and in the text, in turn, and the gold answer in every form."""
    wraps = ["So \\boxed{%s}.", "So:\n#### %s", "The answer is $%s$."]
    golds = [gold, f"${gold}$", f"Thus $x=\\boxed{{{gold}}}$."]
    texts = [wraps[i % 3].replace("%s", answer) for i, answer in enumerate(right + wrong)]
    found = math.math_accuracy(texts, [golds[i // 3 % 3] for i in range(len(texts))])
    assert dict(zip(texts, found, strict=True)) == dict(
        zip(texts, [1.0] * len(right) + [0.0] * len(wrong), strict=True)
    )


def test_numbers_are_compared_without_a_process(monkeypatch):
    monkeypatch.setattr(math.checker, "_compare", None)
    golds = ["1,234", "a = <<1=1>>1,234\n#### 1,234", "$1234$", "1234.50", "-5", "7", "9" * 1000]
    texts = [
        "#### 1234",
        "It is \\boxed{1,234}.",
        "#### $1,234.0",
        "#### 1234.5",
        "#### **-5**.",
        "#### 7.0000001",
        "#### " + "9" * 1000,
    ]
    assert math.math_accuracy(texts, golds) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def test_exponents():
    right = {
        "5000": ["5e3", "5E3", "5e+3", "5.0e3", "0.5e4"],
        "0.002": ["2e-3", "20e-4"],
        "5e3": ["5000", "5e3", "50e2"],
    }
    wrong = {
        "5000": ["5e2", "5e-3", "5e", "e3"],
        "5": ["5e3", "5e1"],
        "53": ["5e3"],
        "8.15": ["3e"],
        "5e3": ["5", "53", "500"],
    }
    for table, reward in ((right, 1.0), (wrong, 0.0)):
        for gold, answers in table.items():
            texts = [wrap % answer for answer in answers for wrap in ("\\boxed{%s}", "#### %s")]
            found = math.math_accuracy(texts, [gold] * len(texts))
            assert dict(zip(texts, found, strict=True)) == dict.fromkeys(texts, reward), gold


@pytest.mark.parametrize(
    "gold", ["\\textbf{(E)}\\ 5", "$\\text{(E)} \\quad 5$", "So \\boxed{\\textbf{(E) }5}.", "\\mathrm{(E)}~5.0"]
)
def test_a_letter_with_a_value(gold):
    right = ["5", "E", "(E)", "\\text{(E)}", "\\textbf{(E)} 5", "\\text{E}\\ 5.0", "\\textbf{E}"]
    wrong = ["6", "D", "(D)", "e", "\\textbf{(D)} 5", "\\textbf{(E)} 6", "55", "\\text{(D)}"]
    texts = [f"\\boxed{{{answer}}}" for answer in right + wrong] + [
        "#### 5",
        "#### 6",
        "The answer is 5.",
        "The answer is 6.",
    ]
    expected = [1.0] * len(right) + [0.0] * len(wrong) + [1.0, 0.0, 1.0, 0.0]
    assert math.math_accuracy(texts, [gold] * len(texts)) == expected


def test_a_letter_that_is_no_choice():
    golds = ["\\mathbf{A} + I", "\\mathbf{A}\\mathbf{B}", "\\mathrm{C}_2", "\\mathbf{A}^{-1}"]
    texts = ["\\boxed{A}", "\\boxed{\\mathbf{A}}", "\\boxed{C}", "\\boxed{A}"]
    assert math.math_accuracy(texts, golds) == [0.0] * 4


def test_a_scale_in_the_gold_answer():
    texts = ["#### 5000000", "#### 5 million", "#### 5", "#### 5 thousand"]
    assert math.math_accuracy(texts, ["5 million"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_gold_answers_that_cannot_be_read():
    assert math.math_accuracy(["5"] * 5, [None, "...", "", "no number", "\\boxed{}"]) == [None] * 5
    assert math.math_accuracy(["\\boxed{ABC}", "\\boxed{ABD}"], ["It is \\boxed{ABC}."] * 2) == [1.0, 0.0]


LONG = "\\boxed{99999999!}"


def test_limits_hold_in_threads():
    """Each takes hours; the kernel ends it, whichever thread waits. A right one beside them is right."""
    checker = MathChecker(MathLimits(cpu_time=0.2))
    pairs = [("$7$", LONG), ("$7$", "\\boxed{9^{9^{9^9}}}"), ("$7$", "\\boxed{6+1}"), (LONG, "\\boxed{7}")]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: checker.compare([pair]), pairs)) == [[False], [False], [True], [False]]
    assert checker.compare([]) == []


def test_answers_do_not_wait_for_each_other(monkeypatch):
    """Three that take long are in processes at the same time: each waits here for the other two."""
    monkeypatch.setattr(math_checker, "workers", lambda: 3)
    checker, together = MathChecker(), threading.Barrier(3, timeout=HANGS)
    monkeypatch.setattr(checker, "_server", lambda: None)
    monkeypatch.setattr(checker, "_ask", lambda server, job: (together.wait(), b"sg")[1])
    assert checker.compare([("$7$", LONG)] * 3) == [False] * 3


def test_what_an_answer_may_use(monkeypatch):
    limits, timers = {}, {}
    monkeypatch.setattr(math_answers.resource, "setrlimit", lambda kind, values: limits.update({kind: values[0]}))
    monkeypatch.setattr(math_answers.resource, "getrlimit", lambda kind: (-1, math_answers.resource.RLIM_INFINITY))
    monkeypatch.setattr(signal, "setitimer", lambda timer, seconds: timers.update({timer: seconds}))
    monkeypatch.setattr(signal, "signal", lambda number, handler: timers.update({number: handler}))
    math_answers.limit(cpu_time=2.0, wall_time=10.0, memory=2**30)
    names = ("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_FSIZE")
    assert [limits[getattr(math_answers.resource, name)] for name in names] == [2**30, 0, 0]
    assert timers[signal.ITIMER_PROF] == 2.0 and timers[signal.ITIMER_REAL] == 10.0
    assert timers[signal.SIGPROF] == timers[signal.SIGALRM] == signal.SIG_DFL


def test_the_process_is_started_again():
    checker = MathChecker()
    assert checker.compare([("$7$", "$6+1$")]) == [True]
    os.kill(checker._process.pid, signal.SIGKILL)
    checker._process.wait()
    assert checker.compare([("$7$", "$6+1$")] * 3) == [True] * 3


def test_no_math_verify(monkeypatch):
    monkeypatch.setattr(math_checker, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'trl-diffusion"):
        MathChecker().compare([("$7$", "$7$")])
    monkeypatch.undo()
    monkeypatch.setattr(math_checker, "_PROGRAM", "/no/such/program")
    with pytest.raises(RuntimeError, match="did not start"):
        MathChecker().compare([("$7$", "$7$")])


def test_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert math_checker.workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert math_checker.workers() == 1


@pytest.mark.parametrize(("count", "at_once", "names"), [(24, 24, None), (12, 1, None), (12, 12, ["code_reward"])])
def test_hostile_answers(monkeypatch, count, at_once, names):
    """A few of the 1000 that `python -m tests.rewards.hostile_answers` gives to everything. None raises and none is right."""
    monkeypatch.setattr(math.checker, "limits", MathLimits(cpu_time=0.1))
    texts = hostile_answers(count, seed=7)
    functions = rewards(with_code=names is not None)
    for name in names or functions:
        for batch in batches(texts, at_once):
            assert not any(functions[name](batch)), (name, batch[0][:100])


FOLDERS = ("rewards", "metrics", "evaluation", "tasks", "viz")


def patterns() -> list[tuple[str, str]]:
    """Every pattern in the code that sees what a policy wrote, and where it stands; parts filled in stand for a word."""
    found = []
    for folder in FOLDERS:
        for path in Path(trl_diffusion.__file__).parent.joinpath(folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = isinstance(node, ast.Call) and ast.unparse(node.func)
                if called and re.fullmatch(r"re\.\w+", called) and called != "re.escape":
                    first = node.args[0]
                    assert isinstance(first, ast.Constant | ast.JoinedStr), f"{path}, line {node.lineno}"
                    parts = first.values if isinstance(first, ast.JoinedStr) else [first]
                    pattern = "".join(part.value if isinstance(part, ast.Constant) else "word" for part in parts)
                    found.append((f"{path.name}, line {node.lineno}", pattern))
    return found


def test_patterns_do_not_backtrack():
    """What repeats without a bound keeps what it took (`*+`), so a match takes as many steps as there are characters."""
    assert len(patterns()) > 5
    for where, pattern in patterns():
        assert not greedy(_parser.parse(pattern)), (where, pattern)


def greedy(parsed) -> bool:
    """Whether a parsed pattern has a repetition without a bound that gives back what it took."""
    if isinstance(parsed, tuple | list | _parser.SubPattern):
        repeats = isinstance(parsed, tuple) and parsed[0] in (_parser.MAX_REPEAT, _parser.MIN_REPEAT)
        return repeats and parsed[1][1] is _parser.MAXREPEAT or any(map(greedy, parsed))
    return False
