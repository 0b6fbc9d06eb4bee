"""The queue: order, resuming, and what it refuses."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.processes import HANGS
from trl_diffusion.commands import compare
from trl_diffusion.experiments import queue
from trl_diffusion.experiments.answers import scores_of
from trl_diffusion.experiments.arms import ARMS
from trl_diffusion.experiments.comparison import CHOOSE, PRETRAIN, REINFORCE, Comparison, Job
from trl_diffusion.experiments.queue import row_path, run
from trl_diffusion.experiments.twins import Material
from trl_diffusion.trainer.checkpoints import only_training_in


@pytest.fixture
def comparison(sizes) -> Comparison:
    return Comparison(tasks=("chain",), arms=("autoregressive", "full"), seeds=(0,), variants={"": sizes})


def test_every_run_comes_after_those_that_it_needs(sizes):
    sizes = replace(sizes, learning_rates=(1e-3, 1e-4))
    comparison = Comparison(tasks=("chain", "game_tree"), seeds=(0, 1), variants={"": sizes})
    ordered = comparison.jobs()
    for number, job in enumerate(ordered):
        assert all(ordered.index(needed) < number for needed in comparison.needs(job))
    kinds = [job.kind for job in ordered]
    twins, arms = len({arm.twin for arm in ARMS.values()}), len(ARMS)
    assert kinds.count(REINFORCE) == 2 * 2 * arms
    assert kinds.count(PRETRAIN) == 2 * 3 * twins  # two seeds, and the one that chooses
    assert kinds.count(CHOOSE) == 2 * arms * 2
    assert len({job.name for job in ordered}) == len(ordered)
    last_of_first_seed = max(n for n, job in enumerate(ordered) if job.kind == REINFORCE and job.seed == 0)
    assert all(job.seed != 1 for job in ordered[:last_of_first_seed])


def test_no_learning_rate_is_tried_if_there_is_one(comparison):
    assert [job.kind for job in comparison.jobs()] == [PRETRAIN, REINFORCE, PRETRAIN, REINFORCE]


def test_the_learning_rate_that_solved_most_is_chosen(comparison, tmp_path):
    comparison = replace(
        comparison, variants={"": replace(comparison.variants[""], learning_rates=(1e-2, 1e-3, 1e-4))}
    )
    for rate, solved in ((1e-2, 0.2), (1e-3, 0.6), (1e-4, 0.4)):
        path = row_path(Job(CHOOSE, "", "chain", "full", 1000, rate), tmp_path)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"validation": solved}))
    assert comparison.learning_rate(Job(REINFORCE, "", "chain", "full", 0), tmp_path) == 1e-3


@pytest.mark.parametrize(
    "change, said",
    [
        ({"arms": ("full", "diffusion")}, "arms"),
        ({"arms": ("full", "full")}, "different values"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1000,)}, "chooses learning rates"),
        ({"seeds": (-1,)}, "at least 0"),
    ],
)
def test_a_comparison_that_cannot_be(comparison, change, said):
    with pytest.raises(ValueError, match=said):
        replace(comparison, **change)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"batch_size": 10}, "multiple of `num_generations`"),
        ({"learning_rates": ()}, "learning_rates"),
        ({"learning_rates": (0.0,)}, "positive"),
        ({"hidden_size": 20}, "multiple of 8"),
        ({"updates": 0}, "updates"),
        ({"seconds": float("nan")}, "seconds"),
        ({"equal": "time"}, "equal"),
    ],
)
def test_sizes_that_cannot_be(sizes, change, said):
    with pytest.raises(ValueError, match=said):
        replace(sizes, **change)


@pytest.mark.parametrize(
    "task, said",
    [("gsm8k", "--train_file"), ("nothing", "Unknown task 'nothing'")],
)
def test_a_task_that_cannot_be_compared_is_one_line(task, said, tmp_path, capfd):
    assert compare.main(["--quick", "--tasks", "chain", task, "--output_dir", str(tmp_path), "--workers", "1"]) == 2
    error = capfd.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and said in error
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_done_is_never_repeated(comparison, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(queue, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(
        queue, "_do", lambda _, job, directory: (row_path(job, directory).write_text("{}"), done.append(job))[1]
    )
    run(comparison, tmp_path, 1, lambda line: None)
    assert done == comparison.jobs()
    more = replace(comparison, seeds=(0, 1))
    row_path(comparison.jobs()[-1], tmp_path).unlink()
    done.clear()
    run(more, tmp_path, 1, lambda line: None)
    assert done == more.jobs()[3:]
    other = replace(comparison, variants={"": replace(comparison.variants[""], updates=9)})
    with pytest.raises(ValueError, match=r"another plan: `updates` was 2 and is 9.*output_dir"):
        run(other, tmp_path, 1)


def test_a_run_that_fails_stops_no_other(comparison, tmp_path, monkeypatch):
    """All runs that do not need it are done, and the error names it."""
    monkeypatch.setattr(queue, "ProcessPoolExecutor", Here)

    def do(_, job, directory):
        if job.what == "full" and job.kind == PRETRAIN:
            raise FloatingPointError("the loss is NaN")
        row_path(job, directory).write_text("{}")
        return "done"

    monkeypatch.setattr(queue, "_do", do)
    with pytest.raises(
        ValueError, match=r"2 of 4 runs failed.*pretrain_chain_full_0: failed: FloatingPointError: the loss is NaN"
    ):
        run(comparison, tmp_path, 1, lambda line: None)
    assert sorted(path.stem for path in (tmp_path / "rows").iterdir()) == [
        "pretrain_chain_autoregressive_0",
        "reinforce_chain_autoregressive_0",
    ]


def test_rows_from_elsewhere_are_refused(comparison, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"name": "x", "plan": "other"}\n')
    with pytest.raises(ValueError, match=r"rows of a study, but no study.json"):
        run(comparison, tmp_path, 1)
    (tmp_path / "study.json").write_text(json.dumps({"plan": comparison.plan()}))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: the row of a study with another plan \(other"):
        run(comparison, tmp_path, 1)


def test_one_command_at_a_time(comparison, tmp_path):
    with only_training_in(tmp_path), pytest.raises(ValueError, match="Another training is going on"):
        run(comparison, tmp_path, 1)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--study", "scaling", "--hidden_size", "128"], "no --hidden_size"),
        (["--study", "scaling", "--learning_rates", "1e-3", "1e-4"], "Give one"),
        (["--study", "updates", "--tasks", "chain"], "no --tasks"),
        (["--study", "updates", "--seeds", "0", "0"], "different"),
        (["--rows", "rows.jsonl", "--seeds", "0"], "leave --seeds out"),
    ],
)
def test_options_without_a_meaning_are_refused(words, said, tmp_path, capfd):
    assert compare.main([*words, "--output_dir", str(tmp_path)]) == 2
    assert said in capfd.readouterr().err


def test_prompts_of_one_message_are_asked_as_text(sizes):
    task = Material("word_sums", 0, replace(sizes, corpus_size=20)).whole
    assert all(isinstance(prompt, str) for prompt in (*task.train["prompt"], *task.evaluation["prompt"]))
    Comparison(tasks=("word_sums",)).check()
    row = task.train[0]
    rates = scores_of(task, task.train.select([0, 0]), [task.solution(row), "?"])
    assert rates == [1.0, 0.0]


class Here:
    """A pool of processes that does everything at once in this one."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *arguments):
        future = queue.Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    path = Path(f"/proc/{pid}/stat")
    return path.is_file() and path.read_text().rpartition(")")[2].split()[0] not in "ZX"


