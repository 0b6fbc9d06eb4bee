"""The published families: their checkpoints load without remote code, compute what they should, and save unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.checkpoints import CONFIGS as WRITTEN
from tests.checkpoints import EXPERTS, checkpoint, dense_layers, reference_logits
from tests.closeness import assert_close
from tests.conftest import shared
from trl_diffusion import DiffusionSpec, get_spec, set_spec
from trl_diffusion.policies.families import (
    FAMILIES,
    DreamConfig,
    Fast_dLLM_QwenConfig,
    ILLaDAConfig,
    LLaDA2MoeConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    SDARConfig,
    SDARMoeConfig,
)
from trl_diffusion.policies.forward import CACHE
from trl_diffusion.policies.loading import load_config, resolve_mask_token
from trl_diffusion.policies.policy import open_policy
from trl_diffusion.policies.spec import spec_fields


MASK = 59
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3,
         "mask_token_id": MASK, "eos_token_id": 7, "pad_token_id": 7}  # fmt: skip
LLADA_SHAPE = {"d_model": 32, "mlp_hidden_size": 48, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "vocab_size": 60,
               "embedding_size": 64, "max_sequence_length": 128, "init_std": 0.3, "rope_theta": 500000.0,
               "mask_token_id": MASK, "eos_token_id": 7, "pad_token_id": 7}  # fmt: skip
FIXTURES = {
    "llada": "LLaDAModelLM",
    "dream": "DreamModel",
    "fast_dllm_v2": "Fast_dLLM_QwenForCausalLM",
    "sdar": "SDARForCausalLM",
    "sdar_moe": "SDARMoeForCausalLM",
    "llada_moe": "LLaDAMoEModelLM",
    "llada2": "LLaDA2MoeModelLM",
    "illada": "ILLaDAForCausalLM",
}
MOE_SHAPE = {**SHAPE, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llada": lambda: LLaDAConfig(**LLADA_SHAPE),
    "llada-deep-multi-head": lambda: LLaDAConfig(**{**LLADA_SHAPE, "n_layers": 12, "n_kv_heads": None}),
    "llada-one-key-head": lambda: LLaDAConfig(**{**LLADA_SHAPE, "n_kv_heads": 1, "mlp_hidden_size": None}),
    "llada-tied": lambda: LLaDAConfig(**LLADA_SHAPE, weight_tying=True),
    "dream": lambda: DreamConfig(**SHAPE, rope_theta=1e6),
    "dream-tied": lambda: DreamConfig(**SHAPE, tie_word_embeddings=True),
    "dream-long": lambda: DreamConfig(**SHAPE, rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "fast-deep": lambda: Fast_dLLM_QwenConfig(**{**SHAPE, "num_hidden_layers": 11}, bd_size=8),
    "fast-tied": lambda: Fast_dLLM_QwenConfig(**SHAPE, tie_word_embeddings=True),
    "sdar-blocks-of-16": lambda: SDARConfig(**SHAPE, block_size=16, head_dim=16),
    "sdar-multi-head": lambda: SDARConfig(**{**SHAPE, "num_key_value_heads": 4}, head_dim=8),
    "sdar-moe-tied": lambda: SDARMoeConfig(**MOE_SHAPE, head_dim=8, tie_word_embeddings=True),
    "llada-moe": lambda: LLaDAMoEConfig(**MOE_SHAPE, moe_layer_freq=[1, 1]),
    "llada2-deep": lambda: LLaDA2MoeConfig(
        **{**MOE_SHAPE, "num_hidden_layers": 11}, head_dim=8, n_group=2, topk_group=1, first_k_dense_replace=2
    ),
}
LORA_NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(params=sorted(FIXTURES))
def family(request) -> str:
    return request.param


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()


def fixture_model(family: str, **options):
    path = checkpoint(family)
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options).eval(), path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def config_file(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------- what the models compute


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_the_published_code(family, implementation):
    model, path = fixture_model(family, attn_implementation=implementation)
    if family in WRITTEN:
        ids = torch.randint(0, 320, (2, 70), generator=torch.Generator().manual_seed(0))
        expected = torch.stack([reference_logits(family, row) for row in ids])
        assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        return
    golden = load_file(path / "golden.safetensors")
    if "clean_logits" in golden:
        assert_close(model(golden["clean_ids"]).logits, golden["clean_logits"])
        return
    assert_close(model(golden["input_ids"]).logits, golden["logits"])
    keep = golden["attention_mask"].bool()
    assert not keep.all()
    masked = model(golden["input_ids"], attention_mask=golden["attention_mask"]).logits
    assert_close(masked[keep], golden["logits_masked"][keep])
    assert masked.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["fast_dllm_v2", "sdar"])
def test_states_of_blocks_are_those_of_the_published_code(family):
    model, path = fixture_model(family)
    golden = load_file(path / "golden.safetensors")
    size = spec_fields(model.config)["block_size"]
    for block in range(golden["clean_ids"].shape[1] // size):
        start = block * size
        if family == "sdar":
            ids, expected = golden[f"state_ids_{block}"], golden[f"state_logits_{block}"]
        else:
            ids = torch.cat([golden["clean_ids"][:, :start], golden[f"noisy_ids_{block}"]], 1)
            expected = golden[f"noisy_logits_{block}"]
        blocks = torch.arange(start + size) // size
        allowed = (blocks[None, :] <= blocks[:, None]).expand(len(ids), 1, -1, -1)
        assert_close(model(ids, attention_mask=allowed).logits[:, start:], expected)
        assert_close(model(ids).logits[:, start:], expected)


@torch.no_grad()
def test_padding_and_a_cache_change_nothing(model):
    ids = torch.randint(8, MASK, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    left, right = torch.full((2, 5), 7), torch.full((2, 3), 7)
    padding = torch.cat([torch.zeros(2, 5), torch.ones(2, 40), torch.zeros(2, 3)], 1).long()
    padded = model(torch.cat([left, ids, right], 1), attention_mask=padding).logits
    assert_close(padded[:, 5:45], expected)
    assert_close(model.model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state, model.model(ids)[0])

    if spec_fields(model.config)["attention"] == "block":
        cache = model(ids[:, :32], use_cache=True)[CACHE]
        assert_close(model(ids[:, 32:], **{CACHE: cache}).logits, expected[:, 32:])


@torch.no_grad()
def test_nothing_is_causal_by_accident(model):
    """A changed last token reaches exactly the positions that may look at it."""
    ids = torch.randint(8, MASK, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] - 8 + 1) % (MASK - 8) + 8
    reached = (model(ids).logits != model(changed).logits).any(-1)[0]
    fields = spec_fields(model.config)
    last_block = torch.arange(40) // fields["block_size"] == 39 // fields["block_size"]
    assert reached.equal(torch.ones(40, dtype=torch.bool) if fields["attention"] == "full" else last_block)


@torch.no_grad()
def test_a_stored_block_size_is_the_one_that_is_used():
    model = AutoModelForCausalLM.from_config(SDARConfig(**SHAPE, head_dim=8)).eval()
    set_spec(model.config, get_spec(model.config).replace(block_size=8))
    ids = torch.arange(10, 26)[None]
    changed = ids.clone()
    changed[0, -1] = 50
    assert (model(ids).logits != model(changed).logits).any(-1)[0].tolist() == [False] * 8 + [True] * 8


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_llada_is_llama_with_mapped_weights(tied):
    torch.manual_seed(0)
    llada = AutoModelForCausalLM.from_config(LLaDAConfig(**LLADA_SHAPE, weight_tying=tied)).eval()
    stock = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=64, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    llama = LlamaForCausalLM(stock).eval()
    llama.load_state_dict(llada.state_dict())
    ids = torch.randint(0, 64, (2, 20))
    everyone = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    assert_close(llada(ids).logits, llama(ids, attention_mask=everyone).logits)
    assert (llada.lm_head.weight is llada.model.embed_tokens.weight) == tied


def test_the_embedding_of_lladas_padding_token_is_trained():
    """LLaDA pads with its end of text; a stock Llama gives the padding token's embedding no gradient."""
    model = AutoModelForCausalLM.from_config(LLaDAConfig(**LLADA_SHAPE))
    model(torch.tensor([[7, 9]])).logits[0, 1, 0].backward()
    assert model.get_input_embeddings().weight.grad[7].any()


