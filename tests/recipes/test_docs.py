"""What the documentation on evaluation says can be typed in."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from trl import ModelConfig, TrlParser

from trl_diffusion import DTRPOConfig, DTRPOTrainer
from trl_diffusion.evaluation.run import TASK_NAMES, check_tasks
from trl_diffusion.evaluation.settings import check_settings, read_mapping


ROOT = Path(__file__).resolve().parents[2]
PARSED = {
    "evaluate.py": lambda recipe: (recipe["EvaluateArguments"],),
    "collect.py": lambda recipe: (recipe["CollectArguments"], ModelConfig),
    "train.py": lambda recipe: (recipe["ScriptArguments"], DTRPOConfig, ModelConfig),
}


def commands(name: str) -> list[str]:
    """The commands that start a recipe, in the shell blocks of a document."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"(^| )recipes/\w+\.py", line)]


@pytest.mark.parametrize("command", [*commands("reproduce.md"), *commands("evaluation.md")])
def test_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    place = next(index for index, word in enumerate(words) if word.startswith("recipes/"))
    script, options = words[place], words[place + 1 :]
    name = script.split("/")[-1]
    if name == "train.py":
        options += ["--bf16", "false"]  # as the machine may have no GPU
    recipe = runpy.run_path(str(ROOT / script))
    args, *others = TrlParser(PARSED[name](recipe)).parse_args_and_config(args=options)
    if name == "evaluate.py":
        local = {"sudoku", "countdown"} & set(args.tasks)
        check_tasks([task for task in args.tasks if task not in local] or ["gsm8k"], None, args.allow_code_execution)
        check_settings(read_mapping(args.decoding, "decoding"))
    if name == "train.py":
        assert args.trajectories and others[0].loss_type == "dpo"


def test_reproduction_is_complete():
    """Each of the three models is measured before and after, on all that the paper's table has."""
    found = [line for line in commands("reproduce.md") if "evaluate.py" in line]
    for model in (
        "Efficient-Large-Model/Fast_dLLM_v2_7B",
        "GSAI-ML/LLaDA-8B-Instruct",
        "Dream-org/Dream-v0-Instruct-7B",
    ):
        before, after = (shlex.split(line) for line in found if model in line)
        for words in (before, after):
            assert {"gpqa", "gsm8k", "math", "humaneval_plus", "ifeval"} <= set(words)
            assert words[words.index("--decoding") + 1] == before[before.index("--decoding") + 1]
        assert "--adapter_name_or_path" in after and "--adapter_name_or_path" not in before


def test_tasks_in_the_table_exist():
    rows = re.findall(r"^\| (`[a-z0-9_`, ]+`) \|", (ROOT / "docs" / "evaluation.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row)}
    assert named == set(TASK_NAMES)


def test_the_example_of_evaluation_in_training(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code, "evaluation.md", "exec"), scope)
    trainer = scope["trainer"]
    assert isinstance(trainer, DTRPOTrainer) and trainer.state.best_model_checkpoint is not None
