"""What a few layers say about all of them, and the sizes that the package knows."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest
import torch

from tests.conftest import SPECS, make_policy
from trl_diffusion.plan import layers, published
from trl_diffusion.plan.layers import cut, simulate_layers, uniform_from
from trl_diffusion.plan.simulate import Footprint, Workload, simulate
from trl_diffusion.policies.families.configs import LLaDA2MoeConfig
from trl_diffusion.policies.lora import empty_model
from trl_diffusion.policies.spec import get_spec


@pytest.mark.long
def test_each_further_layer_needs_the_same(monkeypatch):
    """Seven layers, one by one, beside what two and three of them say."""
    monkeypatch.setattr(layers, "FEW", 3)
    spec = SPECS["block-from-sequence"]
    config = make_policy(spec, num_hidden_layers=7, vocab_size=400).config
    work = Workload(4, 2, 16, 16, rollout_batch_size=4)
    for rank in (None, 4):
        found, whole = (one(config, spec, work, torch.bfloat16, lora_rank=rank) for one in (simulate_layers, simulate))
        assert asdict(found) == asdict(whole)


def test_what_is_left_out_is_added(monkeypatch):
    """100 for the embeddings and 10 for each layer, but for what the largest part needs; and no sum that falls with the layers."""

    def count(config, *args, **options):
        each = 100 + 10 * config.num_hidden_layers
        values = {one.name: each for one in fields(Footprint)}
        return Footprint(**{**values, "largest_layer": 7, "activations": 200 - 10 * config.num_hidden_layers})

    monkeypatch.setattr(layers, "simulate", count)
    config = make_policy(SPECS["full"], num_hidden_layers=40).config
    found = simulate_layers(config, SPECS["full"], Workload())
    assert (found.weights, found.update_flops, found.largest_layer, found.activations) == (500, 500, 7, 170)
    whole = simulate_layers(config, SPECS["full"], Workload(), torch.float32, autocast=True)
    assert whole.activations == -200  # of all layers, one by one
    config.num_hidden_layers = 5
    assert simulate_layers(config, SPECS["full"], Workload()).activations == 150


def test_a_cut_keeps_what_is_not_a_layer():
    config = make_policy(SPECS["block-from-sequence"], num_hidden_layers=5).config
    less, model = (empty_model(one) for one in (cut(config, 2), config))
    names = {name for name, _ in model.named_parameters()}
    left_out = {name for name in names if any(f".layers.{number}." in name for number in (2, 3, 4))}
    assert {name for name, _ in less.named_parameters()} == names - left_out and config.num_hidden_layers == 5


def test_dense_layers_before_experts_are_not_taken_for_the_others():
    config = LLaDA2MoeConfig(first_k_dense_replace=2, num_hidden_layers=6)
    assert uniform_from(config) == 3
    assert uniform_from(make_policy(SPECS["full"]).config) == 1


# Billions of weights, as the model cards and papers of these checkpoints give them.
WEIGHTS = {
    "GSAI-ML/LLaDA-8B-Instruct": 8.02,
    "Dream-org/Dream-v0-Instruct-7B": 7.62,
    "Efficient-Large-Model/Fast_dLLM_v2_7B": 7.62,
    "JetLM/SDAR-8B-Chat": 8.19,
    "inclusionAI/LLaDA2.0-mini": 16.26,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_sizes_that_the_package_knows(name):
    """Where the hub is not reached. Its families say the mask token, or that only the tokenizer knows it."""
    config, is_read = published.find_config(name)
    assert not is_read
    assert sum(weight.numel() for weight in empty_model(config).parameters()) == pytest.approx(
        WEIGHTS[name] * 1e9, rel=2e-3
    )
    fields = {"mask_token_id": 151_665} if "Fast" in name else {}
    spec = get_spec(config, fields)
    assert spec.mask_token_id == config.published_mask_id and spec.stop_token_ids == config.published_stop_ids


def test_an_unknown_checkpoint_is_not_made_up():
    with pytest.raises(FileNotFoundError, match="There is no directory nobody/nothing"):
        published.find_config("nobody/nothing")
