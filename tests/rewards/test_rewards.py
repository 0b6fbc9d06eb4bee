"""Checkers agree with gold answers and reject corrupted ones."""

from __future__ import annotations

import csv
import json
from fractions import Fraction

import pytest

from tests.conftest import shared
from trl_diffusion.rewards import countdown, math, sudoku


PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"


def test_there_are_288_grids():
    grids = sudoku.all_grids()
    assert len(set(grids)) == 288
    assert all(sudoku.is_solved("0" * 16, grid) for grid in grids)


@pytest.mark.parametrize(
    "answer",
    [
        SOLUTION[:-1],  # too short
        SOLUTION + "1",  # too long
        "1" + SOLUTION[1:],  # changes a clue
        SOLUTION.replace("4", "3"),  # repeats a digit
        SOLUTION.replace("4", "0"),  # leaves blanks
        SOLUTION[:5] + "a" + SOLUTION[6:],  # not a digit
        "",
    ],
)
def test_sudoku_rejects(answer):
    assert sudoku.is_solved(PUZZLE, SOLUTION)
    assert sudoku.is_solved(PUZZLE, f" {SOLUTION}\n")
    assert not sudoku.is_solved(PUZZLE, answer)


def test_sudoku_units_is_a_share():
    swapped = SOLUTION[:14] + SOLUTION[15] + SOLUTION[14]  # two digits of one row and box: two columns are wrong
    assert sudoku.units_solved("0" * 16, SOLUTION) == 1.0
    assert sudoku.units_solved("0" * 16, swapped) == pytest.approx(10 / 12)


def test_sudoku_public_puzzles():
    with shared("data", "sudoku", "4x4_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 500
    assert all(sudoku.is_solved(row["Puzzle"], row["Solution"]) for row in rows)


@pytest.mark.parametrize("puzzle", ["123", "5" * 16, "x" * 16])
def test_bad_puzzle(puzzle):
    with pytest.raises(ValueError, match="16 digits"):
        sudoku.units_solved(puzzle, SOLUTION)


def test_training_puzzles_are_not_evaluation_puzzles():
    kept = set(sudoku.evaluation_puzzles())
    assert len(kept) == 500
    rows = sudoku.generate(3000, seed=20260319, exclude=kept)  # the very seed that made them
    assert len({row["puzzle"] for row in rows}) == 3000
    assert not kept & {row["puzzle"] for row in rows}
    assert all(sudoku.is_solved(row["puzzle"], row["solution"]) for row in rows)
    keys = countdown.evaluation_keys()
    games = countdown.generate(3000, seed=20260319, exclude=keys)
    assert not keys & {countdown.key_of(game["numbers"], game["target"]) for game in games}
    assert all(countdown.is_solved(game["solution"], game["numbers"], game["target"]) for game in games)


def test_more_puzzles_than_there_are():
    with pytest.raises(ValueError, match="only 288 puzzles|only 4608 puzzles"):
        sudoku.generate(10_000, seed=0, blanks=1)
    with pytest.raises(ValueError, match="from 1 to 16"):
        sudoku.generate(1, seed=0, blanks=17)


def test_countdown_value():
    assert countdown.evaluate_expression("30+93-100") == (Fraction(23), [30, 93, 100])
    assert countdown.evaluate_expression(" (3-1)*4/5 ")[0] == Fraction(8, 5)
    assert countdown.is_solved("6/(1-3/4)", [1, 3, 4, 6], 24)  # exact, where floats are not


@pytest.mark.parametrize(
    "answer",
    [
        "30+93",  # leaves a number out
        "30+93-100+30-30",  # uses one twice
        "100-30-93",  # another value
        "30+93-100=23",  # not an expression
        "30+93-99",  # another number
        "(30+93-100",  # unbalanced
        "30**93-100",  # another operator
        "30+93-100/0",  # another number, and a division by zero
        "__import__('os')",
        "-" * 5000 + "30+93-100",
        "",
    ],
)
def test_countdown_rejects(answer):
    assert countdown.is_solved("30+93-100", [30, 100, 93], 23)
    assert not countdown.is_solved(answer, [30, 100, 93], 23)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("30+93-100", 1),
        ("100-93+30", 23 / 37),
        ("30-93-100", 23 / (23 + 186)),  # -163
        ("100/(93-30)", 23 / (23 + 23 - 100 / 63)),
        ("30*93-100", 23 / 2690),
        ("23", 0),  # near, but not with these numbers
        ("100-93+30-0", 0),
        ("", 0),
    ],
)
def test_countdown_near(answer, expected):
    assert countdown.countdown_near([answer], numbers=[[30, 100, 93]], target=[23]) == [pytest.approx(expected)]


def test_countdown_near_zero_and_below():
    assert countdown.countdown_near(["4-4", "4", "4+4"], numbers=[[4, 4]] * 3, target=[0] * 3) == [1, 0, 1 / 9]
    assert countdown.countdown_near(["3-5"], numbers=[[3, 5]], target=[-4]) == [pytest.approx(4 / 6)]


def test_countdown_public_games_by_brute_force():
    rows = [json.loads(line) for line in shared("data", "countdown", "cd3_test.jsonl").open()]
    assert len(rows) == 256
    for row in rows:
        numbers, target = [int(n) for n in row["input"].split(",")], int(row["output"])
        found = countdown.solve(numbers, target)
        assert found is not None and countdown.is_solved(found, numbers, target)
    assert countdown.solve([1, 1, 1], 50) is None


def test_math_gold_answers():
    rows = [json.loads(line) for line in shared("data", "gsm8k", "test.jsonl").open()]
    gold = [row["answer"] for row in rows]
    assert math.math_accuracy(gold, gold) == [1.0] * 1319
    assert math.answer_format(gold) == [1.0] * 1319


def test_math_rejects():
    gold = "48/2 = 24, 48+24 = 72\n#### 72"
    answers = ["#### 71", "The answer is 73.", "", "72 #### 7", "#### seventy"]
    assert math.math_accuracy(answers, [gold] * len(answers)) == [0.0] * len(answers)
    right = ["so #### 72", "#### 72.0", r"it is \boxed{72}", "#### $72"]
    assert math.math_accuracy(right, [gold] * len(right)) == [1.0] * len(right)
    assert math.answer_format(["no marker", "#### 72", "work ####", "work #### 72"]) == [0.0, 0.2, 0.0, 1.0]


def test_conversational_completions():
    chat = [[{"role": "assistant", "content": SOLUTION}]]
    assert sudoku.sudoku_solved(chat, puzzle=[PUZZLE]) == [1.0]