# ----------------------------------------------------------------------------------------------- loading and saving


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_a_checkpoint_is_saved_as_it_was_published(tmp_path, family, shard_size):
    model, path = fixture_model(family)
    assert type(model).__name__ == FIXTURES[family]
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    assert same(weights(tmp_path), weights(path))

    published, saved = config_file(path), config_file(tmp_path)
    published.pop("transformers_version", None)
    if published.get("norm_topk_prob", False) is None:
        published["norm_topk_prob"] = False
    assert {name: saved.get(name, "missing") for name in published} == published
    stock = {
        "bos_token_id",
        "sliding_window",
        "use_sliding_window",
        "pretraining_tp",
    }  # of a backbone, and not in the tiny configs
    assert saved.keys() - published.keys() - stock <= {"transformers_version", "torch_dtype", "clip_qkv"}

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())
    if shard_size == "20KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == weights(path).keys()


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_any_architecture_survives_saving(tmp_path, model, shard_size):
    set_spec(model.config, get_spec(model.config).replace(stop_token_ids=(3, 4)))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    assert same(again.state_dict(), model.state_dict())
    assert get_spec(again.config) == get_spec(model.config)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert getattr(again.config, "head_dim", None) == getattr(model.config, "head_dim", None)

    saved = config_file(tmp_path)
    assert saved["architectures"] == [type(model).__name__]
    assert saved["model_type"] == model.config.model_type.replace("llada_moe", "llada")
    assert "rope_parameters" not in saved and saved["rope_theta"] == model.config.rope_parameters["rope_theta"]
    names = weights(tmp_path).keys()
    head = "model.transformer.ff_out.weight" if "d_model" in saved else "lm_head.weight"
    assert (head in names) != model.config.tie_word_embeddings
    assert not {"num_local_experts", "n_routed_experts", "num_nextn_predict_layers"} & saved.keys()
    if "d_model" in saved:
        assert not {"hidden_size", "num_hidden_layers", "head_dim", "attention_bias"} & saved.keys()
        assert (saved["vocab_size"], saved["embedding_size"], saved["block_type"]) == (60, 64, "llama")
        assert all(name.startswith("model.transformer.") for name in names)
    # What was saved is saved the same way again.
    again.save_pretrained(tmp_path / "again", max_shard_size=shard_size)
    assert same(weights(tmp_path / "again"), weights(tmp_path))
    assert config_file(tmp_path / "again") == saved


