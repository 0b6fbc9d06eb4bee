"""dllm's autoregressive models that were made to denoise ("Tiny-A2D"), on Qwen2 and Qwen3 backbones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from .configs import FamilyConfig
from .models import OwnAttention


class A2DConfig(FamilyConfig):
    """
    What these models share. Their config does not say how they were trained, and only their tokenizer knows the mask token.
    """

    published_mask_id = -1  # no config names it
    denoising = {"block_size": 32}
    unsaid = {
        "attention": "whether it was trained as MDLM or as BD3LM. Pass diffusion_spec={'attention': 'full', 'block_origin': "
        "'response'} for MDLM, {'attention': 'block'} for BD3LM (the hub id says which).",
        "block_origin": "where its blocks are counted from. With full attention, as of MDLM, pass diffusion_spec={'attention': "
        "'full', 'block_origin': 'response'}.",
    }
    backbone_only = ("layer_types",)

    def left_open(self, values: Mapping[str, Any]) -> dict[str, str]:
        """As in the base class; blocks of BD3LM are counted from position 0."""
        found = super().left_open(values)
        if values.get("attention") == "block":
            found.pop("block_origin", None)
        return found


class A2DQwen2Config(A2DConfig, Qwen2Config):
    model_type = "a2d-qwen2"
    mask_token_id: int | None = None


class A2DQwen3Config(A2DConfig, Qwen3Config):
    model_type = "a2d-qwen3"
    mask_token_id: int | None = None


class A2DQwen2LMHeadModel(OwnAttention, Qwen2ForCausalLM):
    config_class = A2DQwen2Config


class A2DQwen3LMHeadModel(OwnAttention, Qwen3ForCausalLM):
    config_class = A2DQwen3Config
