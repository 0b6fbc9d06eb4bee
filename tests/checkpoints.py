"""
Tiny checkpoints in the files and names that families publish, and what they compute: written from the published models, token by
token and expert by expert, without transformers.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import shared


Weights = dict[str, Tensor]

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.3, "num_experts": 8,
    "num_experts_per_tok": 3, "mask_token_id": 300, "eos_token_id": 290, "pad_token_id": 290, "use_cache": False,
    "output_router_logits": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llada2": {
        **SIZES, "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "head_dim": 16, "intermediate_size": 48,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1, "num_shared_experts": 2, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "score_function": "sigmoid", "partial_rotary_factor": 0.5,
        "use_qk_norm": True, "use_bias": False, "use_qkv_bias": False, "norm_head": False, "embedding_dropout": 0.0,
        "output_dropout": 0.0, "router_dtype": "fp32", "use_sliding_window": False, "sliding_window": None,
        "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
    },
    "sdar_moe": {
        **SIZES, "architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "head_dim": 8, "intermediate_size": 48,
        "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001, "block_size": 4, "attention_bias": False, "use_sliding_window": False,
        "auto_map": {"AutoConfig": "configuration_sdar_moe.SDARMoeConfig"},
    },
    "llada_moe": {
        **SIZES, "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "dense_intermediate_size": 48,
        "expert_intermediate_size": 24, "shared_expert_intermediate_size": None, "norm_topk_prob": None,
        "moe_layer_freq": [0, 1, 1], "qk_layernorm": True, "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False, "routed_scaling_factor": 1, "partial_rotary_factor": 1, "clip_qkv": None,
        "router_num_group": None, "router_topk_group": None, "attention_bias": False, "router_aux_loss_coef": 0.01,
        "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig"},
    },
    "illada": {
        **SIZES, "architectures": ["ILLaDAForCausalLM"], "model_type": "illada", "intermediate_size": 48,
        "attention_bias": False, "mlp_bias": False, "layer_norm_eps": None, "resid_pdrop": 0.0, "tie_word_embeddings": True,
        "auto_map": {"AutoConfig": "configuration_illada.ILLaDAConfig"},
    },
    "stable_diffcoder": {
        **SIZES, "architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama", "intermediate_size": 48,
        "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
    },
}  # fmt: skip
EXPERTS = ("llada2", "sdar_moe", "llada_moe")
for _name in set(CONFIGS) - set(EXPERTS):
    for _entry in ("num_experts", "num_experts_per_tok", "output_router_logits"):
        del CONFIGS[_name][_entry]
del CONFIGS["stable_diffcoder"]["mask_token_id"]  # only its code names it


def head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def dense_layers(config: dict[str, Any]) -> list[int]:
    if config["model_type"] == "llada2_moe":
        return list(range(config["first_k_dense_replace"]))
    if "num_experts" not in config:
        return list(range(config["num_hidden_layers"]))
    return [layer for layer, experts in enumerate(config.get("moe_layer_freq", ())) if not experts]


def random_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    """Weights under the published names. Norms and the bias of the router are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    pairs, size = config["num_key_value_heads"], head_size(config)
    second = config["model_type"] == "llada2_moe"
    expert = config.get("moe_intermediate_size") or config.get("expert_intermediate_size") or 0
    normed = "num_experts" in config
    dense = config.get("intermediate_size") or config["dense_intermediate_size"]
    weights: Weights = {}

    def put(name: str, *shape: int, scale: float = 0.3, center: float = 0.0) -> None:
        weights[f"{name}.weight"] = center + scale * torch.randn(shape, generator=generator)

    def norm(name: str, length: int) -> None:
        put(name, length, scale=0.2, center=1.0)

    def mlp(name: str, inner: int) -> None:
        for part, shape in {
            "gate_proj": (inner, width),
            "up_proj": (inner, width),
            "down_proj": (width, inner),
        }.items():
            put(f"{name}.{part}", *shape)

    put("model.word_embeddings" if second else "model.embed_tokens", config["vocab_size"], width)
    if not config["tie_word_embeddings"]:
        put("lm_head", config["vocab_size"], width)
    norm("model.norm", width)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        norm(f"{name}.input_layernorm", width)
        norm(f"{name}.post_attention_layernorm", width)
        attention = f"{name}.attention" if second else f"{name}.self_attn"
        norms = ("query_layernorm", "key_layernorm") if second else ("q_norm", "k_norm")
        for part in norms * normed:
            norm(f"{attention}.{part}", size)
        if second:
            put(f"{attention}.query_key_value", (heads + 2 * pairs) * size, width)
            put(f"{attention}.dense", width, heads * size)
        else:
            for part, number in {"q_proj": heads, "k_proj": pairs, "v_proj": pairs}.items():
                put(f"{attention}.{part}", number * size, width)
            put(f"{attention}.o_proj", width, heads * size)
        if layer in dense_layers(config):
            mlp(f"{name}.mlp", dense)
            continue
        put(f"{name}.mlp.gate", config["num_experts"], width)
        for number in range(config["num_experts"]):
            mlp(f"{name}.mlp.experts.{number}", expert)
        if second:
            weights[f"{name}.mlp.gate.expert_bias"] = 0.3 * torch.rand(config["num_experts"], generator=generator)
            mlp(f"{name}.mlp.shared_experts", expert * config["num_shared_experts"])
    return weights


@cache
def _written(family: str) -> tuple[tempfile.TemporaryDirectory, Weights]:
    folder = tempfile.TemporaryDirectory()  # removed when the tests end
    weights = random_weights(CONFIGS[family])
    save_file(weights, Path(folder.name, "model.safetensors"), metadata={"format": "pt"})
    Path(folder.name, "config.json").write_text(json.dumps(CONFIGS[family]))
    return folder, weights


