"""
The sizes of the checkpoints that the recipes name, as their `config.json` states them. A plan needs nothing else of a checkpoint, so it
can be made where the hub cannot be reached.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..policies.loading import load_config


_QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152_064, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "GSAI-ML/LLaDA-8B-Instruct": {
        "model_type": "llada", "d_model": 4096, "mlp_hidden_size": 12_288, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
        "vocab_size": 126_464, "embedding_size": 126_464, "max_sequence_length": 4096, "rope_theta": 5e5, "weight_tying": False,
        "mask_token_id": 126_336, "eos_token_id": 126_081, "pad_token_id": 126_081,
    },
    "Dream-org/Dream-v0-Instruct-7B": {
        "model_type": "Dream", **_QWEN_7B, "max_position_embeddings": 131_072, "mask_token_id": 151_666,
        "eos_token_id": 151_643, "pad_token_id": 151_643,
    },
    "Efficient-Large-Model/Fast_dLLM_v2_7B": {
        "model_type": "Fast_dLLM_Qwen", **_QWEN_7B, "max_position_embeddings": 32_768, "bd_size": 32, "eos_token_id": 151_645,
    },
    "JetLM/SDAR-8B-Chat": {
        "model_type": "sdar", "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 32_768, "rope_theta": 1e6, "tie_word_embeddings": False, "block_size": 4,
        "mask_token_id": 151_669, "eos_token_id": 151_643, "pad_token_id": 151_643,
    },
    "inclusionAI/LLaDA2.0-mini": {
        "model_type": "llada2_moe", "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512,
        "num_hidden_layers": 20, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8, "topk_group": 4,
        "partial_rotary_factor": 0.5, "rope_theta": 6e5, "vocab_size": 157_184, "max_position_embeddings": 32_768,
        "tie_word_embeddings": False, "eos_token_id": 156_892, "pad_token_id": 156_892,
    },
}  # fmt: skip


def find_config(path: str, **options: Any) -> tuple[PretrainedConfig, bool]:
    """
    The config of a checkpoint, and whether it was read: where there is none to read, it is the one that the package knows.

    Args:
        path (`str`): directory or hub id.
        options (`dict`): passed on to [`load_config`].

    Raises:
        FileNotFoundError: if there is no such directory, nothing of this name on the hub, and the package does not know it.
        ValueError: see [`load_config`].
    """
    try:
        return load_config(path, **options), True
    except FileNotFoundError:
        if path not in PUBLISHED:
            raise
    values = deepcopy(PUBLISHED[path])
    return AutoConfig.for_model(values.pop("model_type"), **values), False
