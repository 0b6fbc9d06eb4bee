"""A family's model as the plain backbone it is built on."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import trl_diffusion  # noqa: F401  (registers the families)
from tests.conftest import SPECS, make_policy, shared
from trl_diffusion import get_spec
from trl_diffusion.policies.export import save_backbone
from trl_diffusion.policies.spec import set_spec


@pytest.mark.parametrize(
    ("name", "model_type"), [("llada", "llama"), ("dream", "qwen2"), ("fast_dllm_v2", "qwen2"), ("sdar", "qwen3")]
)
@torch.no_grad()
def test_backbone_gives_the_same_logits(tmp_path, name, model_type):
    model = AutoModelForCausalLM.from_pretrained(shared("fixtures", name)).eval()
    set_spec(model.config, get_spec(model.config, {"mask_token_id": 150}))
    save_backbone(model, tmp_path)
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert backbone.config.model_type == model_type
    assert get_spec(backbone.config) == get_spec(model.config)
    ids = torch.randint(0, 140, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    assert torch.equal(model(ids, attention_mask=mask).logits, backbone(ids, attention_mask=mask).logits)


def test_a_plain_backbone_needs_no_export(tmp_path):
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is not of a diffusion family"):
        save_backbone(make_policy(SPECS["full"]), tmp_path)


def test_a_backbone_is_not_saved_beside_an_adapter(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(shared("fixtures", "sdar"))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="holds an adapter .* would save a whole model beside it"):
        save_backbone(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