def test_trl_opens_the_families(family, tmp_path):
    utils = pytest.importorskip("trl.trainer.utils")
    model = utils.create_model_from_path(str(checkpoint(family)))
    assert type(model).__name__ == FIXTURES[family]
    del model.config.auto_map  # as in a checkpoint that was never on the hub
    model.save_pretrained(tmp_path)
    assert type(utils.create_model_from_path(str(tmp_path))) is type(model)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("fast_dllm_v2", "Fast_dLLM_QwenModel"),
        ("sdar", "SDARModel"),
        ("sdar_moe", "SDARMoeModel"),
        ("llada2", "LLaDA2MoeModel"),
    ],
)
def test_backbones_load_alone(family, name):
    model, path = fixture_model(family)
    backbone = AutoModel.from_pretrained(path)
    assert type(backbone).__name__ == name
    ids = torch.arange(40)[None]
    assert_close(backbone(ids)[0], model.model(ids)[0])


@pytest.mark.parametrize(
    "option",
    [
        {"alibi": True},
        {"rope": False},
        {"layer_norm_type": "default"},
        {"block_type": "sequential"},
        {"scale_logits": True},
        {"input_emb_norm": True},
        {"clip_qkv": 8.0},
        {"attention_layer_norm": True},
        {"include_bias": True},
        {"include_qkv_bias": True},
        {"block_group_size": 4},
        {"activation_type": "swiglu"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_llada_options_that_llama_lacks_are_refused(tmp_path, option):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada", **LLADA_SHAPE, **option}))
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*Llama backbone"):
        load_config(tmp_path)


@torch.no_grad()
def test_a_checkpoint_on_a_stock_backbone_needs_a_spec():
    """Stable-DiffCoder: a Llama in its files, whose mask token and blocks of four only its own code names."""
    spec = {"mask_token_id": 300, "block_size": 4, "stop_token_ids": [290]}
    tokenizer = str(shared("fixtures", "fast_dllm_v2", "tokenizer"))
    policy = open_policy(str(checkpoint("stable_diffcoder")), tokenizer=tokenizer, diffusion_spec=spec)
    assert type(policy.model) is LlamaForCausalLM and policy.spec.attention == "block"
    ids = torch.randint(0, 320, (20,), generator=torch.Generator().manual_seed(0))
    blocks = torch.arange(20) // 4
    allowed = (blocks[None, :] <= blocks[:, None])[None, None]
    expected = reference_logits("stable_diffcoder", ids)
    assert (
        policy.model(ids[None], attention_mask=allowed).logits[0] - expected
    ).abs().max() <= 1e-5 * expected.abs().max()


def test_an_unknown_model_type_gets_a_list_of_the_known(tmp_path):
    remote = {"AutoConfig": "configuration_new.NewConfig"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new_dlm", "auto_map": remote}))
    known = ".*".join(f"`{config.model_type}`" for config, *_ in FAMILIES.values())
    with pytest.raises(ValueError, match=rf"'new_dlm'.*{known}.*docs/howto/family.md.*diffusion_spec="):
        load_config(tmp_path)


# ------------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("targets", ["all-linear", sorted(LORA_NAMES)], ids=["all-linear", "names"])
def test_lora_reaches_every_layer_and_merges_into_the_published_format(tmp_path, family, targets):
    peft = pytest.importorskip("peft")
    model, path = fixture_model(family)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    found = {name.split(".")[-1] for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
    layers = model.config.num_hidden_layers
    mlps = layers
    if family in EXPERTS:  # the experts are no linear layers; see test_expert_families.py
        dense = len(dense_layers(WRITTEN[family]))
        mlps = dense + (layers - dense if family == "llada2" else 0)
    assert found == (LORA_NAMES if mlps else LORA_NAMES - {"gate_proj", "up_proj", "down_proj"})
    count = sum(hasattr(module, "lora_A") for module in wrapped.modules())
    assert count == 4 * layers + 3 * mlps

    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = wrapped.eval()(ids).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    base, _ = fixture_model(family)
    reloaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, expected)

    reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, published = weights(tmp_path / "merged"), weights(path)
    assert merged.keys() == published.keys()
    changed = [name for name in merged if "q_proj.weight" in name or "query_key_value.weight" in name]
    assert changed and not any(torch.equal(merged[name], published[name]) for name in changed)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    torch.testing.assert_close(again, expected, atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------ specs


def test_specs_of_the_fixtures(family):
    expected = {
        "llada": DiffusionSpec(150, "full", 32, "response", stop_token_ids=(140,), predicts_mask_token=True),
        "dream": DiffusionSpec(300, "full", 32, "response", True, stop_token_ids=(290,), predicts_mask_token=True),
        "fast_dllm_v2": DiffusionSpec(
            300, "block", 32, "sequence", True, "autoregressive", stop_token_ids=(290,), predicts_mask_token=True
        ),
        "sdar": DiffusionSpec(300, "block", 4, stop_token_ids=(290,), predicts_mask_token=True),
        "sdar_moe": DiffusionSpec(300, "block", 4, stop_token_ids=(290,), predicts_mask_token=True),
        "llada_moe": DiffusionSpec(300, "full", 32, "response", stop_token_ids=(290,), predicts_mask_token=True),
        "llada2": DiffusionSpec(300, "block", 32, stop_token_ids=(290,), predicts_mask_token=True),
        "illada": DiffusionSpec(300, "full", 32, "response", stop_token_ids=(290,), predicts_mask_token=True),
    }[family]
    config = load_config(checkpoint(family))
    if family == "fast_dllm_v2":  # its mask token is in the tokenizer only, and the fixture's is not the real one
        with pytest.raises(ValueError, match=r"does not say which token.*diffusion_spec=.*resolve_mask_token"):
            get_spec(config)
        config.mask_token_id = 300
    assert get_spec(config) == expected


@pytest.mark.parametrize(
    ("config", "mask", "stops"),
    [
        (LLaDAConfig(vocab_size=126464, mask_token_id=126336, eos_token_id=126081), 126336, (126081, 126348)),
        (LLaDAConfig(vocab_size=155136, mask_token_id=5, eos_token_id=[2, 3]), 5, (2, 3)),
        (DreamConfig(vocab_size=152064, mask_token_id=151666, eos_token_id=151643), 151666, (151643, 151645)),
        (Fast_dLLM_QwenConfig(vocab_size=151936, eos_token_id=151645), 151665, (151645,)),
        (SDARConfig(vocab_size=151936, mask_token_id=151669, eos_token_id=151643), 151669, (151643, 151645)),
        (SDARMoeConfig(vocab_size=151936, mask_token_id=151669, eos_token_id=151643), 151669, (151643, 151645)),
        (ILLaDAConfig(vocab_size=155136, eos_token_id=[2, 3]), 5, (2, 3)),
        (LLaDAMoEConfig(vocab_size=157184, eos_token_id=156892), 156895, (156892,)),
        (LLaDA2MoeConfig(vocab_size=157184, pad_token_id=156892), 156895, (156892,)),
    ],
)
def test_specs_of_the_published_vocabularies(config, mask, stops):
    spec = get_spec(config)
    assert (spec.mask_token_id, spec.stop_token_ids) == (mask, stops)


@pytest.mark.parametrize("kind", [LLaDAMoEConfig, LLaDA2MoeConfig, ILLaDAConfig])
@pytest.mark.parametrize("vocab_size", [151936, 157440])
def test_another_vocabulary_has_another_mask_token(kind, vocab_size):
    """Even if it has an entry with the published number."""
    with pytest.raises(ValueError, match="does not say which token stands for"):
        get_spec(kind(vocab_size=vocab_size))
    assert get_spec(kind(vocab_size=vocab_size, mask_token_id=7)).mask_token_id == 7


def test_a_block_size_in_the_config_counts(tmp_path):
    """The published configs of LLaDA 2 have none."""
    values = {**config_file(checkpoint("llada2")), "block_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    assert get_spec(config).block_size == 8
    config.save_pretrained(tmp_path / "again")
    assert get_spec(load_config(tmp_path / "again")).block_size == config_file(tmp_path / "again")["block_size"] == 8


def test_stored_fields_override_those_of_the_family():
    config = SDARConfig(**SHAPE)
    config.diffusion_spec = {"block_size": 8, "stop_token_ids": [1]}
    assert get_spec(config) == DiffusionSpec(MASK, "block", 8, stop_token_ids=(1,), predicts_mask_token=True)


def test_the_dream_tokenizer_needs_no_remote_code(tmp_path):
    """Dream's files name a class of their own, which is Qwen2's tokenizer."""
    source = shared("fixtures", "fast_dllm_v2", "tokenizer")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.X", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, tmp_path / name)
    shutil.copy(shared("fixtures", "dream") / "config.json", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(tokenizer).__name__ == "DreamTokenizer"
    assert tokenizer("Hello world<|im_end|>")["input_ids"] == [9707, 1879, 151645]
    tokenizer.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "config.json", tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    assert type(again) is type(tokenizer)
    assert again("Hello world<|im_end|>")["input_ids"] == [9707, 1879, 151645]


def test_the_mask_token_is_found_in_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(shared("fixtures", "fast_dllm_v2", "tokenizer"))
    assert resolve_mask_token(Fast_dLLM_QwenConfig(vocab_size=320), tokenizer) == 151665
    assert resolve_mask_token(Fast_dLLM_QwenConfig(**SHAPE), tokenizer) == MASK
    with pytest.raises(ValueError, match="Neither the config of this `qwen3` model nor its tokenizer"):
        resolve_mask_token(AutoConfig.for_model("qwen3"), tokenizer)
