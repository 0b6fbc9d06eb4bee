"""Tiny random models of transformers' causal backbones."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel


VOCABULARY = 64
# What configs call their sizes. Each takes those that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "num_local_experts_per_tok", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    "attention_hidden_size": 32,
    "encoder_attention_heads": 4,
    "decoder_start_token_id": 2,
    "initializer_range": 0.3,
    "is_decoder": True,
    "moe_layer_start_index": 0,
    "n_kv_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of the sizes, what fits together in some backbones only.
OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "qk_head_dim": 8, "head_dim": 4},
    {"num_heads": 8, "head_dim": 8},
    {"attention_types": [[["global", "local"], 1]], "window_size": 128},
    {"layer_types": ["full_attention", "linear_attention"]},
    {"num_experts_per_tok": 1},
    {"num_hidden_layers": 3},
)
BACKBONES = sorted(
    {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING if config.model_type in CONFIG_MAPPING}
)
LARGEST = 3_000_000  # parameters


class TooLarge(Exception):
    """A backbone of which there is no tiny one."""


def tiny_config(model_type: str, **changes: Any):
    """A config of this type with small sizes."""
    config_class = CONFIG_MAPPING[model_type]
    known = config_class()
    names = set(known.to_dict()) | set(known.attribute_map)
    values = {name: value for name, value in {**SMALL, **changes}.items() if name in names or name in changes}
    for alias, name in known.attribute_map.items():
        if alias in values and name in values:
            del values[alias]
    return config_class(**values)


def tiny_backbone(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of this type, in evaluation mode. The global random state is left alone."""
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise TooLarge(f"{model_type}: its sizes have other names, this would have {size} parameters.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def any_tiny_backbone(model_type: str) -> PreTrainedModel | str:
    """A random model of this type with sizes that fit together, or why there is none."""
    found = _changes(model_type)
    return found if isinstance(found, str) else tiny_backbone(model_type, **found)


@cache
@torch.no_grad()
def _changes(model_type: str) -> dict[str, Any] | str:
    """Which of the other sizes fit, or why none do."""
    reason = ""
    for changes in OTHERS:
        try:
            tiny_backbone(model_type, **changes)(input_ids=torch.arange(5, 13)[None])
        except TooLarge as error:  # with these and with others
            return str(error)
        except Exception as error:  # whatever a config finds wrong
            reason = reason or f"{type(error).__name__}: {error}"
        else:
            return changes
    return reason