def checkpoint(family: str) -> Path:
    """Directory of a tiny checkpoint of a family, in its own format."""
    return Path(_written(family)[0].name) if family in CONFIGS else shared("fixtures", family)


# ---------------------------------------------------------------------------------------------------- what they compute


def allowed_pairs(family: str, length: int) -> Tensor:
    """Who sees whom in a sequence, `(length, length)`: everybody, or by blocks from position 0."""
    size = {"llada2": 32, "sdar_moe": 4, "stable_diffcoder": 4}.get(family, length)
    blocks = torch.arange(length) // size
    return blocks[None, :] <= blocks[:, None]


def reference_logits(family: str, ids: Tensor) -> Tensor:
    """Logits of one sequence, `(length, vocab_size)`, in float64."""
    config = CONFIGS[family]
    weights = {name: weight.double() for name, weight in _written(family)[1].items()}
    second = family == "llada2"
    hidden = weights["model.word_embeddings.weight" if second else "model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): weight
            for name, weight in weights.items()
            if f"layers.{layer}." in name
        }
        normed = _norm(hidden, own["input_layernorm.weight"], config)
        hidden = hidden + _attention(own, normed, config, allowed_pairs(family, len(ids)))
        normed = _norm(hidden, own["post_attention_layernorm.weight"], config)
        hidden = hidden + torch.stack([_feed_forward(own, token, config) for token in normed])
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return _norm(hidden, weights["model.norm.weight"], config) @ head.T


def _norm(hidden: Tensor, weight: Tensor | None, config: dict[str, Any]) -> Tensor:
    if weight is None:
        return hidden
    return weight * hidden / (hidden.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def _attention(own: Weights, hidden: Tensor, config: dict[str, Any], allowed: Tensor) -> Tensor:
    heads, pairs, size = config["num_attention_heads"], config["num_key_value_heads"], head_size(config)
    if config["model_type"] == "llada2_moe":
        rows = hidden @ own["attention.query_key_value.weight"].T
        query, key, value = rows.split([heads * size, pairs * size, pairs * size], -1)
        query_norm, key_norm = own["attention.query_layernorm.weight"], own["attention.key_layernorm.weight"]
        output = own["attention.dense.weight"]
    else:
        query, key, value = (hidden @ own[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        query_norm, key_norm = own.get("self_attn.q_norm.weight"), own.get("self_attn.k_norm.weight")
        output = own["self_attn.o_proj.weight"]
    results = []
    for head in range(heads):
        shared_head = head // (heads // pairs)
        mine = slice(head * size, (head + 1) * size)
        theirs = slice(shared_head * size, (shared_head + 1) * size)
        asked = _rotated(_norm(query[:, mine], query_norm, config), config)
        known = _rotated(_norm(key[:, theirs], key_norm, config), config)
        scores = (asked @ known.T / size**0.5).masked_fill(~allowed, -torch.inf)
        results.append(scores.softmax(-1) @ value[:, theirs])
    return torch.cat(results, -1) @ output.T


def _rotated(vectors: Tensor, config: dict[str, Any]) -> Tensor:
    """Pairs `(i, i + turned / 2)` of the first `turned` entries are turned by an angle; the rest stays."""
    turned = int(vectors.shape[-1] * config.get("partial_rotary_factor", 1))
    half = turned // 2
    speeds = config["rope_theta"] ** (-torch.arange(half).double() * 2 / turned)
    angles = torch.arange(len(vectors)).double()[:, None] * speeds
    first, other = vectors[:, :half], vectors[:, half:turned]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - other * sin, other * cos + first * sin, vectors[:, turned:]], -1)


def _mlp(own: Weights, name: str, token: Tensor) -> Tensor:
    gate, up, down = (own[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    opened = gate @ token
    return down @ (opened * opened.sigmoid() * (up @ token))


def _feed_forward(own: Weights, token: Tensor, config: dict[str, Any]) -> Tensor:
    if "mlp.gate_proj.weight" in own:
        return _mlp(own, "mlp", token)
    chosen = routes(own["mlp.gate.weight"] @ token, own.get("mlp.gate.expert_bias"), config)
    result = torch.zeros_like(token)
    for expert, weight in chosen.items():
        result += weight * _mlp(own, f"mlp.experts.{expert}", token)
    if config.get("num_shared_experts"):
        result += _mlp(own, "mlp.shared_experts", token)
    return result


def routes(logits: Tensor, bias: Tensor | None, config: dict[str, Any]) -> dict[int, float]:
    """The experts of a token and their weights, from the logits of the router."""
    most = config["num_experts_per_tok"]
    if config["model_type"] != "llada2_moe":
        shares = logits.softmax(0).tolist()
        best = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:most]
        total = sum(shares[expert] for expert in best) if config["norm_topk_prob"] else 1.0
        return {expert: shares[expert] / total for expert in best}
    assert bias is not None
    scores = logits.sigmoid().tolist()
    liked = [score + extra for score, extra in zip(scores, bias.tolist(), strict=True)]
    size = len(liked) // config["n_group"]
    groups = [range(start, start + size) for start in range(0, len(liked), size)]
    groups.sort(key=lambda group: -sum(sorted(liked[expert] for expert in group)[-2:]))
    open_experts = [expert for group in groups[: config["topk_group"]] for expert in group]
    best = sorted(open_experts, key=lambda expert: -liked[expert])[:most]
    total = sum(scores[expert] for expert in best)
    return {expert: scores[expert] / total * config["routed_scaling_factor"] for expert in best}
