"""A tiny trainer."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.conftest import make_policy
from trl_diffusion import DiffusionSpec, DTRPOConfig, DTRPOTrainer, tiny_policy_path
from trl_diffusion.rewards import sudoku


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")


@pytest.fixture(scope="session")
def char_spec(tokenizer) -> DiffusionSpec:
    return DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=8, stop_token_ids=(tokenizer.eos_token_id,))


def codes(completions, **kwargs) -> list[float]:
    """A reward that differs between the answers of a random policy: the mean character code."""
    return [sum(map(ord, text)) / (100 * max(len(text), 1)) for text in completions]


def make_dataset(size: int = 16) -> Dataset:
    rows = sudoku.generate(size, seed=0)
    # Prompts of unequal lengths.
    return Dataset.from_list([{"prompt": sudoku.prompt(r["puzzle"])[: 10 + i % 14], **r} for i, r in enumerate(rows)])


@pytest.fixture
def make_trainer(tokenizer, char_spec, tmp_path):
    def build(model=None, spec=None, reward_funcs=codes, dataset=None, kwargs=None, seed=0, **options):
        spec = spec or char_spec
        if model is None:
            model = make_policy(spec, seed=seed, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        options = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 14,
            "tokens_per_step": 2,
            "learning_rate": 1e-2,
            "max_steps": 3,
            "logging_steps": 1,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
        return DTRPOTrainer(
            model=model,
            reward_funcs=reward_funcs,
            args=DTRPOConfig(**options),
            train_dataset=make_dataset() if dataset is None else dataset,
            **{"processing_class": tokenizer, **(kwargs or {})},
        )

    return build
