"""QLoRA: an adapter on weights of 4 bits, as the recipes for one 24 GB card have it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from trl_diffusion import tiny_policy_path


bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")


@pytest.fixture
def four_bit_trainer(make_trainer):
    """A trainer of an adapter on weights of 4 bits."""

    def build(**options):
        return make_trainer(
            tiny_policy_path(),
            num_iterations=2,
            max_completion_length=8,
            tokens_per_step=4,
            bf16=True,
            use_cpu=True,
            kwargs={
                "quantization_config": BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_compute_dtype=torch.bfloat16,
                    bnb_4bit_use_double_quant=True,
                ),
                "peft_config": LoraConfig(r=4, target_modules="all-linear"),
            },
            **options,
        )

    return build


def four_bit_layers(trainer) -> list:
    return [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


@pytest.mark.slow
def test_an_adapter_trains_on_four_bits(four_bit_trainer, tmp_path):
    trainer = four_bit_trainer(max_steps=2, beta=0.1, gradient_checkpointing=True)
    layers = four_bit_layers(trainer)
    before = [layer.weight.data.clone() for layer in layers]
    assert len(before) == 7 * trainer.model.config.num_hidden_layers and before[0].dtype == torch.uint8
    assert trainer.ref_model is None  # the reference is the policy without its adapter
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.tensor([entry["loss"], entry["grad_norm"]]).isfinite().all() for entry in logged)
    assert logged[0]["kl"] < 1e-6 < logged[1]["kl"] / 10
    assert all(torch.equal(layer.weight.data, old) for layer, old in zip(layers, before, strict=True))
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved) and any(
        weight.any() for name, weight in saved.items() if "lora_B" in name
    )


@pytest.mark.parametrize("has_avx512_bf16", [False, True])
def test_weights_stay_as_they_are_trained(four_bit_trainer, monkeypatch, has_avx512_bf16):
    """
    Whatever the processor: bitsandbytes packs weights in evaluation mode, as in a rollout, if it has `avx512_bf16`. A
    packed layer has no backward pass.
    """
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: has_avx512_bf16)
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    layer(torch.ones(1, 64))
    assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == has_avx512_bf16  # it does

    trainer = four_bit_trainer(max_steps=1)
    layers = four_bit_layers(trainer)
    states = [(layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()) for layer in layers]
    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        trainer.model(torch.full((1, 8), 5))
    for layer, (weight, absmax) in zip(layers, states, strict=True):
        assert torch.equal(layer.weight.data, weight) and torch.equal(layer.weight.quant_state.absmax, absmax)
