"""Adapters other than LoRA work, or are refused before weights are loaded; an adapter that trains nothing is an error."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from tests.conftest import make_policy, make_prompts
from tests.reference import plain_forward_logps
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.policies.loading import load_config
from trl_diffusion.policies.policy import open_policy
from trl_diffusion.policies.trial import try_policy


LAYERS = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
PROMPTS = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
BEFORE_THE_PROMPT = [PromptTuningConfig(**PROMPTS), PrefixTuningConfig(**PROMPTS), PromptEncoderConfig(**PROMPTS)]
OF_WEIGHTS = [
    IA3Config(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    AdaLoraConfig(**LAYERS, total_step=10, tinit=1, tfinal=1),
    BOFTConfig(**LAYERS, boft_block_size=4),
    FourierFTConfig(**LAYERS, n_frequency=8, init_weights=True),
    HRAConfig(**LAYERS),
    LNTuningConfig(target_modules=["input_layernorm"]),
    LoHaConfig(**LAYERS),
    LoKrConfig(**LAYERS),
    OFTConfig(**LAYERS, oft_block_size=8),
    TrainableTokensConfig(token_indices=[4, 5, 6], target_modules=["embed_tokens"]),
    VeraConfig(target_modules=["q_proj"], r=4),
]


def name_of(config) -> str:
    return type(config).__name__


@pytest.fixture
def saved(char_spec, tokenizer, tmp_path):
    """A policy, and a LoRA adapter for it that does something."""
    model = make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("peft_config", BEFORE_THE_PROMPT, ids=name_of)
def test_tokens_before_the_prompt_are_refused(make_trainer, saved, monkeypatch, char_spec, tokenizer, peft_config):
    match = f"{type(peft_config).__name__} cannot be used with a diffusion policy: .*virtual tokens"
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "base"), peft_config)
    with pytest.raises(ValueError, match=match):
        make_trainer(adapted)
    with pytest.raises(ValueError, match=match):
        decode(adapted, make_prompts((5,)), DecodingConfig(8), char_spec)

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
    with pytest.raises(ValueError, match=match):
        make_trainer(str(saved / "base"), kwargs={"peft_config": peft_config})
    adapted.save_pretrained(saved / "tokens")
    with pytest.raises(ValueError, match=match):
        open_policy(adapter=str(saved / "tokens"))


@pytest.mark.parametrize("peft_config", OF_WEIGHTS, ids=name_of)
def test_adapters_of_weights_train(make_trainer, peft_config):
    """What is recorded is what is scored, at the first update and when the adapter has moved, and is plainly computed."""
    trainer = make_trainer(kwargs={"peft_config": peft_config}, beta=0.1, tokens_per_step=4, max_steps=2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert max(entry["diffusion/recorded_gap/max"] for entry in logs) < 1e-4
    assert logs[0]["kl"] < 1e-6
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all(
        parameter.requires_grad for name, parameter in trainer.model.named_parameters() if name in changed
    )
    batch = decode(trainer.model.eval(), make_prompts((5, 9)), DecodingConfig(8, tokens_per_step=2), trainer.spec)
    trainer.model.base_model.set_attn_implementation("sdpa")
    plain = plain_forward_logps(trainer.model, trainer.spec, batch, 1.0)
    counted = batch.completion_mask
    torch.testing.assert_close(batch.logps[counted], plain[counted], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- nothing to train


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_an_adapter_opened_for_inference_is_an_error(make_trainer, saved, beta):
    asked = []
    model = AutoPeftModelForCausalLM.from_pretrained(saved / "adapter")
    with pytest.raises(
        ValueError, match="no trainable parameters.*'default'.*from_pretrained.path, is_trainable=True"
    ):
        make_trainer(model, reward_funcs=lambda completions, **kwargs: asked.append(1) or [0.0], beta=beta)
    assert not asked
    model = AutoPeftModelForCausalLM.from_pretrained(saved / "adapter", is_trainable=True)
    trainer = make_trainer(model, beta=beta, max_steps=1)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert all(
        torch.equal(value, before[name]) != (".default." in name) for name, value in trainer.model.named_parameters()
    )


def test_the_advice_is_to_open_adapters_for_training(saved):
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM.*is_trainable=True"):
        load_config(str(saved / "adapter"))


def test_a_frozen_policy_is_an_error(make_trainer, char_spec, tokenizer):
    model = make_policy(char_spec, vocab_size=len(tokenizer)).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters: `requires_grad` is False for all of them"):
        make_trainer(model)
    model.model.norm.requires_grad_(True)
    make_trainer(model, max_steps=1).train()


def two_adapters(model) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    model.add_adapter("second", config)
    return model


def switched_off(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def only_the_other_is_trainable(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)


def merged(model: PeftModel) -> None:
    model.merge_adapter()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (switched_off, "no trainable parameters.*frozen or switched off"),
        (only_the_other_is_trainable, "None of the 4 trainable parameters .*second.*are their adapters active"),
        (merged, "None of the 4 trainable parameters .*not merged"),
    ],
)
def test_adapters_that_take_no_part_are_an_error(make_trainer, char_spec, tokenizer, change, match):
    model = two_adapters(make_policy(char_spec, vocab_size=len(tokenizer)))
    change(model)
    with pytest.raises(ValueError, match=f"(?i){match}"):
        make_trainer(model)


def test_an_optimizer_of_another_model_is_an_error(make_trainer, char_spec, tokenizer):
    def build():
        return make_policy(char_spec, vocab_size=len(tokenizer))

    with pytest.raises(ValueError, match="optimizer holds none of the trainable parameters"):
        make_trainer(build(), kwargs={"optimizers": (torch.optim.SGD(build().parameters(), lr=0.1), None)})
    model = build()
    frozen = torch.optim.SGD(model.model.layers[0].parameters(), lr=0.1)
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match="optimizer holds none of the trainable parameters"):
        make_trainer(model, kwargs={"optimizers": (frozen, None)})
    make_trainer(model, kwargs={"optimizers": (torch.optim.SGD(model.model.norm.parameters(), lr=0.1), None)})


def test_a_policy_is_tried_with_its_adapter(char_spec, tokenizer):
    """Another object than the model inside."""
    model = make_policy(char_spec, vocab_size=len(tokenizer))
    try_policy(model, char_spec)
    passes = []
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted.register_forward_hook(lambda *args: passes.append(1))
    try_policy(adapted, char_spec)
    assert passes


def test_a_directory_holds_one_policy(make_trainer, tmp_path):
    """An adapter beside a whole model would be opened on it, whatever it was made for."""
    lora = {"kwargs": {"peft_config": LoraConfig(r=2, target_modules="all-linear")}}
    for name, first, second in (("model", {}, lora), ("adapter", lora, {})):
        directory = str(tmp_path / name)
        make_trainer(output_dir=directory, **first).save_model()
        make_trainer(output_dir=directory, **first).save_model()  # the same kind takes its place
        with pytest.raises(ValueError, match=f"{directory} holds a.* and this run would save a"):
            make_trainer(output_dir=directory, **second)
        with pytest.raises(ValueError, match="Choose another directory"):
            make_trainer(output_dir=str(tmp_path / "other"), **second).save_model(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "out holds an adapter"),
        ("checkpoint-2/adapter_model.safetensors", "checkpoint-2 holds an adapter"),
        ("collection.json", "out holds a collection of trajectories"),
    ],
)
def test_what_is_there_is_looked_at_before_weights_are_loaded(
    make_trainer, saved, tmp_path, monkeypatch, name, message
):
    """Also where checkpoints go: an adapter of a killed run would otherwise be found when the first one is saved."""
    left = tmp_path / "out" / name
    left.parent.mkdir(parents=True)
    left.touch()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    with pytest.raises(ValueError, match=f"{message}.*Choose another directory"):
        make_trainer(str(saved / "base"), output_dir=str(tmp_path / "out"))
