"""The models of the families: stock backbones under the family's names, with the family's attention by default."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from ..forward import CACHE, attention_mask
from ..spec import sequence_blocks, spec_fields
from ..training import train_padding_token
from .configs import DreamConfig, Fast_dLLM_QwenConfig, LLaDAConfig, SDARConfig


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    _Backbone = PreTrainedModel
else:
    _Backbone = object  # the model that a family's is mixed with


def allowed_attention(fields: dict[str, Any], valid: Tensor, queries: int) -> Tensor:
    """
    Who may look at whom in a sequence whose response is not told apart from its prompt.

    Args:
        fields (`dict`): `attention`, `clean_attention` and `block_size` of the policy; blocks are counted from the first
            valid token.
        valid (boolean `Tensor` of shape `(R, keys)`): False for padding.
        queries (`int`): number of positions that look, the last ones of the sequence.

    Returns:
        boolean `Tensor` of shape `(R, 1, queries or 1, keys)`. A row that is all padding looks at itself.
    """
    keys = (valid | ~valid.any(1, keepdim=True))[:, None, None]
    # With a causal clean part, these are the tokens that are being denoised, if there is more than one of them.
    denoised = fields.get("clean_attention") == "causal" and fields["block_size"] > 1
    if fields.get("attention", "full") == "full" or denoised:
        return keys
    blocks = sequence_blocks(token_positions(valid), fields["block_size"])
    return keys & (blocks[:, None, None, :] <= blocks[:, None, -queries:, None])


def token_positions(valid: Tensor) -> Tensor:
    """Position of each token, counted from the first valid one, for a mask of shape `(R, keys)`; padding gets 0."""
    return ((valid.long().cumsum(1) - 1) * valid).clamp(min=0)


def own_attention(backbone: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """
    Forward pre-hook: where the caller gives no mask or a padding mask, gives the family's own attention to the
    backbone, which would be causal, and positions that padding does not move. A 4-D mask is left as it is.
    """
    names = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds")
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    padding = kwargs.get("attention_mask")
    if padding is not None and not (isinstance(padding, Tensor) and padding.ndim == 2):
        return (), kwargs

    tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    cache = kwargs.get("past_key_values") if kwargs.get(CACHE) is None else kwargs[CACHE]
    rows, queries = tokens.shape[:2]
    length = queries + (0 if cache is None else cache.get_seq_length())
    valid = torch.ones(rows, length, dtype=torch.bool, device=tokens.device)
    if padding is not None:
        valid[:, length - padding.shape[1] :] = padding.bool()
    allowed = allowed_attention(spec_fields(backbone.config), valid, queries)
    kwargs["attention_mask"] = attention_mask(backbone, allowed)
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = token_positions(valid)[:, -queries:]
    return (), kwargs


class OwnAttention(_Backbone):
    """Mixin for a model of a family: see [`own_attention`] and [`~policies.training.train_padding_token`]."""

    def __init__(self, config):
        super().__init__(config)
        self.base_model.register_forward_pre_hook(own_attention, with_kwargs=True)
        train_padding_token(self)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the code that lies beside a checkpoint goes along, for the family's own tools."""
        super().save_pretrained(save_directory, *args, **kwargs)
        origin, target = self.config._name_or_path, Path(save_directory)
        if kwargs.get("is_main_process", True) and getattr(self.config, "auto_map", None) and origin:
            for path in Path(origin).glob("*.py"):
                if not (target / path.name).exists():
                    shutil.copy(path, target)


class LLaDAModelLM(OwnAttention, LlamaForCausalLM):
    config_class = LLaDAConfig


class DreamModel(OwnAttention, Qwen2ForCausalLM):
    config_class = DreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Dream's tokenizer is Qwen2's under another name, which sends transformers to remote code."""


class Fast_dLLM_QwenModel(OwnAttention, Qwen2Model):
    config_class = Fast_dLLM_QwenConfig


class Fast_dLLM_QwenForCausalLM(OwnAttention, Qwen2ForCausalLM):
    config_class = Fast_dLLM_QwenConfig


class SDARModel(OwnAttention, Qwen3Model):
    config_class = SDARConfig


class SDARForCausalLM(OwnAttention, Qwen3ForCausalLM):
    config_class = SDARConfig


# LLaDA's weight names (behind `model.transformer.`) and the backbone's.
LLADA_NAMES = {
    r"wte": "model.embed_tokens",
    r"blocks\.(\d+)\.attn_norm": r"model.layers.\1.input_layernorm",
    r"blocks\.(\d+)\.q_proj": r"model.layers.\1.self_attn.q_proj",
    r"blocks\.(\d+)\.k_proj": r"model.layers.\1.self_attn.k_proj",
    r"blocks\.(\d+)\.v_proj": r"model.layers.\1.self_attn.v_proj",
    r"blocks\.(\d+)\.attn_out": r"model.layers.\1.self_attn.o_proj",
    r"blocks\.(\d+)\.ff_norm": r"model.layers.\1.post_attention_layernorm",
    r"blocks\.(\d+)\.ff_proj": r"model.layers.\1.mlp.gate_proj",
    r"blocks\.(\d+)\.up_proj": r"model.layers.\1.mlp.up_proj",
    r"blocks\.(\d+)\.ff_out": r"model.layers.\1.mlp.down_proj",
    r"ln_f": "model.norm",
    r"ff_out": "lm_head",
}
