"""Nemotron-Labs-Diffusion on a Ministral3 backbone."""

from __future__ import annotations

import json
from typing import Any

from transformers.models.ministral3 import Ministral3Config, Ministral3ForCausalLM

from .configs import FamilyConfig
from .models import OwnAttention


class NemotronLabsDiffusionConfig(FamilyConfig, Ministral3Config):
    """
    The prompt and finished blocks are causal. The first token of a block is read from the position before it, the others
    from their own.

    Raises:
        ValueError: if the config says that the model is not denoised.
    """

    model_type = "nemotron_labs_diffusion"
    published_mask_id = 100
    denoising = {
        "attention": "block",
        "clean_attention": "causal",
        "block_origin": "response",
        "first_token": "autoregressive",
    }

    block_size: int = 32
    mask_token_id: int | None = 100
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if kwargs.get("dlm_paradigm") == "autoregressive":
            raise ValueError(
                "This Nemotron-Labs-Diffusion config has `dlm_paradigm='autoregressive'`: the model writes from left to right. "
                "Only 'bidirectional' and 'block_diff' can be loaded."
            )
        super().__post_init__(**kwargs)

    def spec_fields(self) -> dict[str, Any]:
        return {**super().spec_fields(), "block_size": self.block_size}

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff=use_diff))
        del values["rope_theta"], values["rope_scaling"]
        return json.dumps({**values, "rope_parameters": self.rope_parameters}, indent=2, sort_keys=True) + "\n"


class NemotronLabsDiffusionModel(OwnAttention, Ministral3ForCausalLM):
    config_class = NemotronLabsDiffusionConfig


NAMES = {r"^encoder\.": "model.", r"^diffusion_head\.": "lm_head."}
