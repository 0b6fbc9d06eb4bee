"""Tasks of reasoning-gym: right answers are right, held-out questions are not trained on, and no answer breaks a verifier."""

from __future__ import annotations

import pickle
import random
import sys

import numpy as np
import pytest

from trl_diffusion.rewards.gym import GymLimits, GymReward, GymScorer, runs_answers
from trl_diffusion.tasks import gym, load_task


HOSTILE = [
    "", "\x00", "(" * 500, "[" * 500 + "]" * 500, "9**9**9**9", "9" * 100_000, "exit()", "[0] * 10**11", "None", "nan", "\ud800",
    "__import__('os').kill(__import__('os').getppid(), 9)", "(lambda f: f(f))(lambda f: f(f))", "1/0",
]  # fmt: skip


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("trl_diffusion.rewards.gym.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"which is missing: pip install 'trl-diffusion\[tasks\]'"):
        load_task("reasoning_gym:mini_sudoku")


@pytest.fixture
def reasoning_gym():
    return pytest.importorskip("reasoning_gym", reason="needs the extra `tasks`")


def test_mini_sudoku(reasoning_gym):
    """Solutions are right, by the rules of sudoku, and fill in what was given. Half of one is not right."""
    task = load_task("reasoning_gym:mini_sudoku+min_empty:8+max_empty:10", train_size=40, eval_size=10, seed=3)
    assert (len(task.train), len(task.evaluation)) == (40, 10)
    assert not set(task.train["question"]) & set(task.evaluation["question"])
    right = [task.solution(row) for row in task.evaluation]
    for row, answer in zip(task.evaluation, right, strict=True):
        grid = [line.split() for line in answer.splitlines()]
        boxes = [[grid[a + i][b + j] for i in (0, 1) for j in (0, 1)] for a in (0, 2) for b in (0, 2)]
        for unit in (*grid, *zip(*grid, strict=True), *boxes):
            assert sorted(unit) == ["1", "2", "3", "4"]
        assert 8 <= row["question"].count("_") <= 10
        assert row["prompt"] == [{"role": "user", "content": row["question"]}]
    assert task.scores([f"\n {one}\n" for one in right]) == [1.0] * 10
    assert task.scores(["The answer is 4.", *right[:-1]]) == [0.0] * 10
    question = [task.evaluation[0]["question"]] * len(HOSTILE)
    assert not runs_answers("mini_sudoku") and task.reward_funcs[0](HOSTILE, question) == [0.0] * len(HOSTILE)
    assert task.documents(task.evaluation)[0]["completion"] == [{"role": "assistant", "content": right[0]}]


# list_functions uses the random state of Python, in a module that it imports late; pool_matrix seeds that of NumPy.
@pytest.mark.parametrize("name", ["chain_sum", "list_functions", "pool_matrix"])
def test_the_seed_is_that_of_training(reasoning_gym, monkeypatch, name):
    late = "reasoning_gym.induction.list_functions.generators"
    monkeypatch.delitem(sys.modules, late, raising=False)
    monkeypatch.delattr("reasoning_gym.induction.list_functions.generators", raising=False)
    state, of_numpy = random.getstate(), np.random.get_state()[1].tolist()
    one, same, other = (
        load_task(f"reasoning_gym:{name}", train_size=30, eval_size=5, seed=seed) for seed in (1, 1, 2)
    )
    assert one.train["question"] == same.train["question"] != other.train["question"]
    assert one.evaluation["question"] == other.evaluation["question"]
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == of_numpy


def test_a_verifier_that_runs_answers(reasoning_gym, tmp_path):
    """No answer is right but the right one, none ends the process of another, and none writes a file."""
    assert runs_answers("countdown")
    path = tmp_path / "written"
    answers = [*HOSTILE, f"open({str(path)!r}, 'w').write('x')"]
    entry = reasoning_gym.create_dataset("countdown", seed=0, size=1)[0]
    scorer = GymScorer("countdown", limits=GymLimits(cpu_time=0.5))
    reward = pickle.loads(pickle.dumps(GymReward(scorer, {entry["question"]: entry})))
    messages = [{"role": "assistant", "content": entry["answer"]}]
    asked = [*[entry["question"]] * (len(answers) + 1), "another?", None]
    *scores, right, other, none = reward([*answers, messages, "1", "1"], asked)
    assert reward.__name__ == "countdown_score"
    assert right == 1.0 and other is none is None and all(0 <= score < 0.5 for score in scores), scores
    assert not path.exists()


def test_evaluation_questions_are_dropped(reasoning_gym):
    """A generator of few questions gives some of them for training and for evaluation, with any seeds."""
    few = "reasoning_gym:coin_flip+min_trials:3+max_trials:6"
    task = load_task(few, train_size=500, eval_size=10)
    assert len(task.train) >= gym._FEWEST and len(task.evaluation) == 10
    assert len(set(task.train["question"])) == len(task.train)
    measured = load_task(few, train_size=16, eval_size=500, seed=1).evaluation["question"]
    assert len(measured) > 10 and not set(task.train["question"]) & set(measured)
    with pytest.raises(ValueError, match=r"makes too few different questions: \d+ are kept .*, and \d+ are left"):
        load_task("reasoning_gym:coin_flip+min_trials:3+max_trials:3", train_size=500, eval_size=5)


def test_no_question_that_may_be_measured_is_trained(reasoning_gym):
    """However many are measured while training, and however many `evaluate` measures later."""
    name = "reasoning_gym:chain_sum+min_terms:2+max_terms:2+min_digits:1+max_digits:2"
    trained = load_task(name, train_size=2000, eval_size=5)
    measured = load_task(name, train_size=16, eval_size=500, seed=1).evaluation["question"]
    assert len(measured) == 500 and not set(trained.train["question"]) & set(measured)
    assert trained.evaluation["question"][:] == measured[:5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minisudoku", "has no generator 'minisudoku'.*Is it meant to be mini_sudoku"),
        ("sudok", "Is it meant to be .*sudoku"),
        ("", "has no generator ''.*There are ab, acre"),
        ("composite", "has no generator 'composite'"),
        ("gcd+", r"there is no option after the last `\+`"),
        ("gcd+max_numbers", "must be like name:value"),
        ("gcd+max_number:3", r"gcd has no option 'max_number'.*Is it meant to be max_numbers\?"),
        ("gcd+max_numbers:many", "`max_numbers` must be of type int, as 2 is, got 'many'"),
        ("gcd+max_numbers:2+max_numbers:3", "given twice|already"),
        ("gcd+seed:3", "`seed` follows from `--seed`"),
        ("gcd+min_numbers:9", "gcd.min_numbers:9: "),
        ("chain_sum+allow_negation:3", "must be of type bool"),
    ],
)  # fmt: skip
def test_wrong_names_and_options(reasoning_gym, text, message):
    with pytest.raises(ValueError, match=message) as found:
        load_task(f"reasoning_gym:{text}", train_size=20, eval_size=5)
    assert "\n" not in str(found.value)


def test_files_are_refused(reasoning_gym):
    with pytest.raises(ValueError, match="makes its own questions: leave `--train_file` out"):
        load_task("reasoning_gym:gcd", train_file="rows.jsonl")


def test_generators_whose_questions_depend_on_hashes(reasoning_gym, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="set the environment variable PYTHONHASHSEED to 0"):
        load_task("reasoning_gym:ransom_note", train_size=20, eval_size=2)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(load_task("reasoning_gym:ransom_note", train_size=20, eval_size=2).train) == 20
