"""Tasks that users write: a function of a file, which is called with what it names, and whose task is checked."""

from __future__ import annotations

import inspect

import pytest
from datasets import Dataset

from trl_diffusion.commands.results import measure, most_telling
from trl_diffusion.evaluation.benchmarks import benchmark_of
from trl_diffusion.tasks import TASKS, Task, check_task_name, load_task
from trl_diffusion.tasks.task import MEAN_REWARD, SOLVE_RATE, check_task


SOURCE = """
from datasets import Dataset
from trl_diffusion.tasks import Task

def length(completions, **kwargs):
    return [float(len(one)) for one in completions]

def solved(prompts, completions, n, **kwargs):
    return [float(a == "x" * b) for a, b in zip(completions, n)]

def make_task(train_size, seed=7):
    rows = Dataset.from_list([{"prompt": f"{seed}: {n}", "n": n} for n in range(train_size + 20)])
    return Task("letters", "rows", rows.select(range(20, train_size + 20)), rows.select(range(20)), [length], solved)

def without_checker():
    task = make_task(4)
    return Task("letters", "rows", task.train, task.evaluation, [length])

def broken(): raise KeyError("missing")
def nothing(): pass
def needs(model): pass
VALUE = 3
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "own.py").write_text(SOURCE)
    return tmp_path / "own.py"


def rows(*prompts):
    return Dataset.from_list([{"prompt": one} for one in prompts])


def test_a_task_of_a_file(path):
    task = load_task(f"{path}:make_task", train_size=6, eval_size=3, seed=2)
    assert task.train["prompt"] == [f"2: {n}" for n in range(20, 26)] and task.evaluation["n"] == [0, 1, 2]
    assert task.scores(["", "x", "x"]) == [1.0, 1.0, 0.0] and task.measured == SOLVE_RATE
    assert task.solve_rate(["", "x", "x"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="`letters` has no right answer to row 0"):
        task.documents(task.evaluation)


def test_a_task_without_a_checker(path):
    """The first reward is measured, and is called a reward."""
    task = load_task(f"{path}:without_checker", eval_size=2)
    assert task.measured == MEAN_REWARD and task.scores(["abc", "a"]) == [3.0, 1.0]


def test_rows_to_which_the_function_does_not_apply():
    """They do not count: neither as wrong nor as a reward of 0."""
    task = Task("t", "rows", rows("a"), rows("b", "c", "d"), [lambda completions, **_: [-3.0, None, -1.0]])
    assert task.scores(["", "", ""]) == [-3.0, None, -1.0] and task.solve_rate(["", "", ""]) == -2.0
    found = measure(task, lambda prompts: (["", "", ""], None))
    assert found.solve_rate == -2.0 and found.interval == pytest.approx((-2 - 1.959964, -2 + 1.959964))
    assert most_telling([0.0, None, 0.0], [0.5, 2.0, 0.75]) == 2
    benchmark = benchmark_of(task)
    assert benchmark.score(benchmark.read(), ["", "", ""], benchmark.check()) == [-3.0, None, -1.0]
    nothing = Task("t", "rows", rows("a"), rows("b"), [lambda completions, **_: [None]])
    with pytest.raises(ValueError, match="The mean reward of the task `t` cannot be measured"):
        measure(nothing, lambda prompts: ([""], None))


def test_a_task_of_a_module(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    assert load_task("own.make_task", train_size=2).name == "letters"


def test_embedded_tasks_are_written_in_the_same_way():
    for make in TASKS.values():
        assert list(inspect.signature(make).parameters) == [
            "train_file",
            "eval_file",
            "train_size",
            "eval_size",
            "seed",
        ]


def test_conversations_and_asynchronous_functions():
    """A checker sees completions in the form of the prompts, as reward functions do in training."""

    async def solved(prompts, completions, **kwargs):
        return [float(a[-1]["content"] == b[-1]["content"].upper()) for a, b in zip(completions, prompts, strict=True)]

    asked = [[{"role": "user", "content": one}] for one in "abc"]
    task = Task("case", "letters", rows(asked[0]), rows(*asked[1:]), [solved], solved)
    assert task.scores(["B", "B"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="returned 1 rewards for 2 completions"):
        Task("t", "u", rows("a"), rows("b", "c"), [lambda completions, **_: [1.0]]).scores(["", ""])
    with pytest.raises(ValueError, match="needs `completion_ids`, which a measurement does not have"):
        Task("t", "u", rows("a"), rows("b"), [lambda completion_ids, **_: [1.0]]).scores([""])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own.py:make_tusk", r"own.py has nothing that is called 'make_tusk'. Is it meant to be make_task\?"),
        ("own.py:", r"own.py has nothing that is called ''. It has \['broken'"),
        ("own.py", "names no function. Write .*own.py:FUNCTION"),
        ("absent.py:make_task", "There is no file .*absent.py for the task"),
        ("own.py:VALUE", "must be a function that returns a `Task`, got 3"),
        ("own.py:nothing", r"own.py: nothing\(\) must return a `trl_diffusion.tasks.Task`, got NoneType"),
        ("own.py:broken", r"own.py: broken\(\): KeyError: 'missing'"),
        ("own.py:needs", r"needs \['model'\], but gets only those of"),
        ("syntax.py:make_task", r"syntax.py cannot be run: SyntaxError: .*\(line 2\)"),
        ("name.py:make_task", r"name.py cannot be run: NameError: name 'undefined' is not defined \(line 3\)"),
        ("imports.py:make_task", r"imports.py cannot be run: ModuleNotFoundError: No module named 'no_such_package'"),
        ("exits.py:make_task", r"exits.py cannot be run: SystemExit: 3"),
    ],
)  # fmt: skip
def test_wrong_files(path, text, message):
    (path.parent / "syntax.py").write_text("\ndef f(:\n")
    (path.parent / "name.py").write_text("\n\nundefined\n")
    (path.parent / "imports.py").write_text("import no_such_package\n")
    (path.parent / "exits.py").write_text("raise SystemExit(3)\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        load_task(f"{path.parent}/{text}", eval_size=2)
    assert "\n" not in str(found.value)


def test_a_file_that_the_function_does_not_take(path):
    with pytest.raises(ValueError, match="does not take `train_file`. Give it this parameter"):
        load_task(f"{path}:make_task", train_file="rows.jsonl")


@pytest.mark.parametrize("name", ["no_such_module.make_task", "json.make_task", "os.path"])
def test_wrong_modules(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="There is no module|has nothing that is called|must be a function"):
        load_task(name)


@pytest.mark.parametrize("name", ["chess", "sudoko", "a:b", "own.txt:make", "", "../x", "gsm8k:3"])
def test_names_of_no_task(name):
    with pytest.raises(ValueError, match="Unknown task .*reasoning_gym:NAME, and FILE.py:FUNCTION"):
        check_task_name(name)


def reward(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": [{"prompt": "a"}]}, "`train` must be a `datasets.Dataset`, got list"),
        ({"train": rows()}, "`train` has no rows"),
        ({"evaluation": Dataset.from_list([{"question": "b"}])}, r"`evaluation` must have a column `prompt`; it has \['question'\]"),
        ({"evaluation": rows("b", None)}, "`evaluation`, row 1: a prompt must be text or a list of messages, got None"),
        ({"evaluation": rows([{"content": "b"}])}, "`evaluation`, row 0: a prompt must be text or"),
        ({"train": rows("a", "b", "b")}, "2 of the 3 training rows have the prompt of an evaluation row, such as 'b'"),
        ({"reward_funcs": []}, "`reward_funcs` must be a list of reward functions, got \\[\\]"),
        ({"reward_funcs": reward}, "`reward_funcs` must be a list"),
        ({"reward_funcs": [reward, "length"]}, r"`reward_funcs\[1\]` must be a function, got 'length'"),
        ({"solved": 1.0}, "`solved` must be a function, got 1.0"),
        ({"solution": "4"}, "`solution` must be a function, got '4'"),
        ({"name": None}, "`name` of the task must be text, got None"),
        ({"unit": " "}, "`unit` of the task must be text"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be(changes, message):
    given = {"name": "t", "unit": "rows", "train": rows("a"), "evaluation": rows("b"), "reward_funcs": [reward]}
    check_task(Task(**given), "own.py: make_task()")
    with pytest.raises(ValueError, match=f"own.py: .*{message}"):
        check_task(Task(**{**given, **changes}), "own.py: make_task()")
