"""What the families with experts do beyond the others: their experts in adapters, in files, in a backbone and in training."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Glm4MoeForCausalLM, Qwen3MoeForCausalLM

from tests.checkpoints import CONFIGS, EXPERTS, checkpoint, routes
from tests.closeness import assert_close
from tests.conftest import SPECS, make_policy
from trl_diffusion import get_spec
from trl_diffusion.policies.experts import counted_tokens, expert_layers
from trl_diffusion.policies.export import save_backbone
from trl_diffusion.policies.lora import check_targets, expert_names
from trl_diffusion.policies.policy import load_model, open_adapter
from trl_diffusion.policies.trial import try_policy


IDS = torch.arange(40)[None]
FUSED = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.fixture(params=EXPERTS)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return AutoModelForCausalLM.from_pretrained(checkpoint(family)).eval()


@torch.no_grad()
def test_an_adapter_on_experts_is_saved_and_merges_into_each_expert(model, family, tmp_path):
    assert expert_names(model) == FUSED
    options = {"target_modules": ["q_proj"], "target_parameters": FUSED, "r": 2, "init_lora_weights": False}
    check_targets(model, LoraConfig(**options))
    adapted = get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM")).eval()
    expected = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    reopened = open_adapter(str(tmp_path / "adapter"), "cpu").eval()
    assert torch.equal(reopened(IDS).logits, expected)

    reopened.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, published = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", checkpoint(family)))
    assert merged.keys() == published.keys()
    changed = {name for name in merged if not torch.equal(merged[name], published[name])}
    assert {name for name in merged if ".experts." in name} <= changed
    assert not any("gate.weight" in name or "embed" in name or "lm_head" in name for name in changed)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(again(IDS).logits, expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"target_modules": ["q_proj", "gate_up_proj"]}, r"\['gate_up_proj'\] match nothing.*target_parameters=\['mlp.experts.down"),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.up_proj"]}, r"target_parameters` \['experts.up_proj'\]"),
        ({"target_modules": [], "target_parameters": [*FUSED, "mlp.gates"]}, r"\['mlp.gates'\] match nothing.*'mlp.experts.gate_up"),
    ],
)  # fmt: skip
def test_targets_that_are_no_experts_are_named(targets, message):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llada2"))
    with pytest.raises(ValueError, match=message):
        check_targets(model, LoraConfig(**targets))


@pytest.mark.parametrize(("family", "stock"), [("llada2", Glm4MoeForCausalLM), ("sdar_moe", Qwen3MoeForCausalLM)])
@torch.no_grad()
def test_a_policy_is_saved_as_its_backbone(model, stock, tmp_path):
    save_backbone(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(plain) is stock and get_spec(plain.config) == get_spec(model.config)
    everyone = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    assert_close(plain(IDS, attention_mask=everyone).logits, model(IDS, attention_mask=everyone).logits)


def test_the_bias_of_the_router_keeps_its_precision(tmp_path):
    """It is no weight: it has no gradient, and stays in float32 where the weights are rounded."""
    model = load_model(str(checkpoint("llada2")), "cpu", dtype=torch.bfloat16)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    published = load_file(checkpoint("llada2") / "model.safetensors")
    assert len(biases) == 2 and not any("bias" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name in [name for name in published if "expert_bias" in name]:
        assert torch.equal(saved[name], published[name])


def test_the_bias_decides_the_choice_and_not_the_weights():
    """The reference by hand: eight experts in groups of two, two groups open, three experts chosen."""
    config = {
        **CONFIGS["llada2"],
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
    }
    logits = torch.tensor([2.0, -2.0, 1.5, -3.0, 0.8, 0.4, -1.5, -1.8])
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    # Sigmoids: .881 .119 .818 .047 .690 .599 .182 .142. With the bias, groups have 1.0, .865, 1.789, .324: the third and first
    # are open, and the experts 5 (1.099), 0 (.881) and 4 (.690) are chosen. Their weights are .599, .881, .690 by their sum.
    scores = {5: 0.598688, 0: 0.880797, 4: 0.689974}
    expected = {expert: 2.5 * score / sum(scores.values()) for expert, score in scores.items()}
    assert routes(logits, bias, config) == pytest.approx(expected, rel=1e-5)


def test_router_logits_that_a_config_asks_for_are_switched_off(model):
    """transformers' load-balancing loss cannot read a mask of our own, and would count copies."""
    model.config.output_router_logits = True
    try_policy(model, get_spec(model.config))
    assert model.config.output_router_logits is False


def test_the_class_of_a_config_opens_its_file(model, family, tmp_path):
    """PEFT opens configs so; LLaDA-MoE's `model_type` is LLaDA's in files."""
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == CONFIGS[family]["model_type"]
    again = type(model.config).from_pretrained(tmp_path)
    assert (again.model_type, again.num_experts) == (model.config.model_type, 8)


@torch.no_grad()
def test_experts_are_computed_in_one_grouped_product(model):
    """As those of the stock backbone. One after the other, they give the same."""
    assert model.config._experts_implementation == "grouped_mm"
    grouped = model(IDS).logits
    model.set_experts_implementation("eager")
    assert_close(model(IDS).logits, grouped)


@torch.no_grad()
def test_tokens_of_experts_are_counted():
    """By hand: the three experts with the largest products of a token and the rows of the router."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("sdar_moe")).eval()
    ids = torch.randint(8, 200, (2, 11), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 3, 12, 21])
    seen = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in model.model.layers]
    with counted_tokens(model, places) as found:
        model(ids)
    for hook in hooks:
        hook.remove()
    expected = [
        torch.zeros(8, dtype=torch.long).index_add(0, (hidden.flatten(0, 1)[places] @ layer.mlp.gate.weight.T).topk(3).indices.flatten(),
                                                   torch.ones(12, dtype=torch.long))
        for hidden, layer in zip(seen, model.model.layers, strict=True)
    ]  # fmt: skip
    assert len(found) == len(expected) == model.config.num_hidden_layers
    assert all(torch.equal(count, other) for count, other in zip(found, expected, strict=True))
    model(ids)
    assert len(found) == len(expected)  # no longer
    with counted_tokens(make_policy(SPECS["full"]), places) as none:
        pass
    assert none == []


def test_an_adapter_on_experts_does_not_hide_them():
    model = AutoModelForCausalLM.from_pretrained(checkpoint("sdar_moe"))
    layers = expert_layers(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_parameters=FUSED))
    assert expert_layers(wrapped) == layers and len(layers) == model.config.num_hidden_layers
    with counted_tokens(wrapped, torch.arange(5)) as found:
        wrapped(torch.arange(20, 28)[None])
    assert [int(count.sum()) for count in found] == [15] * len(layers)
