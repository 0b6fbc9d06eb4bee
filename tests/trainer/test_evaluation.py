"""Evaluation in training: rewards on a held-out set, the best checkpoint, and `evaluate` metrics."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from tests.conftest import shared
from tests.trainer.conftest import make_dataset
from trl_diffusion import DecodingConfig, tiny_policy_path
from trl_diffusion.metrics import PassAtK, SudokuSolved
from trl_diffusion.rewards import sudoku
from trl_diffusion.trainer.callbacks import MetricCallback


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_rewards/wanders/mean",
    "greater_is_better": True,
    "per_device_eval_batch_size": 4,
}


class Wanders:
    """A reward that evaluations see rise to the second step and fall again, whatever the answers are."""

    __name__ = "wanders"

    def __init__(self):
        self.trainer = None

    def __call__(self, completions, **kwargs):
        if self.trainer is None or self.trainer.model.training:
            return [float(len(set(text))) for text in completions]
        return [{1: 0.2, 2: 0.7, 3: 0.4}[self.trainer.state.global_step]] * len(completions)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stock", "llada", "lora"])
def test_the_best_checkpoint_by_a_reward_is_loaded(make_trainer, tmp_path, kind):
    reward = Wanders()
    model = str(shared("fixtures", "llada")) if kind == "llada" else tiny_policy_path()
    trainer = make_trainer(
        model,
        reward_funcs=reward,
        diffusion_spec={"block_size": 8} if kind == "llada" else None,
        kwargs={
            "eval_dataset": make_dataset(4),
            "peft_config": LoraConfig(r=4, target_modules="all-linear") if kind == "lora" else None,
        },
        **BEST,
    )
    reward.trainer = trainer
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.state.best_metric == pytest.approx(0.7)
    logged = [entry["eval_rewards/wanders/mean"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert logged == pytest.approx([0.2, 0.7, 0.4])

    def saved(step: int) -> list[torch.Tensor]:
        path = tmp_path / f"checkpoint-{step}"
        if kind == "lora":
            return [tensor for _, tensor in sorted(load_file(path / "adapter_model.safetensors").items())]
        return list(AutoModelForCausalLM.from_pretrained(path).parameters())

    if kind == "lora":
        names = sorted(name for name, _ in trainer.model.named_parameters() if "lora_" in name)
        now = [dict(trainer.model.named_parameters())[name] for name in names]
    else:
        now = list(trainer.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(now, saved(2), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(now, saved(3), strict=True))


@pytest.mark.slow
def test_resuming_a_family_with_weight_names_of_its_own(make_trainer, tmp_path):
    """Where a run of three steps was after two, a resumed one starts."""
    options = {"diffusion_spec": {"block_size": 8}, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(str(shared("fixtures", "llada")), **options)
    whole.train()
    resumed = make_trainer(str(shared("fixtures", "llada")), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_rewards_of_an_evaluation_are_those_of_the_held_out_rows(make_trainer):
    """A reward that only knows its row: the evaluation's mean is that of the held-out rows, each counted alike."""
    rows = [{"prompt": "sudoku 1", "worth": float(worth)} for worth in (1, 2, 4, 8)]

    def worth(completions, worth, **kwargs):
        return worth

    trainer = make_trainer(
        reward_funcs=worth,
        dataset=Dataset.from_list([{"prompt": "sudoku 2", "worth": 100.0}] * 4),
        kwargs={"eval_dataset": Dataset.from_list(rows)},
        per_device_eval_batch_size=4,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/worth/mean"] == pytest.approx(15 / 4)
    assert metrics["eval_reward"] == pytest.approx(15 / 4)


def solvable(number: int) -> list[dict]:
    """Easy puzzles, of which the embedded policy solves some."""
    rows = sudoku.generate(number, seed=3, blanks=6)
    return [{"puzzle": row["puzzle"], "prompt": sudoku.prompt(row["puzzle"])} for row in rows]


@pytest.mark.slow
def test_metric_callback(make_trainer, tmp_path):
    rows = solvable(24)
    prompts, puzzles = [row["prompt"] for row in rows], [row["puzzle"] for row in rows]
    decoding = DecodingConfig(17, tokens_per_step=2)
    trainer = make_trainer(
        tiny_policy_path(),
        reward_funcs=sudoku.sudoku_solved,
        dataset=Dataset.from_list(rows),
        kwargs={"eval_dataset": Dataset.from_list(rows[:4])},
        max_completion_length=17,
        learning_rate=2e-3,
        **{**BEST, "metric_for_best_model": "eval_sudoku_solved"},
    )
    seen = []

    class Keeps(SudokuSolved):
        """Keeps the answers."""

        def _compute(self, predictions, references):
            seen.append(predictions)
            return super()._compute(predictions, references)

    trainer.add_callback(
        MetricCallback(trainer, Keeps(cache_dir=str(tmp_path / "cache")), "sudoku", prompts, puzzles, decoding)
    )
    trainer.add_callback(
        MetricCallback(
            trainer,
            PassAtK(cache_dir=str(tmp_path / "cache")),
            "units",
            prompts,
            decoding=decoding,
            prepare=lambda texts: [[reward] for reward in sudoku.sudoku_solved(texts, puzzle=puzzles)],
            options={"k": (1,)},
        )
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=5))
    metrics = trainer.evaluate()
    before = sum(sudoku.is_solved(puzzle, answer) for puzzle, answer in zip(puzzles, seen[0], strict=True)) / 24
    assert 0 < before < 1
    assert metrics["eval_sudoku_solved"] == pytest.approx(before)
    assert metrics["eval_units_pass@1"] == pytest.approx(before)
    trainer.train()
    rates = [entry["eval_sudoku_solved"] for entry in trainer.state.log_history if "eval_sudoku_solved" in entry]
    expected = [
        sum(sudoku.is_solved(puzzle, answer) for puzzle, answer in zip(puzzles, answers, strict=True)) / 24
        for answers in seen[1:]  # `train` starts a new log
    ]
    assert rates == pytest.approx(expected) and len(set(rates)) > 1
    assert trainer.state.best_metric == pytest.approx(max(rates))
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["best_metric"] is not None


@pytest.mark.parametrize(
    ("prompts", "references", "message"),
    [([], None, "no prompt"), (["a", "b"], ["c"], "2 prompts but 1 references")],
)
def test_metric_callback_refuses(prompts, references, message):
    with pytest.raises(ValueError, match=message):
        MetricCallback(None, SudokuSolved(), "sudoku", prompts, references)
