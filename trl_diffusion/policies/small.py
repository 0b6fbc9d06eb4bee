"""Small randomly initialised backbones, for policies that are trained from the beginning."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from ..utils import seeded
from .spec import DiffusionSpec, set_spec


CONTEXT = 512


def small_config(
    tokenizer: PreTrainedTokenizerBase, hidden_size: int, num_layers: int, spec: DiffusionSpec | None = None
) -> Qwen3Config:
    """
    The config of a stock Qwen3 backbone with four heads.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        hidden_size (`int`): width, a multiple of 8.
        num_layers (`int`): layers.
        spec ([`DiffusionSpec`], *optional*): how it is denoised. Without one, it is an autoregressive model.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden_size // 4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    if spec is not None:
        set_spec(config, spec)
    return config


def load_small(path: str | Path) -> Qwen3ForCausalLM:
    """A saved model of this kind, in float32. Unlike a policy, it may be autoregressive."""
    return Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)


def random_model(config: Qwen3Config, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised model. Equal seeds and shapes give equal weights. The global random state stays as it was."""
    with seeded(seed):
        return Qwen3ForCausalLM(config)
