"""Every checker accepts all gold answers of a public benchmark and rejects them once corrupted."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable

import pytest

from tests.conftest import shared
from tests.rewards import wrong_answers
from tests.rewards.world import PATIENT
from trl_diffusion.rewards import countdown, math, sudoku
from trl_diffusion.rewards.code import code_of_prompt, code_reward, program_of
from trl_diffusion.rewards.sandbox import SandboxLimits, Verdict, run_tests


def lines(*parts: str) -> list[dict]:
    return [json.loads(line) for line in shared("data", *parts).open()]


# GSM8K


@pytest.fixture(scope="module")
def gsm8k() -> list[str]:
    return [row["answer"] for row in lines("gsm8k", "test.jsonl")]


def test_math_gold(gsm8k):
    assert math.math_accuracy(gsm8k, gsm8k) == [1.0] * 1319


@pytest.mark.parametrize("every", [len(wrong_answers.GSM8K), pytest.param(1, marks=pytest.mark.long)])
def test_math_wrong(gsm8k, every):
    """Of each kind of wrong answer one, or one for each of 9 questions."""
    kinds, questions = list(wrong_answers.GSM8K.items()), gsm8k[::150]
    cases = [(kind, question) for kind in range(len(kinds)) for question in range(len(questions))]
    cases = [case for case in cases if (case[0] - case[1]) % every == 0] if every > 1 else cases
    answers = [questions[question] for _, question in cases]
    texts = [
        kinds[kind][1](math.final_answer(gold).replace(",", ""))
        for (kind, _), gold in zip(cases, answers, strict=True)
    ]
    rewards = math.math_accuracy(texts, answers)
    wrong = [
        (kinds[kind][0], gold) for (kind, _), gold, reward in zip(cases, answers, rewards, strict=True) if reward != 0
    ]
    assert wrong == []


# Sudoku


def other(digit: str) -> str:
    return "2341"[int(digit) - 1]


SUDOKU_CORRUPTIONS: dict[str, Callable[[str, str], str]] = {
    "a blank filled in wrongly": lambda puzzle, answer: "".join(
        other(digit) if cell == puzzle.index("0") else digit for cell, digit in enumerate(answer)
    ),
    "another grid": lambda puzzle, answer: answer.translate(str.maketrans("1234", "2341")),
    "a cell missing": lambda puzzle, answer: answer[:-1],
    "a cell too many": lambda puzzle, answer: answer + answer[0],
    "the puzzle itself": lambda puzzle, answer: puzzle,
    "in words": lambda puzzle, answer: f"The answer is {answer}",
    "nothing": lambda puzzle, answer: "",
}


@pytest.fixture(scope="module")
def puzzles() -> list[tuple[str, str]]:
    with shared("data", "sudoku", "4x4_test.csv").open() as file:
        return [(row["Puzzle"], row["Solution"]) for row in csv.DictReader(file)]


def test_sudoku_gold(puzzles):
    assert sudoku.sudoku_solved([s for _, s in puzzles], puzzle=[p for p, _ in puzzles]) == [1.0] * 500


@pytest.mark.parametrize("kind", SUDOKU_CORRUPTIONS)
def test_sudoku_corrupted(puzzles, kind):
    corrupted = [SUDOKU_CORRUPTIONS[kind](puzzle, solution) for puzzle, solution in puzzles]
    rewards = sudoku.sudoku_solved(corrupted, puzzle=[puzzle for puzzle, _ in puzzles])
    assert rewards == [0.0] * 500


# Countdown

COUNTDOWN_CORRUPTIONS: dict[str, Callable[[str, list[int]], str]] = {
    "a number used twice": lambda answer, numbers: f"{answer}+{numbers[0]}-{numbers[0]}",
    "a number of its own": lambda answer, numbers: f"({answer})*1",
    "a number left out": lambda answer, numbers: "+".join(map(str, numbers[1:])),
    "the target itself": lambda answer, numbers: str(countdown.evaluate_expression(answer)[0]),
    "another value": lambda answer, numbers: f"-({answer})",
    "an equation": lambda answer, numbers: f"{answer}={countdown.evaluate_expression(answer)[0]}",
    "unbalanced": lambda answer, numbers: f"({answer}",
    "Python": lambda answer, numbers: f"int({answer})",
    "nothing": lambda answer, numbers: "",
}


@pytest.fixture(scope="module")
def games() -> list[tuple[list[int], int, str]]:
    """The public games, each with a solution found by trying everything."""
    rows = [
        ([int(n) for n in row["input"].split(",")], int(row["output"])) for row in lines("countdown", "cd3_test.jsonl")
    ]
    return [(numbers, target, countdown.solve(numbers, target)) for numbers, target in rows]


def countdown_rewards(games, answers: list[str]) -> list[float]:
    return countdown.countdown_solved(answers, numbers=[game[0] for game in games], target=[game[1] for game in games])


def test_countdown_gold(games):
    assert countdown_rewards(games, [game[2] for game in games]) == [1.0] * 256


@pytest.mark.parametrize("kind", COUNTDOWN_CORRUPTIONS)
def test_countdown_corrupted(games, kind):
    corrupted = [COUNTDOWN_CORRUPTIONS[kind](solution, numbers) for numbers, _, solution in games]
    assert countdown_rewards(games, corrupted) == [0.0] * 256


# HumanEval

CODE_CORRUPTIONS: dict[str, Callable[[dict], str]] = {
    "returns nothing": lambda row: "    pass\n",
    "returns an object that is equal to all": lambda row: (
        "    class Same:\n        __eq__ = __le__ = __lt__ = __ge__ = __gt__ = lambda *_: True\n"
        "        __abs__ = __sub__ = __rsub__ = lambda self, *_: self\n    return Same()\n"
    ),
    "of another task": lambda row: "    return 'of another task'\n",
    "cut off": lambda row: row["canonical_solution"].rstrip()[:-1] + " (",
    "another name": lambda row: f"    return\n\ndel {row['entry_point']}\n",
    "raises": lambda row: "    raise AssertionError\n",
    "does not end": lambda row: "    import time\n    time.sleep(1000)\n",
    "leaves": lambda row: "    raise SystemExit(0)\n",
}


@pytest.fixture(scope="module")
def human_eval() -> list[dict]:
    return lines("humaneval", "HumanEval.jsonl")


def code_rewards(rows: list[dict], completions: list[str], **options) -> list[float | None]:
    columns = {name: [row[name] for row in rows] for name in ("test", "entry_point")}
    reward = code_reward(allow_execution=True, **{"limits": PATIENT, **options})
    return reward([row["prompt"] for row in rows], completions, **columns)


@pytest.mark.slow
def test_code_gold(human_eval):
    """Alone: some, all with a helper in their prompt, and all with the name of another. The others twelve to a sandbox."""
    names = Counter(row["entry_point"] for row in human_eval)

    def is_alone(number: int, row: dict) -> bool:
        return number % 40 == 0 or f"\n{row['prompt']}".count("\ndef ") > 1 or names[row["entry_point"]] > 1

    alone = [row for number, row in enumerate(human_eval) if is_alone(number, row)]
    assert code_rewards(alone, [row["canonical_solution"] for row in alone]) == [1.0] * len(alone)
    others = [row for row in human_eval if row not in alone]
    assert len(alone) > 16 and len(alone) + len(others) == 164
    for begin in range(0, len(others), 12):
        rows = others[begin : begin + 12]
        assert run_together(rows, [row["canonical_solution"] for row in rows]).passed
        if begin == 0:  # one that is wrong is enough
            assert not run_together(rows, [row["canonical_solution"] for row in rows[:-1]] + ["    return\n"]).passed


def run_together(rows: list[dict], completions: list[str]) -> Verdict:
    """The programs of several tasks as one program, and their tests one after another."""
    programs, tests = [], []
    for row, completion in zip(rows, completions, strict=True):
        name = row["entry_point"]
        programs.append(program_of(completion, code_of_prompt(row["prompt"], name), name))
        tests.append(f"{row['test']}\ncheck({name})\n")
    return run_tests("\n\n".join(programs), "\n".join(tests), limits=PATIENT)


@pytest.mark.parametrize("kind", CODE_CORRUPTIONS)
def test_code_corrupted(human_eval, kind):
    rows = human_eval[:: 80 if kind != "does not end" else 160]
    completions = [CODE_CORRUPTIONS[kind](row) for row in rows]
    limits = SandboxLimits(wall_time=1) if kind == "does not end" else PATIENT  # it fails for no other reason
    assert code_rewards(rows, completions, limits=limits) == [0.0] * len(rows)
