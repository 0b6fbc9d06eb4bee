"""Runs over benchmarks: intervals, files that are whole or not there, code only where it is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.closeness import close_to
from tests.conftest import shared
from tests.rewards.world import PATIENT
from trl_diffusion import DecodingConfig
from trl_diffusion.evaluation import run as run_module
from trl_diffusion.evaluation.benchmarks import BENCHMARKS, human_eval_row, math_row, mbpp_row, without_numpy
from trl_diffusion.evaluation.generate import Usage, generate
from trl_diffusion.evaluation.run import (
    Evaluation,
    check_tasks,
    markdown,
    measure_local,
    summarise,
    wilson,
)
from trl_diffusion.rewards import math, sudoku
from trl_diffusion.rewards.code import check_code, code_reward
from trl_diffusion.tasks import load_task
from trl_diffusion.utils import write_text


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Easy puzzles, of which the embedded policy solves some, and questions it cannot answer."""
    puzzles = sudoku.generate(16, seed=3, blanks=6)
    (tmp_path / "data" / "sudoku").mkdir(parents=True)
    lines = [f"{row['puzzle']},{row['solution']}\n" for row in puzzles]
    (tmp_path / "data" / "sudoku" / "4x4_test.csv").write_text("Puzzle,Solution\n" + "".join(lines))
    (tmp_path / "data" / "gsm8k").mkdir()
    questions = [{"question": f"What is {n}?", "answer": f"#### {n}" if n else "..."} for n in range(3)]
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("right", "number", "expected"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson(right, number, expected):
    assert wilson(right / number, number) == close_to(expected)
    low, high = wilson(1 - right / number, number)
    assert (1 - high, 1 - low) == close_to(expected)


def test_wilson_covers():
    """An interval at 90 % holds the true share about nine times out of ten."""
    rng = np.random.default_rng(0)
    shares = rng.binomial(200, 0.3, 4000) / 200
    covered = [low <= 0.3 <= high for low, high in (wilson(share, 200, 0.9) for share in shares)]
    assert abs(np.mean(covered) - 0.9) < 0.02


def test_wilson_ends_at_no_and_at_every_right_answer():
    """A rounding error behind 0 or before 1 would be a bar of negative length in a picture."""
    for number in range(1, 600):
        low, high = wilson(0.0, number)
        assert low == 0 < high < 1
        low, high = wilson(1.0, number)
        assert 0 < low < high == 1


@pytest.mark.parametrize(("share", "number"), [(0.5, 0), (1.1, 4), (-0.1, 4)])
def test_wilson_of_what_cannot_be(share, number):
    with pytest.raises(ValueError, match="no interval"):
        wilson(share, number)


def test_seeds_do_not_narrow_the_interval():
    runs = [
        {"seed": seed, "questions": 50, "skipped": 1, "accuracy": accuracy}
        | {"answers": 50, "tokens": 100, "forwards": 50, "seconds": 4.0}
        for seed, accuracy in enumerate((0.4, 0.6))
    ]
    row = summarise("sudoku", runs)
    assert row["accuracy"] == pytest.approx(0.5) and row["interval"] == pytest.approx(wilson(0.5, 50))
    assert row["spread"] == pytest.approx(0.2 / 2**0.5)
    assert (row["tokens_per_answer"], row["tokens_per_forward"], row["tokens_per_second"]) == (2.0, 2.0, 25.0)


def test_what_is_left_in_the_directory(tiny, data_dir, tmp_path):
    evaluation = Evaluation(
        tiny, tmp_path / "out", data_dir, {"tokens_per_step": 2}, about={"model": "tiny"}, progress=False
    )
    results = evaluation.run(["sudoku", "gsm8k"])
    rows = BENCHMARKS["sudoku"].read(data_dir)
    answers, usage = generate(
        tiny, tiny.encode([row["prompt"] for row in rows]), DecodingConfig(17, tokens_per_step=2)
    )
    texts = tiny.decode(answers)
    right = [sudoku.is_solved(row["puzzle"], text) for row, text in zip(rows, texts, strict=True)]
    assert 0 < sum(right) < 16

    found, gsm8k = results["tasks"]
    assert found["accuracy"] == pytest.approx(sum(right) / 16)
    assert found["interval"] == pytest.approx(wilson(sum(right) / 16, 16))
    assert found["tokens_per_forward"] == pytest.approx(usage.tokens / usage.forwards)
    assert (gsm8k["questions"], gsm8k["skipped"]) == (2, 1)  # one gold answer cannot be read
    out = tmp_path / "out"
    samples = [json.loads(line) for line in (out / "sudoku_seed0_samples.jsonl").read_text().splitlines()]
    assert [sample["answer"] for sample in samples] == texts
    assert [sample["score"] for sample in samples] == right
    assert [sample["prompt"] for sample in samples] == [row["prompt"] for row in rows]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (out / "results.md").read_text()
    assert f"| sudoku | 16 | 1 | {100 * sum(right) / 16:.1f} % |" in table and "- model: tiny" in table
    assert not list(out.glob(".unfinished*"))


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json"])
def test_the_results_of_a_training_are_kept(tiny, data_dir, tmp_path, name):
    """`results.json` beside a policy is what `train` has left there."""
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{tmp_path} holds a.*that of the training. Choose another `output_dir`"):
        Evaluation(tiny, tmp_path, data_dir, progress=False).run(["sudoku"])
    assert not (tmp_path / "results.json").exists()


def test_seeds_and_temperature(tiny, data_dir, tmp_path, caplog):
    hot = Evaluation(tiny, tmp_path / "hot", data_dir, {"temperature": 1.0}, [0, 1], limit=6, progress=False)
    (row,) = hot.run(["sudoku"])["tasks"]
    first, second = (
        [json.loads(line)["answer"] for line in (tmp_path / "hot" / f"sudoku_seed{seed}_samples.jsonl").open()]
        for seed in (0, 1)
    )
    assert first != second and len(first) == 6 and row["seeds"] == [0, 1] and row["spread"] is not None
    cold = Evaluation(tiny, tmp_path / "cold", data_dir, {}, [0, 1], limit=6, progress=False)
    assert cold.run(["sudoku"])["tasks"][0]["seeds"] == [0]
    assert "only the first is measured" in caplog.text


def test_an_interrupted_run_goes_on(tiny, data_dir, tmp_path, monkeypatch):
    """What was measured is kept; what was being measured or written leaves nothing that counts."""
    options = {"data_dir": data_dir, "limit": 2, "progress": False}
    measured = []

    def measure(policy, benchmark, *args, **kwargs):
        measured.append(benchmark.name)
        if benchmark.name == "gsm8k" and len(measured) < 3:
            raise KeyboardInterrupt
        return measure_local(policy, benchmark, *args, **kwargs)

    monkeypatch.setattr(run_module, "measure_local", measure)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(tiny, tmp_path / "out", **options).run(["sudoku", "gsm8k"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "sudoku_seed0.json",
        "sudoku_seed0_samples.jsonl",
    ]
    before = (tmp_path / "out" / "sudoku_seed0.json").read_bytes()
    results = Evaluation(tiny, tmp_path / "out", **options).run(["sudoku", "gsm8k"])
    assert measured == ["sudoku", "gsm8k", "gsm8k"]
    assert (tmp_path / "out" / "sudoku_seed0.json").read_bytes() == before
    assert [row["task"] for row in results["tasks"]] == ["sudoku", "gsm8k"]


@pytest.mark.parametrize("change", ["decoding", "data", "limit", "policy"])
def test_measurements_are_not_mixed(tiny, llada, data_dir, tmp_path, change):
    Evaluation(tiny, tmp_path / "out", data_dir, limit=2, progress=False).run(["sudoku"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    if change == "data":
        file = data_dir / "sudoku" / "4x4_test.csv"
        file.write_text(file.read_text() + "3102200002100320,3142243142131324\n")
    changed = Evaluation(
        llada if change == "policy" else tiny,
        tmp_path / "out",
        data_dir,
        {"tokens_per_step": 4} if change == "decoding" else {},
        limit=3 if change == "limit" else 2,
        progress=False,
    )
    with pytest.raises(ValueError, match=rf"(?s)sudoku_seed0.json holds .*{change}: .* there, .* now"):
        changed.run(["sudoku"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_code_runs_only_if_allowed(tiny, tmp_path, monkeypatch):
    (tmp_path / "humaneval").mkdir()
    row = {"prompt": "def f():\n    return 1\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"}
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="humaneval runs programs .* --allow_code_execution"):
        Evaluation(tiny, tmp_path / "out", tmp_path).run(["humaneval"])
    for task in ("humaneval_plus", "mbpp_plus", "humaneval"):
        with pytest.raises(ValueError, match="--allow_code_execution"):
            check_tasks([task])
    assert not (tmp_path / "out").exists()
    decoding = {"max_new_tokens": 8}
    allowed = Evaluation(tiny, tmp_path / "out", tmp_path, decoding, allow_code_execution=True, progress=False)
    assert allowed.run(["humaneval"])["tasks"][0]["questions"] == 1


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "No task was given; there are .*'gsm8k'"),
        (["chess"], "Unknown task 'chess'; there are"),
    ],
)
def test_tasks_that_cannot_be(tasks, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(tasks)


def test_puzzles_and_games_of_the_package(tiny, data_dir, tmp_path, caplog):
    """Without a file, those on which `train` measures; a file goes before them, and a directory without one is said."""
    for name in ("sudoku", "countdown"):
        task = load_task(name, train_size=1)
        assert BENCHMARKS[name].read() == task.evaluation.to_list() and len(task.evaluation) == 500
    assert len(BENCHMARKS["sudoku"].read(data_dir)) == 16
    results = Evaluation(tiny, tmp_path / "out", limit=2, progress=False).run(["sudoku", "countdown"])
    assert [row["questions"] for row in results["tasks"]] == [2, 2] and not caplog.records
    assert json.loads((tmp_path / "out" / "sudoku_seed0.json").read_text())["settings"]["data"] == "package"
    check_tasks(["sudoku", "countdown"], data_dir)
    assert [record.getMessage() for record in caplog.records] == [
        f"{data_dir} has no countdown/cd3_test.jsonl: the questions of countdown are those of the package."
    ]
    with pytest.raises(ValueError, match="There is no directory nowhere"):
        check_tasks(["sudoku"], "nowhere")
    pytest.importorskip("lm_eval")
    from trl_diffusion.evaluation import harness_tasks

    assert harness_tasks.sudoku()["test"].to_list() == BENCHMARKS["sudoku"].read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"limit": 0}, "limit"),
        ({"decoding": {"a": 1}}, "Unknown"),
    ],
)
def test_options_that_cannot_be(tiny, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(tiny, tmp_path, **options)


def test_a_policy_with_a_chat_template_is_asked_in_a_conversation(tiny):
    import copy

    from trl_diffusion.policies.policy import Policy

    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    chatty = Policy(tiny.model, tokenizer, tiny.spec)
    rows = [{"prompt": "1+1", "answer": "#### 2"}]
    (sample,) = measure_local(chatty, BENCHMARKS["gsm8k"], rows, {"max_new_tokens": 8}).samples
    assert sample["prompt"] == [{"role": "user", "content": "1+1"}]
    text, _ = generate(tiny, tiny.encode(["[1+1]>"]), DecodingConfig(8))
    assert sample["answer"] == tiny.decode(text)[0]
    # Puzzles are asked as the policy was trained on them.
    rows = [{"prompt": "sudoku 3102200002100320", "puzzle": "3102200002100320"}]
    (sample,) = measure_local(chatty, BENCHMARKS["sudoku"], rows).samples
    assert sample["prompt"] == "sudoku 3102200002100320"


# ------------------------------------------------------------------------------------------- problems from the hub

EVALPLUS = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        np.allclose(out, exp, rtol=1e-07, atol=atol) or (_ for _ in ()).throw(AssertionError())
    else:
        assert out == exp

def check(candidate):
    for args, exp in [([4.0], 2.0), ([2.0], 1.4142135)]:
        assertion(candidate(*args), exp, 0)
"""


def test_tests_in_the_manner_of_evalplus():
    """They use numpy, which is not in the sandbox."""
    row = human_eval_row({"prompt": "def root(x):\n", "test": EVALPLUS, "entry_point": "root"})
    code = code_reward(allow_execution=True, limits=PATIENT)
    for body, expected in (("    return x ** 0.5\n", 1.0), ("    return x / 2\n", 0.0)):
        assert code(["def root(x):\n"], [body], test=[row["test"]], entry_point=["root"]) == [expected]
    verdict = check_code("    return x ** 0.5\n", EVALPLUS, "def root(x):\n", "root", PATIENT)
    assert not verdict.passed and "numpy" in verdict.reason  # without what stands in


def test_what_stands_in_for_numpy():
    scope: dict = {}
    exec(without_numpy("import numpy as np\n"), scope)
    ours, inf, nan = scope["np"].allclose, float("inf"), float("nan")
    values = [0.0, 1.0, 1.0 + 1e-9, 1.1, -1.0, 1e9, inf, -inf, nan, 3, True]
    with np.errstate(invalid="ignore"):
        for a in values:
            for b in values:
                assert ours(a, b) == np.allclose(a, b), (a, b)
                assert ours([a, 2.0], (b, 2.0), rtol=1e-7, atol=0.2) == np.allclose([a, 2.0], (b, 2.0), 1e-7, 0.2)
    assert ours([1.0, 1.0], 1.0) and ours([[1.0], [2.0]], [[1.0], [2.0]]) and not ours([1.0], [1.0, 1.0])


def test_rows_of_mbpp():
    """MBPP+ has its own tests beside the three of MBPP."""
    row = {"prompt": "Write f.", "test_list": ["assert f(1) == 2"], "test_imports": ["import math"]}
    code = code_reward(allow_execution=True, limits=PATIENT)
    answers = ["```python\ndef f(x):\n    return x + 1\n```", "```python\ndef f(x):\n    return 2\n```"]
    for extra, expected in ((None, [1.0, 1.0]), ("assert f(5) == 6", [1.0, 0.0])):
        problem = mbpp_row({**row, **({"test": extra} if extra else {})})
        assert "assert f(1) == 2" in problem["chat_prompt"]
        columns = {name: [problem[name]] * 2 for name in ("test_list", "test_imports")}
        assert code([problem["chat_prompt"]] * 2, answers, **columns) == expected


def test_rows_of_math():
    rows = [
        math_row({"problem": "?", "answer": r"\frac{3}{4}", "solution": "..."}),
        math_row({"problem": "?", "solution": r"So $3+9=\boxed{12}$."}),
    ]
    gold = [row["answer"] for row in rows]
    assert math.math_accuracy([r"It is \boxed{0.75}.", r"\boxed{12}"], gold) == [1.0, 1.0]
    assert math.math_accuracy([r"It is \boxed{0.7}.", r"\boxed{3}"], gold) == [0.0, 0.0]


def test_local_data_is_the_whole_benchmark():
    data = shared("data")
    sizes = {"gsm8k": 1319, "humaneval": 164, "countdown": 256, "sudoku": 500}
    assert {name: len(benchmark.read(data)) for name, benchmark in BENCHMARKS.items()} == sizes


@pytest.mark.parametrize(
    ("test", "message"), [("", r"\['test'\] is missing"), ("def check(f):\n    assert f() ==", "not valid Python")]
)
def test_a_problem_without_tests_is_named(tmp_path, test, message):
    path = tmp_path / "HumanEval.jsonl"
    path.write_text(json.dumps({"prompt": "def f():", "entry_point": "f", "test": test}) + "\n")
    with pytest.raises(ValueError, match=f"HumanEval.jsonl, row 0: .*{message}"):
        BENCHMARKS["humaneval"].rows(str(path))


def test_a_table_without_figures():
    run = {"seed": 0, "questions": 0, "skipped": 2, "accuracy": None}
    row = summarise("gsm8k", [run | vars(Usage())])
    assert "| gsm8k | 0 | 1 |  |  |  |  |  |  |" in markdown(
        {"tasks": [row], "policy": {}, "decoding": {}, "device": "cpu", "processes": 1, "batch_size": 1}
    )
