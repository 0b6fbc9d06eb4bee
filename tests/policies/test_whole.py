"""A checkpoint whose weights are not those of its model does not open, and the error names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.checkpoints import checkpoint
from trl_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, DTRPOConfig, DTRPOTrainer, tiny_policy_path
from trl_diffusion.policies.loading import load_config
from trl_diffusion.policies.policy import load_model, open_adapter, open_policy
from trl_diffusion.policies.whole import only_whole_models


# A weight of each family, as its files and as the errors call it.
WEIGHTS = {
    "llada": ("model.transformer.blocks.1.attn_out.weight", "model.layers.1.self_attn.o_proj.weight"),
    "dream": ("model.layers.1.self_attn.q_proj.bias",) * 2,
    "fast_dllm_v2": ("model.layers.0.mlp.down_proj.weight",) * 2,
    "sdar": ("model.layers.1.self_attn.k_norm.weight",) * 2,
    "sdar_moe": ("model.layers.1.mlp.gate.weight",) * 2,
    "llada_moe": ("model.layers.0.mlp.up_proj.weight",) * 2,
    "llada2": ("model.layers.1.mlp.gate.expert_bias", "model.layers.1.mlp.gate.e_score_correction_bias"),
    "illada": ("model.layers.0.self_attn.v_proj.weight",) * 2,
}


def rewrite(source: Path, folder: Path, change, files: int = 1, **config) -> str:
    """Writes a changed checkpoint: `change` gets its weights by name. In several files, with an index, if asked."""
    folder.mkdir(exist_ok=True)
    weights: dict[str, Tensor] = load_file(source / "model.safetensors")
    change(weights)
    values = {**json.loads((source / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(values))
    names = sorted(weights)
    places = {f"model-{part + 1:05}-of-{files:05}.safetensors": names[part::files] for part in range(files)}
    if files == 1:
        places = {"model.safetensors": names}
    for file, part in places.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in places.items() for name in part}}
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize(
    ("family", "files"), [(family, 1 + 2 * (number % 2)) for number, family in enumerate(WEIGHTS)]
)
def test_weights_that_are_missing_or_left_over_are_named(tmp_path, family, files):
    source, (saved, known) = checkpoint(family), WEIGHTS[family]
    AutoModelForCausalLM.from_pretrained(rewrite(source, tmp_path / "whole", lambda weights: None, files))

    path = rewrite(source, tmp_path / "less", lambda weights: weights.pop(saved), files)
    with pytest.raises(ValueError, match=rf"1 missing \({known}\). .*config.json.*docs/howto/family.md"):
        AutoModelForCausalLM.from_pretrained(path)
    path = rewrite(source, tmp_path / "more", lambda weights: weights.update(stray=torch.ones(1)), files)
    with pytest.raises(ValueError, match=r"1 left over \(stray\)"):
        AutoModelForCausalLM.from_pretrained(path)

    def rename(weights):
        weights[saved.replace(".1.", ".7.").replace(".0.", ".7.")] = weights.pop(saved)

    path = rewrite(source, tmp_path / "renamed", rename, files)
    with pytest.raises(ValueError, match=rf"1 missing \({known}\); 1 left over \([^)]*\.7\.[^)]*\)"):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("family", ["llada2", "sdar_moe", "llada_moe"])
def test_parts_of_experts_and_of_fused_matrices_are_named(tmp_path, family):
    source, expert = checkpoint(family), "model.layers.2.mlp.experts.5"
    path = rewrite(source, tmp_path / "part", lambda weights: weights.pop(f"{expert}.up_proj.weight"))
    with pytest.raises(ValueError, match=rf"do not make up those.*1 missing \({expert}.up_proj.weight\)"):
        AutoModelForCausalLM.from_pretrained(path)

    def lose(weights):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights.pop(f"{expert}.{name}.weight")

    path = rewrite(source, tmp_path / "expert", lose)
    with pytest.raises(
        ValueError, match=r"2 of another shape \(model.layers.2.mlp.experts.down_proj \(\(7, 32, 24\) instead"
    ):
        AutoModelForCausalLM.from_pretrained(path)
    if family == "llada2":
        fused = "model.layers.0.attention.query_key_value.weight"
        path = rewrite(source, tmp_path / "fused", lambda weights: weights.pop(fused))
        with pytest.raises(ValueError, match="3 missing .*layers.0.self_attn.k_proj.weight"):
            AutoModelForCausalLM.from_pretrained(path)


def test_without_names_the_reason_is_that_of_transformers(tmp_path):
    """Weights that are not in files of safetensors are not looked through."""
    weights = load_file(checkpoint("sdar_moe") / "model.safetensors")
    weights.pop("model.layers.2.mlp.experts.5.up_proj.weight")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    shutil.copy(checkpoint("sdar_moe") / "config.json", tmp_path)
    with pytest.raises(
        ValueError, match=r"do not make up those of \w+: .*conversion of the weights.*config.json"
    ) as found:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "0 missing" not in str(found.value) and "\n" not in str(found.value)


def test_a_long_list_is_cut(tmp_path):
    path = rewrite(
        checkpoint("sdar"), tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if ".1." in name]
    )
    with pytest.raises(ValueError, match=r"11 missing \([^)]*, and 3 more\)"):
        AutoModelForCausalLM.from_pretrained(path)


def test_what_does_no_harm(tmp_path):
    """A tied head that is or is not saved, buffers of rotary positions, and a backbone that is opened without its head."""
    source = checkpoint("sdar")

    def tie(weights):
        del weights["lm_head.weight"]
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    model = AutoModelForCausalLM.from_pretrained(rewrite(source, tmp_path / "a", tie, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight

    def both(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    AutoModelForCausalLM.from_pretrained(rewrite(source, tmp_path / "b", both, tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\)"):
        AutoModelForCausalLM.from_pretrained(rewrite(source, tmp_path / "c", tie))
    model, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not report["missing_keys"]


# ----------------------------------------------------------------------------------------- any backbone, any way to open


@pytest.fixture
def incomplete(tmp_path) -> str:
    """The embedded policy, a stock backbone, without one of its weights."""
    source = Path(tiny_policy_path())
    shutil.copytree(source, tmp_path / "policy")
    return rewrite(source, tmp_path / "policy", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


MISSING = r"1 missing \(model.layers.1.mlp.up_proj.weight\)"


def test_commands_open_only_whole_models(incomplete):
    inherited = PreTrainedModel.__dict__["from_pretrained"]
    for opener in (lambda: load_model(incomplete, "cpu"), lambda: open_policy(incomplete)):
        with pytest.raises(ValueError, match=MISSING):
            opener()
    assert PreTrainedModel.__dict__["from_pretrained"] is inherited
    with only_whole_models():  # a new head is what a reward model has
        AutoModelForSequenceClassification.from_pretrained(tiny_policy_path(), num_labels=1)


@pytest.mark.parametrize("kind", ["dtrpo", "sft"])
def test_trainers_open_only_whole_models(incomplete, kind, tmp_path):
    options = {"output_dir": str(tmp_path / "out"), "bf16": False, "report_to": "none", "max_steps": 1}
    rows = Dataset.from_list([{"prompt": "1", "completion": "2"}] * 8)
    with pytest.raises(ValueError, match=MISSING):
        if kind == "dtrpo":
            DTRPOTrainer(incomplete, lambda completions, **_: [0.0] * len(completions), DTRPOConfig(**options), rows)
        else:
            DiffusionSFTTrainer(incomplete, DiffusionSFTConfig(**options), rows)


def test_adapters_are_whole(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    open_policy(adapter=str(tmp_path))
    name = next(name for name in sorted(whole) if "o_proj.lora_B" in name)
    save_file({other: weight for other, weight in whole.items() if other != name}, file)
    for opener in (lambda: open_policy(adapter=str(tmp_path)), lambda: open_adapter(str(tmp_path), "cpu")):
        with pytest.raises(ValueError, match=rf"1 missing \({name}\)"):
            opener()
    save_file({**whole, name.replace("o_proj", "gate_proj"): whole[name].clone()}, file)
    with pytest.raises(ValueError, match=r"1 left over \([^)]*gate_proj.lora_B.weight\)"):
        open_policy(adapter=str(tmp_path))


# ------------------------------------------------------------------------------------------------------------- configs


def config_at(folder: Path, family: str, **changes) -> str:
    values = {**json.loads((checkpoint(family) / "config.json").read_text()), **changes}
    values = {name: value for name, value in values.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize("family", ["dream", "fast_dllm_v2", "sdar"])
@pytest.mark.parametrize("name", ["num_experts", "n_routed_experts", "num_experts_per_tok"])
def test_experts_of_a_dense_family_are_refused(tmp_path, family, name):
    with pytest.raises(ValueError, match=rf"`{name}=4`: a mixture of experts, which .* is not.*howto/family.md"):
        load_config(config_at(tmp_path, family, **{name: 4}))
    load_config(config_at(tmp_path, family, **{name: 0}))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llada", "d_model"),
        ("llada", "n_layers"),
        ("dream", "intermediate_size"),
        ("fast_dllm_v2", "num_key_value_heads"),
        ("sdar", "hidden_size"),
        ("sdar_moe", "num_experts"),
        ("llada_moe", "expert_intermediate_size"),
        ("llada2", "topk_group"),
    ],
)
def test_sizes_that_a_config_does_not_state_are_named(tmp_path, family, name):
    with pytest.raises(ValueError, match=rf"does not state {name}, as the config of .* does.*howto/family.md"):
        load_config(config_at(tmp_path, family, **{name: "absent"}))


@pytest.mark.parametrize(
    ("family", "option", "what"),
    [
        ("llada2", {"use_bias": True}, "`use_bias=True`, which a Glm4Moe backbone cannot express"),
        ("llada2", {"use_sliding_window": True}, "use_sliding_window"),
        ("llada2", {"score_function": "softmax"}, "only 'sigmoid' can be loaded"),
        ("llada2", {"num_experts_per_tok": 1}, "two or more experts"),
        ("llada2", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("llada_moe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("llada_moe", {"shared_expert_intermediate_size": 8}, "a Qwen3Moe backbone cannot express"),
        ("llada_moe", {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias"),
    ],
)
def test_options_that_a_backbone_with_experts_lacks_are_refused(tmp_path, family, option, what):
    with pytest.raises(ValueError, match=what):
        load_config(config_at(tmp_path, family, **option))
