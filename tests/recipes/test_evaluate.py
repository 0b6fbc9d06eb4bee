"""
The same policy on the same files scores the same through lm_eval, `trl-diffusion evaluate` and evaluation in training. The
questions are made so that each policy answers about half of them: right answers are what it says, as the decoder gives
it, wrong ones are something else.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partialmethod
from io import StringIO
from pathlib import Path

import pytest
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from tests.conftest import shared
from tests.evaluation.conftest import adapter  # noqa: F401
from tests.processes import HANGS, run_pair
from trl_diffusion import DecodingConfig, DTRPOConfig, DTRPOTrainer, decode, tiny_policy_path
from trl_diffusion.commands import evaluate
from trl_diffusion.evaluation import tasks_path
from trl_diffusion.evaluation.__main__ import main as start_harness
from trl_diffusion.evaluation.benchmarks import BENCHMARKS
from trl_diffusion.evaluation.generate import cut
from trl_diffusion.evaluation.harness import DiffusionLM
from trl_diffusion.metrics import CountdownSolved, MathExactMatch, PassAtK, SudokuSolved
from trl_diffusion.policies.policy import Policy, open_policy
from trl_diffusion.rewards import countdown, sudoku
from trl_diffusion.rewards.code import code_reward
from trl_diffusion.trainer.callbacks import MetricCallback


ROOT = Path(__file__).resolve().parents[2]
TOKENS = 12
TASKS = ("gsm8k", "humaneval", "countdown", "sudoku")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


# What `lm_eval` does. Tasks are named by their files, so that the index of the harness's own 14,000 is not needed: 15 seconds.
LM_EVAL = """
from functools import partialmethod
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
cli_evaluate()
"""


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, **ENVIRONMENT, "HF_HOME": str(cwd / "cache")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def say(policy: Policy, prompts: list[str], stops: tuple[str, ...] = ()) -> list[str]:
    ids = [policy.tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = decode(policy.model, ids, DecodingConfig(TOKENS, tokens_per_step=2), policy.spec).completions()
    return [cut(policy.tokenizer.decode(answer, skip_special_tokens=True), stops) for answer in answers]


def make_data(policy: Policy, directory: Path) -> dict[str, float]:
    """Files in the benchmarks' formats, and the share of each that the policy answers."""
    for name in TASKS:
        (directory / name).mkdir(parents=True)
    expected = {}
    rows, right = [], 0
    prompts = [f"{n}?\nThink step by step and end with '#### ' and the answer." for n in range(6)]
    for n, answer in enumerate(say(policy, prompts)):
        number = re.fullmatch(r"\d{1,12}", answer) and n % 2 == 0  # then it is the answer, whatever looks for one
        rows.append({"question": f"{n}?", "answer": f"#### {answer if number else 10**13 + n}"})
        right += bool(number)
    write_lines(directory / "gsm8k" / "test.jsonl", rows)
    expected["gsm8k"] = right / 6

    rows, right = [], 0
    prompts = [f"def f{n}():\n    return {n}  # " for n in range(4)]  # right, unless the policy leaves the comment
    for n, answer in enumerate(say(policy, prompts, BENCHMARKS["humaneval"].stops)):
        prompt = prompts[n]
        is_right = n % 2 == 0 and returns(prompt + answer, n)
        test = f"def check(candidate):\n    assert candidate() == {n if n % 2 == 0 else -1}\n"
        rows.append({"prompt": prompt, "test": test, "entry_point": f"f{n}"})
        right += is_right
    write_lines(directory / "humaneval" / "HumanEval.jsonl", rows)
    expected["humaneval"] = right / 4

    games = countdown.generate(12, seed=3)
    answers = say(policy, [countdown.prompt(game["numbers"], game["target"]) for game in games])
    solved = [
        countdown.is_solved(answer, game["numbers"], game["target"])
        for answer, game in zip(answers, games, strict=True)
    ]
    write_lines(directory / "countdown" / "cd3_test.jsonl", games)
    expected["countdown"] = sum(solved) / 12

    puzzles = sudoku.generate(6, seed=3, blanks=6)
    text = "Puzzle,Solution\n" + "".join(f"{row['puzzle']},{row['solution']}\n" for row in puzzles)
    (directory / "sudoku" / "4x4_test.csv").write_text(text)
    config = DecodingConfig(17, tokens_per_step=2)
    prompts = policy.encode([sudoku.prompt(row["puzzle"]) for row in puzzles])
    answers = decode(policy.model, prompts, config, policy.spec).completions()
    solved = [sudoku.is_solved(row["puzzle"], text) for row, text in zip(puzzles, policy.decode(answers), strict=True)]
    expected["sudoku"] = sum(solved) / 6
    return expected


def returns(program: str, value: int) -> bool:
    """Whether a program is one function that returns a constant, and constants behind it."""
    try:
        function, *rest = ast.parse(program).body
    except SyntaxError:
        return False
    constant = all(isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) for line in rest)
    return constant and isinstance(function.body[0], ast.Return) and function.body[0].value.value == value


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


