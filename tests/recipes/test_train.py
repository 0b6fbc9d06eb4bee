"""`trl-diffusion train` as a user runs it, on small settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from trl import ModelConfig

from tests.conftest import shared
from tests.processes import HANGS
from trl_diffusion import DTRPOConfig, tiny_policy_path
from trl_diffusion.commands import train
from trl_diffusion.tasks import load_task
from trl_diffusion.viz.runs import Run, read_run


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def train_here(tmp_path, monkeypatch, capsys):
    """The command in this process, which has imported what a new one would have to import."""

    def start(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setattr(train, "use_all_cores", lambda: None)
        train.main()
        start.printed = capsys.readouterr().out.strip()
        return start.printed.splitlines()[-1]

    return start


SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--train_size", "64", "--eval_size", "20"]


@pytest.mark.slow
def test_sudoku_end_to_end(tmp_path, train_here):
    """The command line starts accelerate, which starts the recipe. `tests/distributed/test_recipes.py` starts accelerate itself."""
    result = subprocess.run(
        [sys.executable, "-m", "trl_diffusion", "train", "--num_processes", "1", "--config", "tiny_sudoku", *SMALL],
        cwd=tmp_path, capture_output=True, text=True, timeout=HANGS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.strip().splitlines()
    assert lines[-1].startswith("solve rate ") and lines[-1].endswith("(20 puzzles, seed 0)")
    out = tmp_path / "outputs" / "tiny_sudoku"
    results = json.loads((out / "results.json").read_text())
    assert lines[-1].split()[2] == f"{results['solve_rate_before']:.1%}"
    assert (out / "run.png").stat().st_size > 5000 and (out / "denoising.png").stat().st_size > 5000
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    assert "2603.18806" in (out / "README.md").read_text()
    assert not read_run(out).stored and read_run(out).results == results
    # What was saved is a policy, which goes on with the options of the recipe.
    again = train_here("--model_name_or_path", "outputs/tiny_sudoku", "--max_steps", "1")
    assert again.startswith(f"solve rate {results['solve_rate_after']:.1%}")
    assert "as outputs/tiny_sudoku was trained (outputs/tiny_sudoku/train.yaml)" in train_here.printed
    assert (out / "model.safetensors").read_bytes() != (
        tmp_path / "outputs" / "tiny_sudoku_continued" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_lora_and_a_file_of_puzzles(tmp_path, train_here):
    (tmp_path / "mine.csv").write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n")
    lora = ("--use_peft", "--lora_target_modules", "all-linear", "--output_dir", "outputs/lora")
    last = train_here(*SMALL, *lora, "--eval_file", "mine.csv")
    assert last.endswith("(1 puzzles, seed 0)")
    first = load_file(tmp_path / "outputs" / "lora" / "adapter_model.safetensors")
    # The adapter is trained further, and is not put on another one.
    assert train_here("--model_name_or_path", "outputs/lora").endswith("(1 puzzles, seed 0)")
    second = load_file(tmp_path / "outputs" / "lora_continued" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    apart = {name: (second[name] - first[name]).abs().max().item() for name in first}
    assert 0 < max(apart.values()) < 0.02  # two steps; another adapter would have other random numbers in `lora_A`


@pytest.mark.slow
def test_gsm8k_with_the_real_tokenizer(tmp_path, train_here):
    """Real questions, the real tokenizer, a random policy: finite loss and every usual metric, at every step."""
    train_here(
        "--config", str(ROOT / "recipes" / "gsm8k_random.yaml"),
        "--train_file", str(shared("data", "gsm8k", "train.jsonl")),
        "--tokenizer_name_or_path", str(shared("fixtures", "fast_dllm_v2", "tokenizer")),
        "--max_steps", "2", "--max_completion_length", "8", "--eval_size", "1", "--per_device_train_batch_size", "4",
    )  # fmt: skip
    state = json.loads((tmp_path / "outputs" / "gsm8k_random" / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert abs(entry["loss"]) < 1e6
        for name in ("math_accuracy", "answer_format"):
            assert f"rewards/{name}/mean" in entry
        for name in ("kl", "entropy", "completions/mean_length", "diffusion/recorded_gap/max", "num_tokens"):
            assert entry[name] is not None
        assert entry["diffusion/recorded_gap/max"] < 1e-3 or entry["step"] > 1


@pytest.mark.slow
def test_gsm8k_preferences_with_the_real_tokenizer(tmp_path, train_here):
    """
    A file of pairs, the real tokenizer, a random policy built like Fast-dLLM v2, the pairwise loss. The pairs are messages; the other
    forms are those of `tests/offline/test_preferences.py`.
    """
    source, environment = str(shared("data", "gsm8k", "train.jsonl")), {**os.environ, "PYTHONPATH": str(ROOT)}
    pairs = [sys.executable, str(ROOT / "recipes" / "gsm8k_preferences.py"), source, "pairs.jsonl", "--size", "12"]
    subprocess.run(pairs, cwd=tmp_path, env=environment, check=True, timeout=HANGS)
    last = train_here(
        "--config", str(ROOT / "recipes" / "gsm8k_preferences.yaml"),
        "--train_file", "pairs.jsonl",
        "--tokenizer_name_or_path", str(shared("fixtures", "fast_dllm_v2", "tokenizer")),
        "--max_steps", "2", "--eval_size", "2", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2",
    )  # fmt: skip
    out = tmp_path / "outputs" / "gsm8k_preferences"
    results = json.loads((out / "results.json").read_text())
    assert last.startswith(f"loss {results['loss_before']:.4f} -> ")
    assert results["rows"] == 2 and results["loss_before"] == pytest.approx(0.6931, rel=1e-3)
    assert json.loads((out / "config.json").read_text())["model_type"] == "Fast_dLLM_Qwen"
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2 and losses[0] == pytest.approx(0.6931, rel=1e-3) and abs(losses[1]) < 100
    assert Run("", state["log_history"]).stored and (out / "run.png").exists() and not (out / "denoising.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no_such_option", "1"], "not used by the HfArgumentParser: ['--no_such_option'"),
        (["--max_steps", "two"], "invalid int value: 'two'"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--eval_size", "-1"], "`eval_size` must be a whole number of at least 1, got -1."),
        (
            ["--train_size", "3", "--per_device_train_batch_size", "64"],
            "train_dataset has 3 rows, but a rollout takes",
        ),
        (["--max_steps", "0"], "`max_steps=0` trains nothing"),
        (["--num_iterations", "0"], "`num_iterations` must be a whole number of at least 1, got 0"),
        (["--trajectories", "nowhere"], "nowhere"),
        (["--task", "gsm8k", "--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_a_user_can_set_right_is_said_in_a_line(tmp_path, train_here, capsys, options, message):
    (tmp_path / "broken.yaml").write_text("seed: 1\nloose text\nmore: [")
    with pytest.raises(SystemExit) as end:
        train_here(*options, "--bf16", "false")
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert "error: " in shown and message in shown and "Traceback" not in shown and len(shown.splitlines()) < 12
    assert not (tmp_path / "outputs").exists()


def test_a_model_wins_over_the_random_policy_of_a_recipe(tmp_path):
    arguments = train.ScriptArguments(random_policy="{}")
    path, _ = train.find_policy(
        arguments, DTRPOConfig(str(tmp_path), bf16=False), ModelConfig(model_name_or_path=tiny_policy_path())
    )
    assert path == tiny_policy_path()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "Puzzle\n123\n31022000021003x0\n", "rows.csv, row 1: A 4x4 sudoku puzzle is 16 digits"),
        ("rows.csv", "Question\nwhat\n", r"row 0: none of the columns \['puzzle', 'Puzzle'\]"),
        ("rows.csv", "Puzzle\n", "has no rows"),
        ("rows.txt", "3102200002100320", "must end in .csv, .jsonl or .json"),
        ("rows.jsonl", '{"puzzle": "3102200002100320"}\n{"puz', "rows.jsonl, line 2: not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task("sudoku", eval_file=str(path))


def test_missing_files_and_tasks_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.csv"):
        load_task("sudoku", train_file=str(tmp_path / "nothing.csv"))
    with pytest.raises(ValueError, match=r"Unknown task 'chess'; there are \['countdown', 'gsm8k', 'sudoku'\]"):
        load_task("chess")
    with pytest.raises(ValueError, match="needs `--train_file`"):
        load_task("gsm8k")


def test_training_rows_never_repeat_evaluation_rows():
    path = shared("data", "sudoku", "4x4_test.csv")
    task = load_task("sudoku", eval_file=str(path), train_size=3000)
    assert len(task.evaluation) == 500
    assert not set(task.evaluation["puzzle"]) & set(task.train["puzzle"])
    same = load_task("sudoku", train_file=str(path), eval_size=500)
    assert not set(same.evaluation["puzzle"]) & set(same.train["puzzle"])
    with pytest.raises(ValueError, match="left with no training rows"):
        load_task("sudoku", train_file=str(path), eval_file=str(path))
    gsm8k = load_task("gsm8k", str(shared("data", "gsm8k", "train.jsonl")), train_size=50, eval_size=10)
    asked = [row[0]["content"] for row in gsm8k.evaluation["prompt"]]
    assert not set(asked) & {row[0]["content"] for row in gsm8k.train["prompt"]}


def test_solve_rate_counts_answers():
    task = load_task("countdown", eval_size=4, train_size=8)
    from trl_diffusion.rewards.countdown import solve

    answers = [solve(row["numbers"], row["target"]) for row in task.evaluation]
    assert task.solve_rate(answers) == 1.0
    assert task.solve_rate([*answers[:3], "1+1"]) == 0.75
