"""Rows of files that are no rows of the task are refused, by file and row."""

from __future__ import annotations

import json

import pytest

from trl_diffusion.tasks import load_task, read_rows
from trl_diffusion.tasks.countdown import countdown_rows


GAME = {"numbers": [1, 2, 3], "target": 6}


def write(tmp_path, row, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text(json.dumps(GAME) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 5.7}, r"rows.jsonl, row 1: the target must be a whole number, got 5.7"),
        ({"target": "5.7"}, r"row 1: the target must be a whole number, got '5.7'"),
        ({"target": True}, r"row 1: the target must be a whole number, got True"),
        ({"target": [6]}, r"row 1: the target must be a whole number, got \[6\]"),
        ({"target": float("nan")}, r"row 1: the target must be a whole number, got nan"),
        ({"target": None}, r"row 1: none of the columns \['target', 'output'\]"),
        ({"numbers": []}, r"row 1: the numbers must be a list that is not empty, got \[\]"),
        ({"numbers": 5}, r"row 1: the numbers must be a list that is not empty, got 5"),
        ({"numbers": [1, 2.5, 3]}, r"row 1: each of the numbers must be a whole number, got 2.5"),
        ({"numbers": [1, False, 3]}, r"row 1: each of the numbers must be a whole number, got False"),
        ({"numbers": "1,,3"}, r"row 1: each of the numbers must be a whole number, got ''"),
        ({"numbers": [1, None, 3]}, r"row 1: each of the numbers must be a whole number, got None"),
        ({"numbers": [1, -2, 3]}, r"row 1: no answer can use the number -2"),
    ],
)
def test_malformed_games(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_task("countdown", write(tmp_path, {**GAME, **change}))


def test_whole_numbers_in_any_form(tmp_path):
    """Text, as in CSV, and floats without a fraction, as pandas writes them, are whole numbers."""
    task = load_task("countdown", write(tmp_path, {"numbers": "4, 5,6", "target": 15.0}))
    assert task.train[1]["numbers"] == [4, 5, 6] and task.train[1]["target"] == 15
    assert task.train[1]["prompt"] == "countdown 4,5,6=15"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", 'numbers,target\n"1,2,3",6\n'),
        ("rows.csv", "\ufeffnumbers;target\r\n1,2,3;6\r\n"),  # of Excel, where the comma is the decimal point
        ("rows.csv", "numbers\ttarget\r\n1,2,3\t6"),
        ("rows.jsonl", "\ufeff" + json.dumps(GAME)),
        ("rows.json", "\ufeff" + json.dumps([GAME])),
    ],
)
def test_files_as_other_programs_write_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    (game,) = countdown_rows(str(tmp_path / name))
    assert game == {**GAME, "prompt": "countdown 1,2,3=6"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "5\n", r"rows.jsonl, row 0: must be an object with a value for each column, got 5"),
        ("rows.json", '{"numbers": [1], "target": 1}', r"rows.json: must hold a list of rows, got dict"),
        ("rows.json", '[{"numbers": [1], "target": 1}, [1]]', r"rows.json, row 1: must be an object"),
        ("rows.json", "[{]", r"rows.json: not JSON"),
        ("rows.csv", "numbers,target,target\n1,2,3\n", r"rows.csv: the columns \['target'\] are there more than once"),
        ("rows.csv", "numbers,target\n1,2,3\n", r"rows.csv, row 0: has more values than the file has columns"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"numbers,target\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match=r"rows.csv is not UTF-8"):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    "row", [{"question": 5, "answer": "#### 1"}, {"question": "1?", "answer": 1}, {"question": " ", "answer": "1"}]
)
def test_malformed_questions(tmp_path, row):
    pytest.importorskip("math_verify")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, row 0: the (question|answer) must be text"):
        load_task("gsm8k", str(path))