def check_rows(rows):
    """What the rows of the arms `autoregressive` and `full` must hold."""
    assert {row["what"] for row in rows} == {"autoregressive", "full"}
    for row in rows:
        for points in (row["before"], row["updates"]["points"], row["seconds"]["points"]):
            assert all(0 <= point["solved"] <= 1 and 0 < point["passes"] <= 8 for point in points)
            assert {point["temperature"] for point in points} == {0.0, 1.0}
        assert row["updates"]["updates"] == 2 and len(row["rewards"]) == len(row["seconds_after"]) >= 2
        assert set(row["pass_at_k"]) == {"1", "2"}
        assert ("revision_at_test" in row) == (row["what"] == "full")
        for point in row["before"]:
            if "steps_per_block" in point["settings"]:
                assert point["passes"] <= point["settings"]["steps_per_block"]
            assert ("validation" in point) == ("threshold" in point["settings"])


def test_a_whole_comparison(comparison, tmp_path, monkeypatch):
    """From pretraining to the report, in this process."""
    monkeypatch.setattr(queue, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(compare, "QUICK", comparison)
    assert compare.main(["--quick", "--output_dir", str(tmp_path), "--workers", "1", "--json"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    check_rows([row for row in rows if row["kind"] == "reinforce"])
    text = (tmp_path / "report.md").read_text()
    assert "| autoregressive | " in text and "| full, revising only when measured |" in text
    shutil.rmtree(tmp_path / "rows")  # the file of all rows is enough to go on
    assert compare.main(["--quick", "--output_dir", str(tmp_path), "--workers", "1"]) == 0
    assert len(list((tmp_path / "rows").iterdir())) == 4
    again = tmp_path / "again"
    assert compare.main(["--rows", str(tmp_path / "rows.jsonl"), "--output_dir", str(again)]) == 0
    assert (again / "report.md").read_text() == text


def wait_until(happened):
    end = time.monotonic() + HANGS
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError("it hangs")
        time.sleep(0.1)


@pytest.mark.long
def test_the_command_is_killed_and_goes_on(tmp_path):
    """In processes of its own: killed after the first row, then run to its end. No row is made twice."""
    script = tmp_path / "command.py"
    script.write_text(_COMMAND)
    words = [sys.executable, str(script), str(tmp_path / "out")]
    first = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: list((tmp_path / "out").glob("rows/*.json")) or first.poll() is not None)
    assert first.poll() is None
    workers = children_of(first.pid)
    first.kill()  # it alone: its workers end by themselves
    first.wait()
    assert workers
    wait_until(lambda: not any(map(runs, workers)))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("rows/*.json")}
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("rows/*.json")}
    assert len(after) == 4 and kept.items() <= after.items()
    check_rows([json.loads(path.read_text()) for path in (tmp_path / "out").glob("rows/reinforce*.json")])
    assert "| autoregressive |" in (tmp_path / "out" / "report.md").read_text()


_COMMAND = """
import sys
from dataclasses import replace
from pathlib import Path
from trl_diffusion.commands import compare
from trl_diffusion.experiments.comparison import Comparison
from trl_diffusion.experiments.settings import Sizes

compare.QUICK = Comparison(
    tasks=("chain",), arms=("autoregressive", "full"), seeds=(0,),
    variants={"": Sizes(hidden_size=16, num_layers=2, corpus_size=48, pretrain_updates=5, pretrain_batch_size=16, updates=2, batch_size=8,
                num_generations=4, seconds=0.01, learning_rates=(1e-3,), eval_size=6, validation_size=4, num_samples=2)},
)
if __name__ == "__main__":
    sys.exit(compare.main(["--quick", "--output_dir", sys.argv[1], "--workers", "1"]))
"""
