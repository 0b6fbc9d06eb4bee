"""docs/metrics.md has every metric that a training logs, and no other."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import trl.trainer.grpo_trainer
from datasets import Dataset

from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import (
    DecodingConfig,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    collect,
    load_trajectories,
    tiny_policy_path,
)
from trl_diffusion.policies.policy import open_policy


ROOT = Path(__file__).resolve().parents[2]
FIRST, ALL = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("\n## Rewards\n")
# Of TRL, by options that `DTRPOConfig` refuses: tools, vLLM and the load balance of experts.
REFUSED = r"tools/.*|sampling/.*|aux_loss"
GROUPS = {"diffusion", "experts", "losses", "memory", "pairs", "throughput", "time"}  # of what this package logs
# What transformers logs, apart from what it computes at the end of an evaluation.
OF_TRANSFORMERS = {"loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos"}


def documented(text: str) -> list[str]:
    """The names in the first column of tables."""
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def matches(name: str, written: str) -> bool:
    """Whether a name is what the page writes, in which NAME stands for what users choose."""
    return re.fullmatch(re.escape(written).replace("NAME", "[^/]+"), name) is not None


def literal(node: ast.expr) -> str | None:
    """A string, or an f-string with NAME for what it fills in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "NAME" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def names_of_trl() -> set[str]:
    """What TRL's trainer writes into `self._metrics[...][NAME]`, whatever the options."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(trl.trainer.grpo_trainer))):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).startswith("self._metrics["):
            if (name := literal(node.slice)) is not None:
                found.add(name)
    return {name for name in found if not re.fullmatch(REFUSED, name)}


def names_of_the_package() -> set[str]:
    """Strings of the package that look like names of its metrics."""
    found, group = set(), f"({'|'.join(GROUPS)})/"
    for path in (ROOT / "trl_diffusion").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if re.search(group, text) else ():
            name = literal(node) if isinstance(node, ast.expr) else None
            if name and re.fullmatch(group + r"[\w/]*\w", name):
                found.add(name)
    return found


def test_every_metric_of_the_sources_is_on_the_page():
    trl_names, own = names_of_trl(), names_of_the_package()
    assert {"kl", "rewards/NAME/mean", "vespo/phi_seq_mean"} <= trl_names
    assert {"diffusion/recorded_gap/max", "diffusion/NAME", "pairs/identical", "time/update"} <= own
    written = documented(ALL)
    assert len(written) == len(set(written)) and len(documented(FIRST)) == 5 and set(documented(FIRST)) < set(written)
    missing = {name for name in trl_names | own if not any(matches(name, one) or name == one for one in written)}
    assert missing == {"diffusion/NAME", "diffusion/check/NAME"}  # of which each is logged below


def log_of(trainer) -> set[str]:
    """The names of a short training and its evaluation. Those of an evaluation are without their prefix."""
    trainer.train()
    return {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}


@pytest.fixture
def logged(make_trainer, tmp_path) -> set[str]:
    """What is logged by trainings that differ in what they log: online, on pairs, on preferences, on stored responses, and on
    documents."""
    small = {"max_steps": 1, "max_completion_length": 8, "num_generations": 2, "per_device_train_batch_size": 2}
    checked = {"beta": 0.1, "entropy_coef": 0.01, "estimator_check_steps": 1}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    runs = [{**checked, **evaluated}, {"loss_type": "dpo", "beta": 0.1}]
    names: set[str] = set()
    for options in runs:
        rows = make_dataset(1)
        kwargs = {"eval_dataset": rows} if "eval_strategy" in options else None
        names |= log_of(make_trainer(tiny_policy_path(), dataset=rows, kwargs=kwargs, **small, **options))
    policy = open_policy(tiny_policy_path())
    shards = collect(
        policy.model, policy.tokenizer, make_dataset(1), codes, tmp_path / "collected", DecodingConfig(8, temperature=1.0), num_responses=2,
        disable_tqdm=True,
    )  # fmt: skip
    stored = load_trajectories(shards)
    pairs = Dataset.from_list([{"prompt": "sudoku 1000", "chosen": "1234", "rejected": "4321"}] * 2)
    for dataset, loss_type in ((stored, "dapo"), (pairs, "dpo")):
        options = {**small, "loss_type": loss_type, "beta": 0.1}
        names |= log_of(make_trainer(tiny_policy_path(), reward_funcs=None, dataset=dataset, **options))
    return names | log_of(tuner(tmp_path))


def tuner(directory: Path) -> DiffusionSFTTrainer:
    """A trainer on documents, with an evaluation."""
    documents = Dataset.from_list([{"prompt": "sudoku 1000", "completion": "1234"}] * 2)
    args = DiffusionSFTConfig(
        str(directory), max_steps=1, per_device_train_batch_size=2, per_device_eval_batch_size=2, logging_steps=1, bf16=False,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    return DiffusionSFTTrainer(tiny_policy_path(), args=args, train_dataset=documents, eval_dataset=documents)


def test_every_metric_that_is_logged_is_on_the_page(logged):
    """And what the page has is logged. (The correlation is not before the policy has moved.)"""
    written = documented(ALL)
    assert {"diffusion/effective_sample_size", "diffusion/check/std", "losses/sft", "rewards/margins"} <= logged
    assert {f"rewards/{codes.__name__}/mean", "train_runtime", "runtime", "entropy_coef"} <= logged
    assert not {name for name in logged if not any(matches(name, one) for one in written)}
    known = logged | names_of_trl() | names_of_the_package() | OF_TRANSFORMERS | {"diffusion/check/correlation"}
    assert not {one for one in written if not any(matches(name, one) or name == one for name in known)}
