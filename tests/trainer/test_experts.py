"""Mixtures of experts: they decode, score and train like other policies, without their load-balancing loss, and say so."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import assert_close
from tests.policies.backbones import tiny_backbone
from tests.reference import DECODINGS, plain_forward_logps, rollout
from trl_diffusion import DTRPOConfig, set_spec
from trl_diffusion.policies.training import switch_off_router_loss
from trl_diffusion.scoring.estimators import ESTIMATORS, EstimatorConfig
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.score import score


@pytest.fixture
def experts(tokenizer, char_spec):
    """A small mixture of experts, whose config asks for router logits and has a coefficient for their loss."""

    def build(**changes):
        model = tiny_backbone(
            "qwen3_moe",
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            router_aux_loss_coef=0.01,
            **changes,
        )
        set_spec(model.config, char_spec)
        return model.eval()

    return build


@torch.no_grad()
def test_packed_scores_are_those_of_plain_passes(experts, char_spec):
    policy = experts(output_router_logits=True)
    batch = rollout(policy, DECODINGS["two-per-step"])
    layout = pack(
        batch, char_spec, ESTIMATORS["exact"].states(batch, char_spec, [0] * len(batch), EstimatorConfig("exact"))
    )
    logps, _ = score(policy, layout, char_spec)
    counted = batch.completion_mask
    plain = plain_forward_logps(policy, char_spec, batch, 1.0)
    assert_close(logps[counted], plain[counted])
    assert_close(batch.logps[counted], plain[counted])


def test_it_trains_and_says_what_is_off(make_trainer, experts, caplog):
    with caplog.at_level("WARNING"):
        trainer = make_trainer(experts(output_router_logits=True), max_steps=1)
    assert "load-balancing loss of the experts is off" in caplog.text and "router_aux_loss_coef=0.01" in caplog.text
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert "aux_loss" not in logged
    changed = [
        name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])
    ]
    assert any("experts" in name for name in changed)


def test_coefficients(tmp_path, experts, make_trainer):
    assert DTRPOConfig(str(tmp_path), bf16=False, router_aux_loss_coef=0.0).router_aux_loss_coef == 0.0
    with pytest.raises(ValueError, match="router_aux_loss_coef.*count the noisy copies"):
        DTRPOConfig(str(tmp_path), bf16=False, router_aux_loss_coef=0.1)
    assert switch_off_router_loss(experts()) == 0.01
    make_trainer(experts(), router_aux_loss_coef=0.0)
