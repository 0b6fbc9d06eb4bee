"""The embedded policy, an adapter for it, and a fixture policy, opened to be measured."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import shared
from trl_diffusion import tiny_policy_path
from trl_diffusion.policies.policy import Policy, open_policy


@pytest.fixture(scope="session")
def tiny() -> Policy:
    return open_policy(tiny_policy_path())


@pytest.fixture(scope="session")
def adapter(tmp_path_factory) -> str:
    """Directory of an adapter that changes what the embedded policy answers."""
    directory = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def llada() -> Policy:
    """A tiny random checkpoint in LLaDA's format, which speaks the embedded policy's characters."""
    path = str(shared("fixtures", "llada"))
    return open_policy(path, tokenizer=tiny_policy_path(), diffusion_spec={"block_size": 8})
