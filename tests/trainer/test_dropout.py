"""Recorded and scored log-probabilities are compared, so nothing is dropped while either is computed."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, LoraConfig, OFTConfig
from torch import nn
from transformers import AutoConfig

from tests.conftest import make_policy
from tests.policies.backbones import tiny_backbone
from trl_diffusion import DiffusionSpec, DTRPOConfig
from trl_diffusion.policies.training import switch_off_dropout
from trl_diffusion.policies.trial import try_policy


SPEC = DiffusionSpec(mask_token_id=63, block_size=4)
# Backbones with dropout layers, and with probabilities that modules hand to functions.
NOISY = {
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_bigcode": {"resid_pdrop": 0.3, "attn_pdrop": 0.3},
    "llama": {"attention_dropout": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
    "seed_oss": {"attention_dropout": 0.3, "residual_dropout": 0.3},
}


def gaps(trainer) -> list[float]:
    """Largest difference between a recorded and a scored log-probability, of each update; every one is on policy."""
    trainer.train()
    return [entry["diffusion/recorded_gap/max"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("attention_dropout", "sdpa"), ("attention_dropout", "eager"), ("lora_dropout", "sdpa")],
)
def test_dropout_is_off_and_said_to_be(make_trainer, char_spec, tokenizer, caplog, name, implementation):
    changes = {"attention_dropout": 0.3} if name == "attention_dropout" else {}
    model = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **changes)
    model.set_attn_implementation(implementation)
    kwargs = {} if changes else {"peft_config": LoraConfig(target_modules="all-linear", lora_dropout=0.3)}
    trainer = make_trainer(model, kwargs=kwargs)
    said = [record.getMessage() for record in caplog.records if "Dropout is switched off" in record.getMessage()]
    assert len(said) == 1 and f"({name}=0.3)" in said[0]
    assert max(gaps(trainer)) < 1e-4


def test_nothing_is_said_where_there_is_none(make_trainer, caplog):
    make_trainer(kwargs={"peft_config": LoraConfig(target_modules="all-linear")})
    assert "Dropout" not in caplog.text


def test_the_saved_config_keeps_its_dropout(make_trainer, char_spec, tokenizer, tmp_path):
    model = make_policy(char_spec, vocab_size=len(tokenizer), attention_dropout=0.3)
    trainer = make_trainer(model, kwargs={})
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoConfig.from_pretrained(tmp_path / "saved").attention_dropout == 0.3


@pytest.mark.parametrize("model_type", ["seed_oss", *(name for name in NOISY if name != "seed_oss")])
def test_training_mode_computes_what_evaluation_mode_does(model_type):
    """Before, the trial finds dropout and names it; afterwards the numbers are the same."""
    model = tiny_backbone(model_type, **NOISY[model_type])
    ids = torch.arange(5, 25)[None]
    right = model(input_ids=ids).logits
    with pytest.raises(ValueError, match=rf"`{model_type}`.*training mode.*{next(iter(NOISY[model_type]))}"):
        try_policy(model, SPEC, training=True)
    assert not model.training
    switch_off_dropout(model)
    try_policy(model, SPEC, training=True)
    with torch.random.fork_rng():
        torch.testing.assert_close(model.train()(input_ids=ids).logits, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["falcon", "persimmon"])
def test_what_reads_its_config_in_every_pass_is_refused(make_trainer, char_spec, tokenizer, model_type):
    shape = {"vocab_size": len(tokenizer), "hidden_dropout": 0.2, "attention_dropout": 0.3}
    with pytest.raises(ValueError, match=rf"`{model_type}`.*training mode.*set it to 0 .*attention_dropout=0.3"):
        make_trainer(tiny_backbone(model_type, **shape), spec=char_spec, diffusion_spec=char_spec.to_dict())
    shape = {"vocab_size": len(tokenizer), "hidden_dropout": 0.0, "attention_dropout": 0.0}
    make_trainer(tiny_backbone(model_type, **shape), spec=char_spec, diffusion_spec=char_spec.to_dict())


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=0.3, use_dora=True),
        LoHaConfig(target_modules=["q_proj", "up_proj"], rank_dropout=0.5, module_dropout=0.5),
        OFTConfig(target_modules=["q_proj", "up_proj"], module_dropout=0.5, oft_block_size=8),
    ],
    ids=["dora", "loha", "oft"],
)
def test_adapters_drop_nothing(make_trainer, caplog, peft_config):
    trainer = make_trainer(kwargs={"peft_config": peft_config})
    assert "dropout" in caplog.text
    assert max(gaps(trainer)) < 1e-4


def test_noise_of_ones_own_is_refused(make_trainer, char_spec, tokenizer):
    """A module that does something else in training mode, whatever it is called."""

    class Noisy(nn.Module):
        def forward(self, hidden):
            return hidden + 0.1 * torch.randn_like(hidden) if self.training else hidden

    model = make_policy(char_spec, vocab_size=len(tokenizer))
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, Noisy())
    with pytest.raises(ValueError, match=r"training mode.*`model\.layers\.1\.mlp\.1`"):
        make_trainer(model)


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe"])
def test_noise_in_a_router_is_refused(make_trainer, char_spec, tokenizer, model_type):
    """It cannot be switched off from here: what PhiMoE computes in evaluation mode depends on it."""
    options = {"spec": char_spec, "diffusion_spec": char_spec.to_dict()}
    shape = {"vocab_size": len(tokenizer), "router_jitter_noise": 0.5}
    with pytest.raises(
        ValueError, match=rf"`{model_type}`.*training mode.*`model\.layers\.0\.mlp.*router_jitter_noise=0.5"
    ):
        make_trainer(tiny_backbone(model_type, **shape), **options)
    shape["router_jitter_noise"] = 0.0
    make_trainer(tiny_backbone(model_type, **shape), **options)


def test_dropout_cannot_be_asked_for(tmp_path):
    assert DTRPOConfig(str(tmp_path), bf16=False).disable_dropout
    with pytest.raises(ValueError, match="`disable_dropout`: .* recorded|`disable_dropout`: .*records"):
        DTRPOConfig(str(tmp_path), bf16=False, disable_dropout=False)
