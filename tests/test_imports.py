"""Parts of the package know each other in one direction, and some things are done in one file only."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_diffusion"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(file: str) -> Iterator[str]:
    """Full names of what a file imports, from wherever in it."""
    folder = list(Path(file).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def divides_by_block_size(code: str) -> bool:
    """Whether a division, whole or not, or a remainder by a block size is in the code."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.FloorDiv | ast.Mod | ast.Div):
            by = node.right if isinstance(node, ast.BinOp) else node.value
            numbers = not (isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant | ast.JoinedStr))
            if numbers and re.search(r"\bblock_size$", ast.unparse(by)):
                return True
        if isinstance(node, ast.Call) and re.search(r"\b(divmod|div|floor_divide|remainder)$", ast.unparse(node.func)):
            if any(re.search(r"\bblock_size$", ast.unparse(argument)) for argument in node.args):
                return True
    return False


def test_nothing_but_commands_imports_the_evaluation():
    for file in FILES:
        if not file.startswith(("trl_diffusion/evaluation/", "trl_diffusion/commands/")):
            assert not [name for name in imported(file) if name.startswith("trl_diffusion.evaluation")], file


def test_nothing_but_commands_imports_the_trainer():
    for file in FILES:
        if file.startswith(tuple(f"trl_diffusion/{one}/" for one in ("trainer", "commands", "sft", "experiments"))):
            continue  # the other trainer uses parts of the first: checks, defaults, metrics, files
        types = file == "trl_diffusion/__init__.py"  # which names what it gives, for type checkers
        assert types or not [name for name in imported(file) if name.startswith("trl_diffusion.trainer")], file


def test_policies_import_nothing_that_is_built_on_them():
    below = ("trl_diffusion.policies", "trl_diffusion.fields", "trl_diffusion.links", "trl_diffusion.utils")
    for file in FILES:
        if file.startswith("trl_diffusion/policies/"):
            own = [name for name in imported(file) if name.startswith("trl_diffusion.")]
            assert not [name for name in own if not name.startswith(below)], file


def test_models_are_opened_in_one_file():
    files = [*FILES, *(f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py"))]
    found = [file for file in files if "AutoModelForCausalLM.from_pretrained" in (ROOT / file).read_text()]
    assert found == ["trl_diffusion/policies/policy.py", "recipes/dtrpo_loop.py"]


def test_policies_tokenizers_are_opened_in_one_file():
    found = [file for file in FILES if "AutoTokenizer.from_pretrained(" in (ROOT / file).read_text()]
    assert found == ["trl_diffusion/policies/loading.py", "trl_diffusion/rewards/call.py"]  # there, of reward models


def test_blocks_are_counted_in_one_file():
    found = [file for file in FILES if divides_by_block_size((ROOT / file).read_text())]
    assert found == ["trl_diffusion/policies/spec.py"]


@pytest.mark.parametrize(
    "code",
    ["n // spec.block_size", "-(-n // block_size)", "n % self.spec.block_size", "n %= block_size", "divmod(n, block_size)",
     "torch.div(n, spec.block_size)", "n / block_size"],
)  # fmt: skip
def test_a_division_would_be_found(code):
    assert divides_by_block_size(code)


def test_an_import_would_be_found():
    names = set(imported("trl_diffusion/commands/evaluate.py"))
    assert {"trl_diffusion.evaluation.run.Evaluation", "trl_diffusion.policies.tiny.tiny_policy_path"} <= names
    assert "trl_diffusion.policies.tiny.tiny_policy_path" in set(imported("trl_diffusion/commands/direct.py"))


SCRIPTS = sorted(path for folder in ("benchmarks", "recipes", "docs") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_names_that_there_are(path):
    """Benchmarks run for hours and seldom, so nobody else would notice that a name has changed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl_diffusion"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                inside = (
                    importlib.util.find_spec(f"{node.module}.{alias.name}") if hasattr(module, "__path__") else None
                )
                assert hasattr(module, alias.name) or inside, f"{node.module}.{alias.name}"
