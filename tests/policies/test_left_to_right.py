"""What writes from left to right refuses diffusion policies, whichever way they were opened; other models are left alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, pipeline
from trl import GRPOConfig, GRPOTrainer

from tests.conftest import MASK, STOP, make_policy
from trl_diffusion import DiffusionSpec, set_spec, tiny_policy_path
from trl_diffusion.policies.left_to_right import refuse_policies
from trl_diffusion.policies.policy import open_policy


REFUSED = (
    r"is a diffusion policy.*from left to right.*`trl_diffusion.generate\(model, tokenizer, prompts\)`.*DTRPOTrainer"
)
PROMPT = torch.tensor([[7, 8, 9]])
AUTOREGRESSIVE = DiffusionSpec(
    MASK, block_size=1, token_shift=True, first_token="autoregressive", stop_token_ids=(STOP,)
)


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(tiny_policy_path())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path(), padding_side="left")


def test_a_policy_refuses_however_it_is_opened(tiny, tokenizer):
    """As a stock model whose config has a spec, by our loader, with an adapter, of a family, in a pipeline and in batches."""
    sdar = AutoConfig.for_model(
        "sdar", vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    adapted = get_peft_model(make_policy(DiffusionSpec(MASK)), LoraConfig(target_modules=["q_proj"]))
    policies = [tiny, open_policy(tiny_policy_path()).model, adapted, AutoModelForCausalLM.from_config(sdar)]
    for policy in policies:
        with pytest.raises(ValueError, match=REFUSED) as error:
            policy.generate(input_ids=PROMPT, max_new_tokens=4)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=REFUSED):
        pipeline("text-generation", model=tiny, tokenizer=tokenizer)("sudoku 3102200002100320")
    with pytest.raises(ValueError, match=REFUSED):
        tiny.generate_batch(PROMPT.tolist())


def test_trls_own_trainer_refuses_before_it_learns(tiny, tokenizer, tmp_path):
    args = GRPOConfig(
        str(tmp_path), bf16=False, per_device_train_batch_size=2, num_generations=2, max_completion_length=4, max_steps=1,
        report_to="none", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        tiny_policy_path(), lambda completions, **_: [0.0] * len(completions), args,
        Dataset.from_dict({"prompt": ["1+1="] * 2}), processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(ValueError, match=REFUSED):
        trainer.train()


def test_others_are_left_alone():
    """Causal models, policies that write one token after another, and loops that are not transformers'."""
    policy = make_policy(DiffusionSpec(MASK, block_size=1))
    with pytest.raises(ValueError, match=REFUSED):  # its tokens are read from a mask token
        policy.generate(input_ids=PROMPT, max_new_tokens=4)
    assert policy.generate(input_ids=PROMPT, custom_generate=lambda model, input_ids, **_: input_ids).equal(PROMPT)
    set_spec(policy.config, AUTOREGRESSIVE)
    same = policy.generate(input_ids=PROMPT, max_new_tokens=4, do_sample=False)
    policy.config.diffusion_spec = None
    assert policy.generate(input_ids=PROMPT, max_new_tokens=4, do_sample=False).equal(same) and same.shape == (1, 7)


def test_it_is_done_once_and_keeps_the_signature():
    before = GenerationMixin.generate
    refuse_policies()
    assert GenerationMixin.generate is before
    assert list(inspect.signature(before).parameters)[:3] == ["self", "inputs", "generation_config"]
