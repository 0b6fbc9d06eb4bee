"""The token that a policy pads with is often its end of text: its embedding is trained like any other."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import AutoModelForCausalLM

from tests.closeness import assert_close_gradients
from tests.conftest import make_policy
from tests.policies.backbones import tiny_backbone
from trl_diffusion.offline.orders import finished_batch, given_order
from trl_diffusion.policies.families import DreamConfig, Fast_dLLM_QwenConfig, LLaDAConfig, SDARConfig
from trl_diffusion.policies.forward import policy_logits
from trl_diffusion.scoring.layout import pack
from trl_diffusion.scoring.states import all_states


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
         "num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip
LLADA_SHAPE = {"d_model": 32, "mlp_hidden_size": 48, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2,
               "max_sequence_length": 128, "init_std": 0.3}  # fmt: skip
FAMILIES = {
    "dream": (DreamConfig, SHAPE),
    "dream-tied": (DreamConfig, {**SHAPE, "tie_word_embeddings": True}),
    "fast_dllm_v2": (Fast_dLLM_QwenConfig, {**SHAPE, "bd_size": 8}),
    "llada": (LLaDAConfig, LLADA_SHAPE),
    "llada-tied": (LLaDAConfig, {**LLADA_SHAPE, "weight_tying": True}),
    "sdar": (SDARConfig, {**SHAPE, "block_size": 8, "head_dim": 8}),
}


def build_family(name: str, tokenizer):
    config_class, shape = FAMILIES[name]
    size, pad = len(tokenizer), tokenizer.eos_token_id
    sizes = {"embedding_size": size} if config_class is LLaDAConfig else {}
    config = config_class(
        **shape, **sizes, vocab_size=size, mask_token_id=tokenizer.mask_token_id, pad_token_id=pad, eos_token_id=pad
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def objective(model, spec, token: int) -> Tensor:
    """A number that depends on all logits of a packed pass over rows in which the token is visible."""
    batch = given_order(
        finished_batch([[7, token, 9], [8, 10]], [[11, 12, token], [13, token, 14, 15]], spec), spec, "left_to_right"
    )
    layout = pack(batch, spec, all_states(batch, spec), one_row=spec.attention == "block")
    logits = policy_logits(model, layout.input_ids, layout.position_ids, layout.allowed, layout.rows, layout.columns)
    weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    return (weights * logits).sum()


def gradient(model, spec, token: int, weight: Tensor) -> Tensor:
    weight.grad = None
    objective(model, spec, token).backward()
    return weight.grad.clone()


def check_embedding(model, spec, token: int) -> None:
    """The gradient is that of a product with rows of the unit matrix, instead of a look-up."""
    embedding = model.get_input_embeddings()
    ours = gradient(model, spec, token, embedding.weight)

    def product(module, args, output):
        rows = one_hot(args[0], len(module.weight)).to(module.weight.dtype) @ module.weight
        return rows * getattr(module, "embed_scale", 1.0)  # Gemma's

    handle = embedding.register_forward_hook(product)
    right = gradient(model, spec, token, embedding.weight)
    handle.remove()
    assert right[token].abs().max() > 1e-3
    assert_close_gradients(ours[token], right[token])
    assert_close_gradients(ours, right)


@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_family(make_trainer, tokenizer, name):
    token = tokenizer.eos_token_id
    trainer = make_trainer(build_family(name, tokenizer))
    check_embedding(trainer.model, trainer.spec, token)


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "qwen2", "opt", "gemma", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_of_a_stock_backbone(make_trainer, tokenizer, char_spec, model_type, tied):
    token = tokenizer.eos_token_id
    model = tiny_backbone(model_type, vocab_size=len(tokenizer), pad_token_id=token, tie_word_embeddings=tied)
    assert model.get_input_embeddings().padding_idx == token
    trainer = make_trainer(model, spec=char_spec, diffusion_spec=char_spec.to_dict())
    check_embedding(trainer.model, char_spec, token)


def test_in_a_vocabulary_that_has_grown(make_trainer, tokenizer, char_spec):
    token = tokenizer.eos_token_id
    model = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=token)
    model.resize_token_embeddings(len(tokenizer) + 8)
    trainer = make_trainer(model)
    check_embedding(trainer.model, char_spec, token)
    trainer.model.resize_token_embeddings(len(tokenizer) + 16)
    check_embedding(trainer.model, char_spec, token)


def test_of_an_adapter_that_has_a_copy(make_trainer, tokenizer, char_spec):
    token = tokenizer.eos_token_id
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=token)
    trainer = make_trainer(model, kwargs={"peft_config": peft_config})
    copy = trainer.model.get_input_embeddings().modules_to_save["default"]
    trainer.model.get_input_embeddings = lambda: copy
    check_embedding(trainer.model, char_spec, token)


def test_of_an_adapter_of_low_rank(make_trainer, tokenizer, char_spec):
    token = tokenizer.eos_token_id
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=token)
    model = make_trainer(model, kwargs={"peft_config": peft_config}).model
    layer = model.get_input_embeddings()
    first, second = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    ours = gradient(model, char_spec, token, first)

    def product(module, args, output):
        rows = one_hot(args[0], len(module.weight)).to(first.dtype)
        return rows @ (module.weight + layer.scaling["default"] * (second @ first).T)

    handle = layer.register_forward_hook(product)
    right = gradient(model, char_spec, token, first)
    handle.remove()
    assert right[:, token].abs().max() > 1e-3
    assert_close_gradients(ours, right)
