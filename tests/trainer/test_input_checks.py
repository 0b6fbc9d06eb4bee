"""Policies, tokenizers, data and arguments that cannot be trained with are refused, and named."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3Config
from trl import GRPOConfig

from tests.conftest import make_policy
from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import DTRPOConfig, DTRPOTrainer, get_spec, tiny_policy_path


def test_policy_without_a_mask_token(make_trainer, tokenizer):
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
        )  # fmt: skip
    )
    with pytest.raises(ValueError, match="no diffusion spec: nothing says which token stands for"):
        make_trainer(model)
    trainer = make_trainer(model, diffusion_spec={"mask_token_id": 1, "block_size": 4, "stop_token_ids": [2]})
    assert get_spec(trainer.model.config).block_size == 4


def test_spec_overrides_what_the_config_says(make_trainer):
    trainer = make_trainer(diffusion_spec='{"block_size": 4}')
    assert trainer.spec.block_size == get_spec(trainer.model.config).block_size == 4
    assert trainer.spec.stop_token_ids == (2,)
    with pytest.raises(ValueError, match="`mask_token_id` holds 5000, but the model's vocabulary has 100 tokens"):
        make_trainer(diffusion_spec={"mask_token_id": 5000})


@pytest.mark.parametrize("in_eval", [False, True])
def test_prompt_with_the_mask_token(make_trainer, in_eval):
    good, bad = make_dataset(4), Dataset.from_list([{"prompt": "fine"}, {"prompt": "a <mask> b"}])
    with pytest.raises(ValueError, match=r"_dataset: Prompt 1 contains the mask token \(1\) at position 2"):
        make_trainer(dataset=good if in_eval else bad, kwargs={"eval_dataset": bad} if in_eval else None)


def test_prompt_longer_than_the_context(make_trainer):
    dataset = Dataset.from_list([{"prompt": "1" * 120}])
    with pytest.raises(ValueError, match="Prompt 0 has 120 tokens.*context of 128"):
        make_trainer(dataset=dataset)


def test_dataset_without_prompts(make_trainer):
    with pytest.raises(ValueError, match=r"no `prompt` column; it has \['question'\]"):
        make_trainer(dataset=Dataset.from_list([{"question": "1+1"}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+1", "format_version": 1, "event_steps": [[0]]}, "eval_dataset holds stored responses, whose rewards stay"),
        ({"chosen": "1+1=2", "rejected": "1+1=3"}, "eval_dataset has no `prompt` column, as train_dataset has; it has"),
    ],
    ids=["stored", "pairs"],
)  # fmt: skip
def test_an_evaluation_that_the_policy_does_not_answer(make_trainer, row, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(kwargs={"eval_dataset": Dataset.from_list([row])})


def test_empty_dataset(make_trainer):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(dataset=Dataset.from_dict({"prompt": []}))


def test_no_dataset(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        DTRPOTrainer(tiny_policy_path(), codes, DTRPOConfig(str(tmp_path), bf16=False), processing_class=tokenizer)


@pytest.mark.parametrize("reward_funcs", [None, []])
def test_no_reward_function(make_trainer, reward_funcs):
    with pytest.raises(ValueError, match="No reward source provided"):
        make_trainer(reward_funcs=reward_funcs)


def test_images_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"has \['image'\]"):
        make_trainer(dataset=Dataset.from_list([{"prompt": "a", "image": "b"}]))


def test_streams_are_checked_as_they_come(make_trainer):
    stream = IterableDataset.from_generator(lambda: ({"prompt": p} for p in ["ok"] * 4 + ["a<mask>"] * 60))
    trainer = make_trainer(dataset=stream, max_steps=8)
    with pytest.raises(ValueError, match="contains the mask token"):
        trainer.train()


def test_a_policy_spread_over_devices_is_refused(make_trainer):
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    policy.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}
    with pytest.raises(ValueError, match="spread over 2 devices \\(0, 1\\).*accelerate launch"):
        make_trainer(model=policy)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "must be text or a list of messages, got 7"),
        (["a", "b"], "must be text or a list of messages"),
        ({"role": "user", "content": "a"}, "must be text or a list of messages"),
        ([{"role": "user", "content": ["a"]}], "take text only"),
        ([{"role": "user"}], "must have a `role` and a `content`"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "take text only"),
    ],
)
def test_prompts_that_are_not_text(make_trainer, prompt, message):
    with pytest.raises(ValueError, match=f"train_dataset: row 0.*{message}"):
        make_trainer(dataset=Dataset.from_list([{"prompt": prompt}]))


def test_columns_that_reward_functions_would_not_see(make_trainer):
    with pytest.raises(ValueError, match=r"has \['completions'\]"):
        make_trainer(dataset=Dataset.from_list([{"prompt": "a", "completions": "b"}]))


def test_tokenizers_that_cannot_be_used(make_trainer, tokenizer, tmp_path, char_spec):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="neither a padding token nor an end-of-text token"):
        make_trainer(kwargs={"processing_class": bare})
    make_policy(char_spec, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="every prompt into no tokens at all.*processing_class"):
        make_trainer(str(tmp_path / "alone"), kwargs={"processing_class": None})


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_arguments_without_meaning_are_refused(make_trainer, name):
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        make_trainer(kwargs={name: [print]})


def test_lora_targets_that_match_nothing_are_named(make_trainer):
    config = LoraConfig(r=4, target_modules=["q_proj", "attn_out", "ff_proj"])
    message = r"\['attn_out', 'ff_proj'\] match nothing in Qwen3ForCausalLM. Its linear layers are \['down_proj', .*'v_proj'\]"
    with pytest.raises(ValueError, match=message):
        make_trainer(kwargs={"peft_config": config})
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_policy_path(), kwargs={"peft_config": config})
    pattern = r"\['q_proj'\] match nothing .* A text is a pattern for whole names: give a list of names. Its linear layers are"
    with pytest.raises(ValueError, match=pattern):
        make_trainer(kwargs={"peft_config": LoraConfig(r=4, target_modules="q_proj")})


def test_objects_of_another_type(make_trainer, tokenizer, tmp_path):
    with pytest.raises(
        TypeError, match="`train_dataset` must be a Dataset or an IterableDataset, got list. Make one with"
    ):
        make_trainer(dataset=[{"prompt": "a"}])
    with pytest.raises(TypeError, match="`model` must be a path, a hub id or a model, got int"):
        make_trainer(7)
    with pytest.raises(TypeError, match="`args` must be a DTRPOConfig, got GRPOConfig"):
        DTRPOTrainer(tiny_policy_path(), codes, GRPOConfig(str(tmp_path), bf16=False), make_dataset())


def test_empty_prompt(make_trainer):
    with pytest.raises(ValueError, match="train_dataset: row 1 has no prompt"):
        make_trainer(dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]))
    with pytest.raises(ValueError, match="no prompt to answer"):
        make_trainer().answer([])


def test_tokenizer_of_another_model(make_trainer, char_spec):
    with pytest.raises(
        ValueError, match="holds token .*, but the model's vocabulary has 40 tokens. Is this the model's"
    ):
        make_trainer(make_policy(char_spec))


def test_reference_of_an_unsaved_model(make_trainer):
    with pytest.raises(ValueError, match="not loaded from anywhere. Save it and pass the path"):
        make_trainer(beta=0.1)
