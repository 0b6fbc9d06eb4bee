"""DTRPOTrainer trains what it should, and what it saves is a policy again."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.closeness import ROUNDING
from tests.conftest import make_policy
from tests.trainer.conftest import make_dataset
from trl_diffusion import DiffusionSpec, get_spec


USUAL_METRICS = [
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "completions/mean_length",
    "completions/clipped_ratio",
    "rewards/codes/mean",
    "rewards/codes/std",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "entropy",
    "clip_ratio/region_mean",
    "step_time",
    "diffusion/tokens_per_step",
    "diffusion/steps_per_response",
    "diffusion/scored_tokens",
    "diffusion/recorded_gap/mean",
    "diffusion/recorded_gap/max",
]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_full_training(make_trainer, tmp_path, beta, char_spec, tokenizer):
    start = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    start.save_pretrained(tmp_path / "start")  # the reference is loaded from here
    trainer = make_trainer(str(tmp_path / "start"), beta=beta)
    before = parameters(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 3
    unchanged = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    missing = [name for name in USUAL_METRICS + ["kl"] * (beta > 0) if logs[0].get(name) is None]
    assert not missing
    assert logs[0]["diffusion/recorded_gap/max"] < ROUNDING  # on policy: what was recorded is what is scored
    if beta:
        assert all(torch.equal(a, b) for a, b in zip(trainer.ref_model.parameters(), start.parameters(), strict=True))
        assert logs[0]["kl"] < 1e-6 < logs[2]["kl"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_training(make_trainer, checkpointing):
    trainer = make_trainer(
        kwargs={"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)},
        beta=0.1,
        gradient_checkpointing=checkpointing,
    )
    before = parameters(trainer.model)
    trainer.train()
    # On policy at every step, dropout or not: what was recorded is what is scored.
    gaps = [entry["diffusion/recorded_gap/max"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(gaps) < ROUNDING
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["kl"] < 1e-6 < logs[2]["kl"]


def test_trained_model_saves_and_loads_with_its_spec(make_trainer, tmp_path, char_spec):
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert get_spec(loaded.config) == char_spec
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("token_shift", [False, True])
def test_full_attention_policy_trains(make_trainer, tokenizer, token_shift):
    """One state of the whole trajectory per draw, several draws in one batched forward."""
    spec = DiffusionSpec(
        mask_token_id=tokenizer.mask_token_id, attention="full", block_size=8, block_origin="response",
        token_shift=token_shift, stop_token_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    trainer = make_trainer(spec=spec, num_draws=3)
    before = parameters(trainer.model)
    trainer.train()
    assert not [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["diffusion/recorded_gap/max"] < ROUNDING
    assert logs[0]["diffusion/scored_tokens"] <= 3 * trainer.args.tokens_per_step


def test_evaluation_during_training(make_trainer):
    trainer = make_trainer(
        kwargs={"eval_dataset": make_dataset(4)},
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        max_steps=2,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(logs) == 1
    assert {"eval_loss", "eval_rewards/codes/mean", "eval_diffusion/scored_tokens"} <= set(logs[0])
