"""`trl-diffusion train` as a user runs it, on small settings."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from trl import ModelConfig

from tests.conftest import shared
from tests.processes import HANGS, in_a_terminal
from trl_diffusion import DTRPOConfig, __version__, tiny_policy_path
from trl_diffusion.commands import train
from trl_diffusion.evaluation.run import wilson
from trl_diffusion.rewards import sudoku
from trl_diffusion.tasks import load_task
from trl_diffusion.trainer import trackers
from trl_diffusion.viz.runs import Run, read_run


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def train_here(tmp_path, monkeypatch, capsys):
    """The command in this process, which has imported what a new one would have to import. Pictures take half of its time, and are
    drawn where a test looks at them."""
    draw = train.draw

    def start(*arguments: str, draws: bool = False) -> list[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(train, "draw", draw if draws else lambda *_: [])
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        monkeypatch.setattr(train, "use_all_cores", lambda: None)
        train.main()
        start.printed = capsys.readouterr().out.strip()
        return start.printed.splitlines()

    return start


SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--train_size", "64", "--eval_size", "20"]
# What the lines of a run are, on a terminal, in this order.
LINES = [
    r"Settings: \S*tiny_sudoku\.yaml; .* from the command line\.",
    r"Policy: the embedded policy, 0\.67 million weights; block attention, blocks of 8 tokens\.",
    r"Output: outputs/tiny_sudoku, with the trained policy at the end, and a checkpoint every 2 updates\.",
    r"Measuring the policy on 20 puzzles that training never sees \.\.\.",
    r"solve rate before training: \d+\.\d%",
    r"Training: 4 updates, each on 16 responses to 4 prompts\.",
    r"An update takes about \S+ seconds, the 2 that are left about \S+ seconds\.",
    r"solve rate (\d+\.\d%) -> (\d+\.\d%) \(20 puzzles, 95 % interval (\d+\.\d%) to (\d+\.\d%), seed 0\)",
    r"One of the puzzles that it solves now( as before)?:|It solves none of the puzzles yet\. The first:",
    r"  prompt sudoku \d{16}",
    r"  before \S*",
    r"  after  \S*",
    r"outputs/tiny_sudoku has the trained policy, its card, results\.json, trainer_state\.json(, \w+\.png)+\.",
    r"Next: (trl-diffusion generate 'sudoku \d{16}' --model outputs/tiny_sudoku .*)",
    r"Your own task and your own model: \S*quickstart\S*",
]
BAR = r" *\d+%\|"


def lines_of(output: str) -> list[str]:
    """The lines that a terminal gets, without what moves its cursor. A bar that is drawn again is a line again."""
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output)) if line.strip()]


def in_terminal(directory: Path, *options: str, **how) -> tuple[int, list[str]]:
    """`trl-diffusion train` in a terminal: its exit code and its lines."""
    words = [sys.executable, "-m", "trl_diffusion", "train", "--num_processes", "1", "--config", "tiny_sudoku", *SMALL]
    words += ["--num_generations", "4", "--save_steps", "2", "--logging_steps", "1", *options]
    code, output = in_a_terminal(words, directory, **how)
    return code, lines_of(output)


@pytest.mark.slow
def test_sudoku_end_to_end(tmp_path, train_here):
    """
    The command line starts accelerate, which starts the recipe. Each line on the terminal is about the run.
    `tests/distributed/test_recipes.py` starts accelerate itself.
    """
    code, shown = in_terminal(tmp_path, "--max_steps", "4")
    told = [line for line in shown if not re.match(BAR, line)]
    assert code == 0 and len(told) == len(LINES), "\n".join(told)
    found = [re.fullmatch(pattern, line) for line, pattern in zip(told, LINES, strict=True)]
    assert all(found), told[found.index(None)]
    assert any("4/4" in line and "sudoku_solved=" in line and "sudoku_units=" in line for line in shown)
    out = tmp_path / "outputs" / "tiny_sudoku"
    results = json.loads((out / "results.json").read_text())
    figures = [results["solve_rate_before"], results["solve_rate_after"], *results["interval_after"]]
    assert found[7].groups() == tuple(f"{figure:.1%}" for figure in figures)
    assert results["interval_before"] == list(wilson(results["solve_rate_before"], 20))
    assert results["command"].startswith("trl-diffusion train --num_processes 1 --config tiny_sudoku --max_steps 2")
    assert set(results["seconds"]) == {"measuring_before", "training", "measuring_after"} and results["steps"] == 4
    assert all(seconds > 0 for seconds in results["seconds"].values())
    assert results["versions"]["torch"] == torch.__version__ and results["versions"]["trl_diffusion"] == __version__
    assert results["next_commands"] == [found[-2][1]]
    assert (out / "run.png").stat().st_size > 5000 and (out / "denoising.png").stat().st_size > 5000
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    assert "2603.18806" in (out / "README.md").read_text()
    assert not read_run(out).stored and read_run(out).results == results
    # What was saved is a policy, which goes on with the options of the recipe.
    again = train_here("--model_name_or_path", "outputs/tiny_sudoku")
    assert f"solve rate before training: {results['solve_rate_after']:.1%}" in again
    assert "as outputs/tiny_sudoku was trained (outputs/tiny_sudoku/train.yaml)" in train_here.printed
    assert (out / "model.safetensors").read_bytes() != (
        tmp_path / "outputs" / "tiny_sudoku_continued" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_evaluations_during_training(tmp_path, train_here):
    """On the rows that are measured. Their trajectories are written down, and one of them is drawn."""
    train_here(
        *SMALL[:-2], "--eval_size", "3", "--num_generations", "4", "--per_device_eval_batch_size", "8", "--eval_strategy",
        "steps", "--eval_steps", "2", "--log_trajectories", "6", "--logging_steps", "1",
    )  # fmt: skip
    folder = tmp_path / "outputs" / "tiny_sudoku" / "trajectories"
    names = ["eval_000002.parquet", "eval_000002.png", "step_000001.parquet", "step_000002.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == names
    table = pd.read_parquet(folder / "eval_000002.parquet")
    prompts = table["prompt"].tolist()
    evaluated = list(load_task("sudoku", None, None, 64, 3, 0).evaluation["prompt"])
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 2 and prompts[0] != prompts[4] and {*prompts} < {*evaluated}
    puzzles = [one.removeprefix("sudoku ") for one in prompts]
    solved = [float(sudoku.is_solved(*pair)) for pair in zip(puzzles, table["response"], strict=True)]
    assert table["sudoku_solved"].tolist() == solved


def test_several_trackers(monkeypatch):
    """On the command line as in a YAML file; transformers' parser takes one word only."""
    monkeypatch.setattr(trackers, "_INSTALLED", {})
    for words, found in (("trackio tensorboard", ["trackio", "tensorboard"]), ("wandb", ["wandb"]), ("none", [])):
        assert train.parse(["--report_to", *words.split(), "--bf16", "false"])[1].report_to == found


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path, train_here):
    """Ctrl-C in a terminal: one line, exit code 130, and a checkpoint that the command it names goes on from."""
    code, shown = in_terminal(tmp_path, "--max_steps", "1000", interrupt_at=r" 3/1000 ")
    assert code == 130 and not [line for line in shown if "Traceback" in line], "\n".join(shown)
    line = r"Stopped by Ctrl-C\. (\d+) of 1000 updates were made, (\S+)-(\d+) is kept\. To go on: (trl-diffusion train .*)"
    found = re.fullmatch(line, shown[-1])
    assert found and int(found[1]) >= 3, shown[-1]
    step = int(found[3])
    assert [path.name for path in (tmp_path / found[2]).parent.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    words = shlex.split(found[4])[4:]  # without `--num_processes`, which is for accelerate
    words[words.index("tiny_sudoku")] = str(ROOT / "recipes" / "tiny_sudoku.yaml")
    out = train_here(*words, "--max_steps", str(step + 1))
    assert f"Training: {step + 1} updates, each on 16 responses to 4 prompts; {step} are done." in out


@pytest.mark.slow
def test_lora_and_a_file_of_puzzles(tmp_path, train_here):
    (tmp_path / "mine.csv").write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n")
    lora = ("--use_peft", "--lora_target_modules", "all-linear", "--output_dir", "outputs/lora")
    out = train_here(*SMALL, *lora, "--eval_file", "mine.csv")
    assert any(re.search(r"\(1 puzzles, 95 % interval .*, seed 0\)$", line) for line in out)
    assert any("outputs/lora" in line for line in out if line.startswith("Next: "))
    first = load_file(tmp_path / "outputs" / "lora" / "adapter_model.safetensors")
    # The adapter is trained further, and is not put on another one.
    out = train_here("--model_name_or_path", "outputs/lora")
    assert any(line.startswith("Policy: outputs/lora, ") for line in out)
    assert any(re.search(r"\(1 puzzles, 95 % interval .*, seed 0\)$", line) for line in out)
    second = load_file(tmp_path / "outputs" / "lora_continued" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    apart = {name: (second[name] - first[name]).abs().max().item() for name in first}
    assert 0 < max(apart.values()) < 0.02  # two steps; another adapter would have other random numbers in `lora_A`
    # Without differing answers there is nothing to learn, which the summary says.
    out = train_here("--model_name_or_path", "outputs/lora", "--temperature", "1e-4", "--output_dir", "outputs/idle")
    said = "Nothing was learnt from the rewards: all responses to a prompt are the same."
    (told,) = (place for place, line in enumerate(out) if line.startswith(said))
    assert out[told + 1].startswith("solve rate ")


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
    told = train_here(
        "--config", str(ROOT / "recipes" / "gsm8k_preferences.yaml"),
        "--train_file", "pairs.jsonl",
        "--tokenizer_name_or_path", str(shared("fixtures", "fast_dllm_v2", "tokenizer")),
        "--max_steps", "2", "--eval_size", "2", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2",
        draws=True,
    )  # fmt: skip
    out = tmp_path / "outputs" / "gsm8k_preferences"
    results = json.loads((out / "results.json").read_text())
    assert any(line.startswith(f"loss {results['loss_before']:.4f} -> ") for line in told)
    assert "Training: 2 updates, each on 2 stored responses to 1 prompts." in told
    assert told[-2].startswith("Next: trl-diffusion generate 'YOUR PROMPT' --model outputs/gsm8k_preferences --chat ")
    assert (
        results["accuracy_interval"] == list(wilson(results["accuracy_after"], 2))
        and results["seconds"]["training"] > 0
    )
    assert results["rows"] == 2 and results["loss_before"] == pytest.approx(0.6931, rel=1e-3)
    assert json.loads((out / "config.json").read_text())["model_type"] == "Fast_dLLM_Qwen"
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2 and losses[0] == pytest.approx(0.6931, rel=1e-3) and abs(losses[1]) < 100
    assert Run("", state["log_history"]).stored and (out / "run.png").exists() and not (out / "denoising.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no_such_option", "1"], "there is no option --no_such_option; `trl-diffusion train --help-all` lists"),
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
        (
            [
                "--trajectories",
                "nowhere",
                "--eval_strategy",
                "steps",
                "--eval_steps",
                "1",
                "--per_device_eval_batch_size",
                "16",
            ],
            "`eval_strategy` has the policy answer during training",
        ),
        (["--task", "gsm8k", "--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["--model_name_or_path", "embedded:block", "--random_policy", "{}"],
            "`--model_name_or_path` and `--random_policy` both say what training begins with. Give one of them.",
        ),
    ],
)
def test_what_a_user_can_set_right_is_said_in_a_line(tmp_path, train_here, capsys, options, message):
    (tmp_path / "broken.yaml").write_text("seed: 1\nloose text\nmore: [")
    with pytest.raises(SystemExit) as end:
        train_here(*options, "--bf16", "false")
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert "error: " in shown and message in shown and "Traceback" not in shown and len(shown.splitlines()) == 1
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
    with pytest.raises(
        ValueError,
        match=r"Unknown task 'chess'; there are \['backward_chain', 'chain', 'countdown', 'game_tree', 'gsm8k', 'sparse_sudoku', "
        r"'sudoku', 'sudoku_12', 'word_sums'\], reasoning_gym:NAME, and FILE.py:FUNCTION\.$",
    ):
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
    wrong = [f"{a}+{b}+{c}" for a, b, c in (row["numbers"] for row in task.train)]
    columns = {name: [row[name] for row in task.train] for name in ("numbers", "target")}
    values = [set(reward(wrong, **columns)) for reward in task.reward_funcs]
    assert len(values[0]) <= 2 < len(values[1])  # what the recipe needs: one of them tells wrong answers apart
    from trl_diffusion.rewards.countdown import solve

    answers = [solve(row["numbers"], row["target"]) for row in task.evaluation]
    assert task.solve_rate(answers) == 1.0
    assert task.solve_rate([*answers[:3], "1+1"]) == 0.75
