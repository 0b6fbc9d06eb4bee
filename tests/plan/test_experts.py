"""The plan of a mixture of experts: what all experts take, and what a token uses."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import CONFIGS, checkpoint
from tests.closeness import assert_close
from trl_diffusion import get_spec
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
