"""Sums in words: questions that training never asks, and rewards that only right answers get."""

from __future__ import annotations

import json

import pytest

from trl_diffusion.rewards import word_sums
from trl_diffusion.tasks import load_task


SAM = {"first": [54], "sign": ["-"], "second": [41], "item": ["coins"]}  # 13


def reward(answer: str, function=word_sums.word_sums_solved, **changes) -> float:
    return function(completions=[answer], **{**SAM, **changes})[0]


@pytest.mark.parametrize(
    "answer",
    [
        "Sam has 54 - 41 = 13 coins.",
        "Sam has 13 coins.",
        "13",
        " 13. ",
        "54 - 41 = 13",
        "54-41=13",
        "Sam now has 13 coins",
    ],
)
def test_right_answers(answer):
    assert reward(answer) == reward(answer, word_sums.word_sums_digits) == 1.0
    assert word_sums.word_sums_solved(completions=[[{"role": "assistant", "content": answer}]], **SAM) == [1.0]


@pytest.mark.parametrize(
    "answer",
    [
        "", "Sam has coins.", "thirteen", "Sam has 54 - 41 = coins.",
        "Sam has 54 - 41 = 14 coins.", "Sam has 95 coins.", "Sam has 54 + 41 = 13 coins.", "Sam has 41 - 54 = 13 coins.",
        "Sam has 54 - 42 = 13 coins.", "Sam has 54 - 41 - 0 = 13 coins.", "Sam has - 41 = 13 coins.",
        "Sam has 54 - 41 = -13 coins.", "Sam has 54 - 41 = - 13 coins.", "Sam has 54 - 41 = 13.5 coins.", "1,3", "0.13", "013",
        "Sam has 54 - 41 = 13 or 14 coins.", "12 13", "1 2 3 4 5 6 7 8 9 10 11 12 13", "13 13", "54 - 41 = 13 = 13",
        "54 - 41 = 12, or 54 - 41 = 13", "Sam has 13 stamps.", "Sam has 13 coins and a hat", "13coins", "1 3", "13 %", "26/2", "^13",
        "Sam has 5.4 - 41 = 13 coins.", "Sam has 131 coins.", "Sam has 113 coins.",
    ],
)  # fmt: skip
def test_wrong_answers(answer):
    assert reward(answer) == 0.0


@pytest.mark.parametrize(
    ("answer", "share"),
    [("54 - 41 = 14", 0.5), ("54 - 41 = 23", 0.5), ("54 - 41 = 31", 0), ("3", 0), ("54 + 41 = 13", 0), ("131", 0)],
)
def test_digits(answer, share):
    assert reward(answer, word_sums.word_sums_digits) == share


def test_rows_of_other_tasks():
    empty = {name: [None] for name in SAM}
    assert reward("13", **empty) is None and reward("13", word_sums.word_sums_digits, **empty) is None


def test_questions():
    """Every gold answer is right, by arithmetic, and the right answer of no other sum is."""
    rows = word_sums.generate(300, seed=5)
    sums = {(row["first"], row["sign"], row["second"]) for row in rows}
    assert len(sums) == 300 and rows == word_sums.generate(300, seed=5) != word_sums.generate(300, seed=6)
    for row in rows:
        result = row["first"] + row["second"] if row["sign"] == "+" else row["first"] - row["second"]
        assert (
            row["result"] == result
            and 1 <= min(result, row["first"], row["second"])
            and max(result, row["first"]) <= 99
        )
        assert f"has {row['first']} {row['item']} and" in row["question"] and f" {row['second']}" in row["question"]
        columns = {name: [row[name]] for name in SAM}
        assert reward(row["answer"], **columns) == 1.0
        assert reward(row["answer"].replace(f"= {result} ", f"= {result + 1} "), **columns) == 0.0


def test_held_out_sums_are_never_trained():
    """In any order of an addition's numbers, with any name and any thing."""

    def keys(dataset):
        pairs = zip(dataset["first"], dataset["sign"], dataset["second"], strict=True)
        return {(sign, *(sorted((a, b)) if sign == "+" else (a, b))) for a, sign, b in pairs}

    task = load_task("word_sums", train_size=100_000)
    assert len(task.evaluation) == 500 and len(task.train) > 8000
    assert not keys(task.train) & keys(task.evaluation)
    assert task.solve_rate(task.evaluation["answer"]) == 1.0
    assert task.train[0]["prompt"][0]["role"] == "user"


def test_rows_of_a_file(tmp_path):
    rows = word_sums.generate(5, seed=1, exclude=word_sums.evaluation_keys())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("word_sums", str(tmp_path / "rows.jsonl"))
    assert [one[0]["content"] for one in task.train["prompt"]] == [row["question"] for row in rows]
    (tmp_path / "rows.jsonl").write_text(json.dumps({**rows[0], "sign": "*"}) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, row 0: the sign must be \+ or -, got '\*'"):
        load_task("word_sums", str(tmp_path / "rows.jsonl"))


def test_too_many_questions():
    with pytest.raises(ValueError, match="There are only"):
        word_sums.generate(20_000, seed=0)
