"""Preference pairs that are replayed before training are replayed by the policy that is trained: with its rounded weights."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from datasets import config as datasets_config
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tests.closeness import assert_close
from trl_diffusion import from_preferences, tiny_policy_path
from trl_diffusion.policies.policy import open_policy


pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")

PAIRS = [{"prompt": f"sudoku {i}", "chosen": "12" * (i + 1), "rejected": "345"} for i in range(4)]


def test_pairs_are_replayed_with_rounded_weights(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    pairs, recorded = Dataset.from_list(PAIRS), {}
    for name, quantization in (("plain", None), ("rounded", four)):
        policy = open_policy(tiny_policy_path(), dtype="float32", quantization=quantization)
        made = from_preferences(
            pairs, policy.tokenizer, policy.spec, "confidence", model=policy.model, tokens_per_step=2
        )
        recorded[name] = made["event_logps"][:]
    trainer = make_trainer(
        tiny_policy_path(),
        reward_funcs=None,
        dataset=pairs,
        num_generations=2,
        loss_type="dpo",
        beta=0.1,
        decoding_order="confidence",
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        kwargs={"quantization_config": four, "peft_config": LoraConfig(r=2, target_modules="all-linear")},
    )
    found, rounded, plain = (
        torch.tensor([value for row in rows for response in row for value in response])
        for rows in (trainer.train_dataset["event_logps"][:], *(recorded[name] for name in ("rounded", "plain")))
    )
    assert_close(found, rounded)
    assert (rounded - plain).abs().max() > 0.01  # which another policy would record
