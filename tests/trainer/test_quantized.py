"""QLoRA: an adapter on weights of 4 bits, as the recipes for one 24 GB card have it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from tests.conftest import shared


bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")


@pytest.mark.slow
def test_an_adapter_trains_on_four_bits(make_trainer, tmp_path):
    trainer = make_trainer(
        str(shared("fixtures", "llada")),
        num_iterations=2,
        max_steps=2,
        max_completion_length=8,
        tokens_per_step=4,
        beta=0.1,
        diffusion_spec={"block_size": 8},
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=True,
        kwargs={
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=True,
            ),
            "peft_config": LoraConfig(r=4, target_modules="all-linear"),
        },
    )
    layers = [module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    before = [layer.weight.data.clone() for layer in layers]
    assert len(before) == 7 * trainer.model.config.num_hidden_layers and before[0].dtype == torch.uint8
    assert trainer.ref_model is None  # the reference is the policy without its adapter
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.tensor([entry["loss"], entry["grad_norm"]]).isfinite().all() for entry in logged)
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-6) and logged[1]["kl"] > 1e-5
    assert all(torch.equal(layer.weight.data, old) for layer, old in zip(layers, before, strict=True))
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved) and any(
        weight.any() for name, weight in saved.items() if "lora_B" in name
    )
