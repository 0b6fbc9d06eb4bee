"""The plan of a mixture of experts: what all experts take, and what a token uses."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import CONFIGS, checkpoint
from tests.closeness import assert_close
from trl_diffusion import get_spec
from trl_diffusion.commands.plan import main
from trl_diffusion.plan.cost import rollout_cost
from trl_diffusion.plan.simulate import Workload, _evenly, simulate
from trl_diffusion.policies.loading import load_config


WORK = Workload(batch_size=2, num_generations=2, prompt_length=16, completion_length=16, rollout_batch_size=2)


def test_experts_are_counted_and_used_in_part():
    config, shape = load_config(checkpoint("llada2")), CONFIGS["llada2"]
    footprint = simulate(config, get_spec(config), WORK)
    expert = 3 * shape["hidden_size"] * shape["moe_intermediate_size"]
    layers = shape["num_hidden_layers"] - shape["first_k_dense_replace"]
    assert footprint.experts == layers * shape["num_experts"] * expert
    assert footprint.used_experts == layers * shape["num_experts_per_tok"] * expert
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llada2"))
    assert footprint.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (
        footprint.used
        == footprint.parameters - layers * (shape["num_experts"] - shape["num_experts_per_tok"]) * expert
    )
    assert footprint.activations > 0 and footprint.update_flops > 2 * footprint.score_flops

    # With twice as many experts a token uses as many weights, and a rollout takes as many operations.
    config.n_routed_experts *= 2
    wider = simulate(config, get_spec(config), WORK)
    router = layers * shape["num_experts"] * shape["hidden_size"]
    assert (wider.used, wider.experts) == (footprint.used + router, 2 * footprint.experts)
    costs = [rollout_cost(config, get_spec(config), WORK, one).flops for one in (footprint, wider)]
    assert costs[0] == costs[1]


@torch.no_grad()
def test_the_stand_in_computes_what_experts_compute():
    """If the router sends three of 24 copies of tokens to each of eight experts, whichever they are."""
    module = AutoModelForCausalLM.from_pretrained(checkpoint("sdar_moe")).model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(8, 32, generator=generator), torch.rand(8, 3, generator=generator)
    chosen = (torch.randperm(24, generator=generator) // 3).reshape(8, 3)
    assert_close(_evenly(module, hidden, chosen, weights), module(hidden, chosen, weights))


@pytest.mark.long
def test_the_plan_of_a_published_checkpoint(capsys, monkeypatch):
    """
    LLaDA2.0-mini by its published shape. An expert has 3 x 2048 x 512 weights; there are 256 in each of 19 layers, and a token uses 8
    and a shared one. LoRA keeps all weights in bfloat16 on one GPU. Eight GPUs share weights, gradients and the three copies of AdamW.
    """
    experts, gib = 19 * 256 * 3 * 2048 * 512, 2.0**30
    model = ["inclusionAI/LLaDA2.0-mini", "--memory", "80"]
    assert main([*model, "--config", "llada2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    footprint = found["footprints"]["full"]
    assert footprint["experts"] == experts and footprint["used_experts"] == experts / 32
    plans = {plan["name"]: plan for plan in found["plans"]}
    whole, lora, qlora = plans["DDP, full"], plans["DDP, LoRA"], plans["DDP, QLoRA"]
    assert not whole["fits"] and lora["fits"] and qlora["fits"]
    weights = 2 * (footprint["parameters"] + found["footprints"]["lora"]["trainable"])
    assert lora["weights"] == pytest.approx(weights, rel=0.01)
    assert weights < lora["peak"] < 80 * gib / 2
    # Fused experts are no linear layers, which 4 bits leave as they are.
    assert qlora["weights"] > 2 * experts

    assert main([*model, "--config", "llada2_8gpu", "--gpus", "8", "--json"]) == 0
    plans = {plan["name"]: plan for plan in json.loads(capsys.readouterr().out)["plans"]}
    assert not plans["DDP, full"]["fits"] and not plans["ZeRO-2, full"]["fits"] and plans["ZeRO-3, full"]["fits"]
    shared = plans["ZeRO-3, full"]
    assert shared["weights"] == pytest.approx(2 * footprint["parameters"] / 8, rel=0.01)
    assert shared["optimizer"] == pytest.approx(12 * footprint["parameters"] / 8, rel=0.01)
    assert shared["rollout"] > 2 * footprint["parameters"]  # gathered