POLICIES = {"adapter": (True, True), "llada": (False, False)}  # embedded or not, with an adapter or not


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_three_ways_agree(name, adapter, tmp_path, monkeypatch):  # noqa: F811
    """
    With the adapter `lm_eval` runs in a process of its own, which knows nothing of this package; otherwise
    `python -m trl_diffusion.evaluation` runs in this one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which the harness sets
    embedded, with_adapter = POLICIES[name]
    path = tiny_policy_path() if embedded else str(shared("fixtures", "llada"))
    peft = adapter if with_adapter else None
    # The tokenizer is not the fixture's own: without the tokens that it lacks, hardly an answer would be right by chance.
    spec = {} if embedded else {"block_size": 8, "absent_token_ids": []}
    policy = open_policy(path, peft, tokenizer=tiny_policy_path(), diffusion_spec=spec)
    expected = make_data(policy, tmp_path / "data")
    assert any(0 < share < 1 for share in expected.values()), expected

    def decoding(task: str) -> str:
        return f"tokens_per_step:2+max_new_tokens:{17 if task == 'sudoku' else TOKENS}"

    # 1. The harness, with its command line: all but the puzzles in one go.
    harness = run_harness(path, peft, spec, decoding("gsm8k"), TASKS[:3], tmp_path, monkeypatch)
    # 2. The recipe.
    recipe = {}
    for tasks in (TASKS[:3], TASKS[3:]):
        recipe |= run_recipe(path, peft, spec, decoding(tasks[0]), tasks, tmp_path)
    # 3. In training.
    trainer = make_trainer(path, peft, spec, tmp_path)
    training, answers = run_in_training(trainer, tmp_path / "data")

    for task in TASKS:
        samples = recipe[task]
        assert sum(sample["score"] for sample in samples) / len(samples) == pytest.approx(expected[task])
        assert training[task] == pytest.approx(expected[task])
        assert [sample["answer"] for sample in samples] == answers[task]
        if task in harness:
            assert [sample["resps"][0][0] for sample in harness[task]] == answers[task]
            assert [sample["solved"] for sample in harness[task]] == [sample["score"] for sample in samples]


def run_harness(path, peft, spec, decoding, tasks, cwd: Path, monkeypatch) -> dict[str, list[dict]]:
    arguments = {"pretrained": path, "tokenizer": tiny_policy_path(), "decoding": decoding}
    arguments |= {"peft": peft} if peft else {}
    arguments |= {"diffusion_spec": "+".join(f"{k}:{v}" for k, v in spec.items())} if spec else {}
    files = [str(Path(tasks_path()) / f"{task}_local.yaml") for task in tasks]
    if peft:  # `model.yaml` first, which makes `lm_eval` know the model, and a task that knows nothing of this package
        files = [f"{tasks_path()}/model.yaml", str(task_of_others(cwd)), *files]
    command = [
        *("--model", "trl_diffusion", "--tasks", ",".join(files), "--batch_size", "8"),
        *("--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())),
        *("--metadata", f"data_dir={cwd / 'data'}", "--confirm_run_unsafe_code", "--log_samples"),
        *("--output_path", str(cwd / "harness")),
    ]
    if peft:
        out = run(sys.executable, "-c", LM_EVAL, *command, cwd=cwd)
    else:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
        monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
        with redirect_stdout(StringIO()) as stdout:
            start_harness()
        out = stdout.getvalue()
    if peft:
        assert re.search(r"\|mine\s*\|.*\|exact_match\|.\s*\|\s*[01](\.0)?\|", out)
    found = {}
    for task in tasks:
        (file,) = (cwd / "harness").rglob(f"samples_{task}_local_*.jsonl")
        samples = sorted(map(json.loads, file.open()), key=lambda sample: sample["doc_id"])
        shown = re.search(rf"{task}_local\s*\|.*\|solved\s*\|.\s*\|\s*([\d.]+)", out)
        assert float(shown[1]) == pytest.approx(sum(s["solved"] for s in samples) / len(samples), abs=1e-4, rel=1e-4)
        found[task] = samples
    return found


def task_of_others(directory: Path) -> Path:
    """A task as users of the harness write them.."""
    (directory / "puzzles.csv").write_text("Puzzle\n3102200002100320\n")
    (directory / "mine.yaml").write_text(
        "task: mine\ndataset_path: csv\ndataset_kwargs:\n  data_files:\n    test: puzzles.csv\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: 'sudoku {{Puzzle}}'\ndoc_to_target: '3'\n"
        "generation_kwargs:\n  until: ['1']\n  max_gen_toks: 16\nmetric_list:\n  - metric: exact_match\n"
    )
    return directory / "mine.yaml"


def run_recipe(path, peft, spec, decoding, tasks, cwd: Path) -> dict[str, list[dict]]:
    arguments = evaluate.EvaluateArguments(
        tasks=list(tasks),
        model_name_or_path=path,
        adapter_name_or_path=peft,
        tokenizer_name_or_path=tiny_policy_path(),
        diffusion_spec=json.dumps(spec),
        data_dir="data",
        output_dir="recipe",
        decoding=decoding,
        allow_code_execution=True,
    )
    evaluate.run(arguments)
    return {task: list(map(json.loads, (cwd / "recipe" / f"{task}_seed0_samples.jsonl").open())) for task in tasks}


def make_trainer(path, peft, spec, directory: Path) -> DTRPOTrainer:
    policy = open_policy(path, peft, tokenizer=tiny_policy_path(), diffusion_spec=spec) if peft else None
    for parameter_name, parameter in policy.model.named_parameters() if policy else ():
        parameter.requires_grad_("lora_" in parameter_name)  # a trainer takes no policy that cannot be trained
    return DTRPOTrainer(
        model=policy.model if policy else path,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=DTRPOConfig(
            str(directory / "run"),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            beta=0.0,
            diffusion_spec=spec or None,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "sudoku 1"}] * 4),
        eval_dataset=Dataset.from_list([{"prompt": "sudoku 1"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left"),
    )


def run_in_training(trainer: DTRPOTrainer, data: Path) -> tuple[dict[str, float], dict[str, list[str]]]:
    """The scores of an evaluation of the trainer, by `evaluate` metrics, and the answers they are of."""
    rows = {task: BENCHMARKS[task].read(data) for task in TASKS}
    reward, answers = code_reward(allow_execution=True), {}

    def column(task: str, name: str) -> list:
        return [row[name] for row in rows[task]]

    def keep(task: str, prepare=lambda texts: texts):
        def kept(texts: list[str]) -> list:
            answers[task] = [cut(text, BENCHMARKS[task].stops) for text in texts]
            return prepare(answers[task])

        return kept

    def code_rewards(texts: list[str]) -> list[list[float]]:
        columns = {name: column("humaneval", name) for name in ("test", "entry_point")}
        return [[value] for value in reward(column("humaneval", "prompt"), texts, **columns)]

    games = [{"numbers": row["numbers"], "target": row["target"]} for row in rows["countdown"]]
    cache = {"cache_dir": str(data / "cache")}
    for task, metric, references, prepare in (
        ("gsm8k", MathExactMatch(**cache), column("gsm8k", "answer"), keep("gsm8k")),
        ("humaneval", PassAtK(**cache), None, keep("humaneval", code_rewards)),
        ("countdown", CountdownSolved(**cache), games, keep("countdown")),
        ("sudoku", SudokuSolved(**cache), column("sudoku", "puzzle"), keep("sudoku")),
    ):
        decoding = DecodingConfig(17 if task == "sudoku" else TOKENS, tokens_per_step=2)
        trainer.add_callback(
            MetricCallback(trainer, metric, task, column(task, "prompt"), references, decoding, prepare)
        )
    metrics = trainer.evaluate()
    keys = {"gsm8k": "exact_match", "humaneval": "pass@1", "countdown": "solved", "sudoku": "solved"}
    return {task: metrics[f"eval_{task}_{key}"] for task, key in keys.items()}, answers


def evaluate_sudoku(rank: int, directory: str, output_dir: str) -> list[str] | None:
    """Answers that the harness samples, on rank 0; those of the recipe are in files."""
    os.chdir(directory)
    evaluate.run(
        evaluate.EvaluateArguments(
            tasks=["sudoku"], data_dir=".", output_dir=output_dir, decoding="temperature:1.0", seeds=[0, 1]
        )
    )
    lm = DiffusionLM(tiny_policy_path(), decoding="temperature:1.0", batch_size=4)
    assert lm.rank == rank
    manager = TaskManager(include_path=tasks_path(), include_defaults=False, metadata={"data_dir": "."})
    found = simple_evaluate(lm, tasks=["sudoku_local"], task_manager=manager, bootstrap_iters=0)
    if found is None:
        return None
    samples = sorted(found["samples"]["sudoku_local"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_results_of_one(tmp_path, monkeypatch):
    """Questions are shared: of the recipe (5 puzzles) and of the harness (sampled answers)."""
    (tmp_path / "sudoku").mkdir()
    puzzles = sudoku.generate(5, seed=3, blanks=6)
    (tmp_path / "sudoku" / "4x4_test.csv").write_text("Puzzle\n" + "".join(f"{row['puzzle']}\n" for row in puzzles))
    monkeypatch.chdir(tmp_path)
    two = run_pair(evaluate_sudoku, str(tmp_path), "two")
    assert two == [evaluate_sudoku(0, str(tmp_path), "one"), None] and len(two[0]) == 5
    for name in ("sudoku_seed0_samples.jsonl", "sudoku_seed1_samples.jsonl"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    one, two = (json.loads((tmp_path / name / "sudoku_seed0.json").read_text()) for name in ("one", "two"))
    assert two["tokens"] == one["tokens"] and two["forwards"] == one["forwards"]
