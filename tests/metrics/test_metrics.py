"""Metrics agree with the checkers, offline, over batches and over processes."""

from __future__ import annotations

import os
import random
from itertools import combinations
from statistics import fmean

import pytest

from tests.processes import run_pair
from trl_diffusion.metrics import CountdownSolved, MathExactMatch, PassAtK, SudokuSolved, pass_at_k
from trl_diffusion.rewards import sudoku


PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
GAME = {"numbers": [30, 100, 93], "target": 23}


@pytest.fixture
def offline(monkeypatch):
    """No name can be looked up and no connection made."""
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("A metric reached for the network.")

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


CASES = [
    (MathExactMatch, ["#### 4", "it is 5", "7"], ["2+2=4\n#### 4", "6", "..."], {"exact_match": 0.5, "skipped": 1}),
    (SudokuSolved, [SOLUTION, SOLUTION[::-1], ""], [PUZZLE] * 3, {"solved": 1 / 3, "units": 1 / 3}),
    (CountdownSolved, ["30+93-100", "100-93+30", "30"], [GAME] * 3, {"solved": 1 / 3, "numbers": 2 / 3}),
]


@pytest.mark.parametrize("keep_in_memory", [False, True])
@pytest.mark.parametrize(("kind", "predictions", "references", "expected"), CASES)
def test_metric(tmp_path, offline, keep_in_memory, kind, predictions, references, expected):
    metric = kind(cache_dir=str(tmp_path), keep_in_memory=keep_in_memory)
    assert metric.module_type == "metric"
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add(prediction=predictions[2], reference=references[2])
    assert metric.compute() == pytest.approx(expected)


def test_no_gold_answer_can_be_read(tmp_path):
    result = MathExactMatch(cache_dir=str(tmp_path)).compute(predictions=["1"], references=["..."])
    assert result["exact_match"] != result["exact_match"] and result["skipped"] == 1


def test_pass_at_k_by_counting():
    for n in range(1, 8):
        for c in range(n + 1):
            answers = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                assert pass_at_k(n, c, k) == pytest.approx(fmean(any(pick) for pick in combinations(answers, k)))
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 0), (3, 1, 4), (3, 4, 1), (3, -1, 1), (0, 0, 1)])
def test_pass_at_k_of_what_cannot_be(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased():
    """Averaged over draws of 6 answers, it is the chance of 3 new ones."""
    rng = random.Random(0)
    draws = [sum(rng.random() < 0.3 for _ in range(6)) for _ in range(20_000)]
    assert abs(fmean(pass_at_k(6, c, 3) for c in draws) - (1 - 0.7**3)) < 0.01


def test_pass_at_k_metric(tmp_path, offline):
    metric = PassAtK(cache_dir=str(tmp_path))
    metric.add_batch(predictions=[[1.0, 0.0, 0.5, 0.0], [0.0, 0.0]])
    metric.add(prediction=[1.0, 1.0, 1.0])
    assert metric.compute(k=(1, 2)) == pytest.approx({"pass@1": (0.25 + 0 + 1) / 3, "pass@2": (0.5 + 0 + 1) / 3})
    with pytest.raises(ValueError, match="from 1 to the number of answers, 2, got 3"):
        metric.compute(predictions=[[1.0, 0.0]], k=(3,))


def rows() -> tuple[list[str], list[str]]:
    """Seven puzzles, four of them solved."""
    puzzles = sudoku.generate(7, seed=1)
    return [row["solution"] if i % 2 == 0 else "" for i, row in enumerate(puzzles)], [row["puzzle"] for row in puzzles]


def one_process(process_id: int, cache_dir: str) -> dict[str, float] | None:
    """A share of the rows: four on process 0, three on process 1."""
    predictions, references = rows()
    metric = SudokuSolved(num_process=2, process_id=process_id, cache_dir=cache_dir, experiment_id="test")
    metric.add_batch(predictions=predictions[process_id::2], references=references[process_id::2])
    return metric.compute()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(tmp_path):
    found = run_pair(one_process, str(tmp_path))
    predictions, references = rows()
    alone = SudokuSolved(cache_dir=str(tmp_path)).compute(predictions=predictions, references=references)
    assert alone["solved"] == pytest.approx(4 / 7)
    assert found == [alone, None]
