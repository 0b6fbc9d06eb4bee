"""A small collection."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.conftest import make_policy
from tests.trainer.conftest import codes
from trl_diffusion import DecodingConfig, DiffusionSpec, collect, tiny_policy_path
from trl_diffusion.rewards import sudoku


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")


@pytest.fixture(scope="session")
def char_spec(tokenizer) -> DiffusionSpec:
    return DiffusionSpec(mask_token_id=tokenizer.mask_token_id, block_size=8, stop_token_ids=(tokenizer.eos_token_id,))


def length(completions, **kwargs) -> list[float | None]:
    """A second reward, which is sometimes not applicable."""
    return [None if len(text) % 2 == 0 else float(len(text)) for text in completions]


def prompt_dataset(size: int = 10) -> Dataset:
    rows = sudoku.generate(size, seed=1)
    return Dataset.from_list([{"prompt": sudoku.prompt(r["puzzle"])[: 10 + i % 14], **r} for i, r in enumerate(rows)])


@pytest.fixture(scope="session")
def start(tmp_path_factory, tokenizer, char_spec):
    """A random policy on disk, with its tokenizer."""
    directory = tmp_path_factory.mktemp("start")
    policy = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def run_collect(start, output_dir, tokenizer, dataset=None, **options):
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    arguments = {"num_responses": 4, "rows_per_shard": 3, "batch_size": 8, "seed": 5, "disable_tqdm": True, **options}
    decoding = arguments.pop("decoding", DecodingConfig(14, 1.0, tokens_per_step=2))
    return collect(
        AutoModelForCausalLM.from_pretrained(start),
        tokenizer,
        prompt_dataset() if dataset is None else dataset,
        arguments.pop("reward_funcs", [codes, length]),
        output_dir,
        decoding,
        **arguments,
    )


@pytest.fixture(scope="session")
def collection(tmp_path_factory, start, tokenizer):
    return run_collect(start, tmp_path_factory.mktemp("collected") / "run", tokenizer)
