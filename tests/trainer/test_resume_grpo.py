"""Exact resuming and figures over rows are for any trainer of TRL's kind: here TRL's own, with a policy that writes from left
to right."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from trl import GRPOConfig, GRPOTrainer

from tests.trainer.conftest import codes, make_dataset
from trl_diffusion.trainer.evaluation import RowwiseEvaluation
from trl_diffusion.trainer.resume import ExactResume


class Resumable(ExactResume, GRPOTrainer):
    """TRL's trainer, which remembers what it trains on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[torch.Tensor, ...]] = []
        self.loaded: list[str] = []

    def _compute_loss(self, model, inputs):
        self.seen.append((inputs["completion_ids"].clone(), inputs["advantages"].clone()))
        return super()._compute_loss(model, inputs)

    def save_extra_files(self, checkpoint):
        (checkpoint / f"extra_{self.accelerator.process_index}.txt").write_text(
            f"after {self.state.global_step} steps"
        )

    def load_extra_files(self, checkpoint):
        assert self.optimizer is not None and not self.seen  # all is ready, and nothing has begun
        self.loaded.append((checkpoint / f"extra_{self.accelerator.process_index}.txt").read_text())


@pytest.fixture(scope="module")
def causal(tmp_path_factory, tokenizer) -> str:
    """A small causal language model on disk, with its tokenizer."""
    path = tmp_path_factory.mktemp("causal")
    config = AutoConfig.for_model(
        "qwen3", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make(kind, model, tokenizer, directory, dataset, rewards=codes, evaluation=None, **options):
    args = GRPOConfig(**{
        "output_dir": str(directory), "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
        "learning_rate": 1e-2, "logging_steps": 1, "bf16": False, "gradient_checkpointing": False, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, **options,
    })  # fmt: skip
    return kind(model, rewards, args=args, train_dataset=dataset, eval_dataset=evaluation, processing_class=tokenizer)


CASES = {
    "inside a rollout": ({"num_iterations": 2, "steps_per_generation": 2, "beta": 0.05}, 7, 5, False),
    "between rollouts, second epoch": ({"gradient_accumulation_steps": 2, "steps_per_generation": 2}, 5, 4, False),
    "inside a rollout, of a stream": ({"num_iterations": 3}, 11, 10, True),
}


@pytest.mark.parametrize("case", CASES)
def test_trls_own_trainer_goes_on_to_the_bit(causal, tokenizer, tmp_path, case):
    changes, steps, checkpoint, streams = CASES[case]
    data = make_dataset(3 if streams else 6)
    runs = []
    for resume in (None, True):
        trainer = make(
            Resumable, causal, tokenizer, tmp_path / "run", data.to_iterable_dataset() if streams else data,
            max_steps=steps, save_strategy="steps", save_steps=checkpoint, save_total_limit=2, **changes,
        )  # fmt: skip
        torch.manual_seed(7 + len(runs))  # another process has another random state
        if resume:
            (tmp_path / "run" / f"checkpoint-{steps}").rename(tmp_path / "the end")
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    whole, part = runs
    assert part.loaded == [f"after {checkpoint} steps"] and whole.loaded == []
    assert 0 < len(part.seen) < len(whole.seen)
    for expected, found in zip(whole.seen[-len(part.seen) :], part.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in runs]
    assert losses[0] == losses[1] and len(losses[0]) == steps
    for expected, found in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(expected, found)


class Rowwise(RowwiseEvaluation, GRPOTrainer):
    """TRL's trainer, evaluated by rows."""


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
def test_figures_of_trls_own_trainer(causal, tokenizer, tmp_path, loss_type):
    """Greedy answers, so that they are the same in any batch: TRL's own figures for a single batch."""

    def number(completions, number, **kwargs):
        return [value + len(text) for value, text in zip(number, completions, strict=True)]

    data = Dataset.from_list([{"prompt": f"sudoku {n}", "number": float(n)} for n in range(5)])
    trainer = make(
        Rowwise, causal, tokenizer, tmp_path, data, number, data, beta=0.1, loss_type=loss_type, temperature=1.0,
        top_k=1, num_generations_eval=2, per_device_eval_batch_size=10,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
    output = Trainer.evaluation_loop(trainer, trainer.get_eval_dataloader(), "TRL's")
    expected = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    expected["loss"] = output.metrics["eval_loss"]
    assert expected["kl"] > 1e-3 and abs(expected["loss"]) > 1e-5
    for size in (2, 4, 10):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        found = {name: metrics[f"eval_{name}"] for name in expected}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), size
