"""Code that comes with a checkpoint is never run, and nobody is asked whether it should be."""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.offline.conftest import prompt_dataset
from tests.trainer.conftest import codes
from tests.viz.test_viewer import make_batch, write_dataset
from trl_diffusion import DTRPOConfig, DTRPOTrainer, tiny_policy_path
from trl_diffusion.commands import collect as collecting
from trl_diffusion.commands import evaluate, generate, plan, train, view
from trl_diffusion.policies.loading import load_config, load_tokenizer
from trl_diffusion.policies.policy import load_model, open_policy
from trl_diffusion.rewards.call import RewardCaller


ROOT = Path(__file__).resolve().parents[1]
# They load files, and run no code of a checkpoint: adapters, and settings of generation.
WITHOUT_CODE = {"PeftConfig", "PeftModel", "GenerationConfig"}
LOADERS = {"from_pretrained", "from_config", "pipeline"}


def own(folder: Path, pattern: str) -> list[Path]:
    """Files of the project: packages that the documentation is built with are left out."""
    return [path for path in folder.rglob(pattern) if "node_modules" not in path.parts]


def sources() -> dict[str, str]:
    """The Python of the package, the recipes, the benchmarks, the notebooks and the documentation."""
    found = {}
    for folder in ("trl_diffusion", "recipes", "benchmarks", "docs"):
        found |= {str(path): path.read_text() for path in own(ROOT / folder, "*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        found |= {f"{path}, cell {place}": "".join(cell["source"]) for place, cell in enumerate(cells)}
    for path in [ROOT / "README.md", *own(ROOT / "docs", "*.md")]:
        blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
        found |= {f"{path}, block {place}": block for place, block in enumerate(blocks)}
    return found


def loads(source: str) -> list[ast.Call]:
    """Calls that load something for which transformers may ask."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            owner = getattr(getattr(node.func, "value", None), "id", None)
            if name in LOADERS and owner not in WITHOUT_CODE:
                found.append(node)
    return found


def forbids(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    return getattr(given.get("trust_remote_code"), "value", None) is False


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ("AutoModel.from_pretrained(path, trust_remote_code=False)", True),
        ("AutoModel.from_pretrained(path)", False),
        ("type(model).from_pretrained(path, trust_remote_code=None)", False),
        ("AutoConfig.from_pretrained(path, **options)", False),
        ("pipeline('text-generation', trust_remote_code=ask)", False),
    ],
)
def test_the_search_finds_them(source, good):
    assert [forbids(call) for call in loads(source)] == [good]


def test_no_call_lets_transformers_ask():
    """`datasets` is not among them: since version 4 it runs no code of a data set."""
    found = {where: loads(source) for where, source in sources().items()}
    assert sum(map(len, found.values())) > 30
    asking = [f"{where}:{call.lineno}" for where, calls in found.items() for call in calls if not forbids(call)]
    assert not asking
    assert not [where for where, source in sources().items() if re.search(r"trust_remote_code *= *True", source)]


# ----------------------------------------------------------------------------------------------- a checkpoint with code


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """Directory of a checkpoint of an unknown kind, whose every part is code. Who is asked says yes."""
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    path = tmp_path / "hub"
    path.mkdir()
    parts = {"Config": "configuration", "ModelForCausalLM": "model", "ModelForSequenceClassification": "model"}
    maps = {f"Auto{name}": f"{module}.Own{name}" for name, module in parts.items()}
    maps["AutoTokenizer"] = ["tokenization.OwnTokenizer", None]
    (path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": maps}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": maps}))
    for module in ("configuration", "model", "tokenization"):
        (path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    yield str(path)
    assert not asked and not (tmp_path / "ran").exists()


def stored(path: str, tmp_path) -> str:
    """Trajectories whose tokenizer is that of the checkpoint."""
    spec = open_policy(tiny_policy_path()).spec
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    write_dataset(tmp_path / "data", tokenizer, spec, make_batch(spec), tokenizer=path)
    return str(tmp_path / "data")


WAYS = {
    "config": lambda path, tmp_path: load_config(path),
    "tokenizer": lambda path, tmp_path: load_tokenizer(path),
    "model": lambda path, tmp_path: load_model(path, "cpu"),
    "policy": lambda path, tmp_path: open_policy(path),
    "policy, its tokenizer": lambda path, tmp_path: open_policy(tiny_policy_path(), tokenizer=path),
    "reward model": lambda path, tmp_path: RewardCaller(path),
    "trainer": lambda path, tmp_path: DTRPOTrainer(
        path, codes, DTRPOConfig(str(tmp_path / "out"), bf16=False), prompt_dataset(2)
    ),
    "trainer, a reward model": lambda path, tmp_path: DTRPOTrainer(
        tiny_policy_path(), path, DTRPOConfig(str(tmp_path / "out"), bf16=False, trust_remote_code=None), prompt_dataset(32),
    ),
}  # fmt: skip
COMMANDS = {
    "train": (train, ["--model_name_or_path"]),
    "train, its tokenizer": (train, ["--tokenizer_name_or_path"]),
    "collect": (collecting, ["--model_name_or_path"]),
    "evaluate": (evaluate, ["--tasks", "gsm8k", "--model_name_or_path"]),
    "generate": (generate, ["hello", "--model"]),
    "plan": (plan, []),
}


@pytest.mark.parametrize("way", WAYS)
def test_code_is_not_run(way, with_code, tmp_path):
    with pytest.raises(ValueError, match="hub") as caught:
        WAYS[way](with_code, tmp_path)
    assert "trust_remote_code" not in str(caught.value) or way == "trainer, a reward model"  # whose error is TRL's


@pytest.mark.parametrize("name", [*COMMANDS, "view"])
def test_commands_run_none_and_do_not_ask(name, with_code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, words = COMMANDS.get(name, (view, []))
    words = [stored(with_code, tmp_path), "0"] if name == "view" else [*words, with_code]
    monkeypatch.setattr(sys, "argv", ["command", *words])
    try:
        code = command.main()
    except SystemExit as end:
        code = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "trust_remote_code" not in lines[0]
    assert "hub" in lines[0]
