"""The models of the families: stock backbones under the family's names, with the family's attention by default."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    Glm4MoeForCausalLM,
    Glm4MoeModel,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from ..forward import CACHE, attention_mask
from ..spec import sequence_blocks, spec_fields
from ..training import train_padding_token
from ..whole import open_whole
from .configs import (
    DreamConfig,
    Fast_dLLM_QwenConfig,
    ILLaDAConfig,
    LLaDA2MoeConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    SDARConfig,
    SDARMoeConfig,
)


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
    """
    Mixin for a model of a family: see [`own_attention`], [`~policies.training.train_padding_token`] and
    [`~policies.whole.open_whole`].
    """

    def __init__(self, config):
        super().__init__(config)
        self.base_model.register_forward_pre_hook(own_attention, with_kwargs=True)
        train_padding_token(self)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """
        Whether experts may be computed in one grouped product. Transformers decides this by the file of a class; here, by that of the
        backbone. Otherwise all experts would be computed one after the other.
        """
        backbone: Any = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        return backbone._can_set_experts_implementation()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        load = super().from_pretrained.__func__  # type: ignore[attr-defined]
        return open_whole(load, cls, pretrained_model_name_or_path, *args, **kwargs)

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


class ILLaDAForCausalLM(OwnAttention, LlamaForCausalLM):
    config_class = ILLaDAConfig


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


class LLaDA2MoeModel(OwnAttention, Glm4MoeModel):
    config_class = LLaDA2MoeConfig
    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012  (GLM's are layers that have another use here)


class LLaDA2MoeModelLM(OwnAttention, Glm4MoeForCausalLM):
    config_class = LLaDA2MoeConfig
    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012


class SDARMoeModel(OwnAttention, Qwen3MoeModel):
    config_class = SDARMoeConfig


class SDARMoeForCausalLM(OwnAttention, Qwen3MoeForCausalLM):
    config_class = SDARMoeConfig


class LLaDAMoEModelLM(OwnAttention, Qwen3MoeForCausalLM):
    config_class = LLaDAMoEConfig


class SplitHeads(ConversionOps):
    """Makes the weights of queries, keys and values of one matrix, whose rows are those of the queries, keys and values."""

    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        found = next(iter(input_dict.values()))
        heads, pairs = config.num_attention_heads, config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        rows = torch.split(found[0] if isinstance(found, list) else found, [heads * size, pairs * size, pairs * size])
        return {name: part.contiguous() for name, part in zip(target_patterns, rows, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


# LLaDA 2's weight names and the backbone's, without those of the experts.
LLADA2_NAMES: list[WeightConverter | WeightRenaming] = [
    WeightRenaming("word_embeddings", "embed_tokens"),
    WeightRenaming("attention.dense", "self_attn.o_proj"),
    WeightRenaming("attention.query_layernorm", "self_attn.q_norm"),
    WeightRenaming("attention.key_layernorm", "self_attn.k_norm"),
    WeightRenaming("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
    WeightConverter(
        "attention.query_key_value.weight",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        operations=[SplitHeads()],
    ),
]

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
