"""The oracles run on random policies of every kind of spec, and on a checkpoint of every family."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

import trl_diffusion  # noqa: F401  (registers the families)
from tests.conftest import SPECS, STOP, make_policy, shared
from trl_diffusion import get_spec, set_spec


# What the fixtures' configs do not say, and blocks short enough for a quick test.
FAMILIES = {
    "llada": {"block_size": 8},
    "dream": {"block_size": 8},
    "fast_dllm_v2": {"mask_token_id": 300, "block_size": 8},
    "sdar": {},
}


@pytest.fixture(params=[*sorted(SPECS), *FAMILIES])
def named(request):
    """A policy and its spec."""
    if request.param in SPECS:
        return make_policy(SPECS[request.param]), SPECS[request.param]
    policy = AutoModelForCausalLM.from_pretrained(shared("fixtures", request.param)).eval()
    spec = get_spec(policy.config, {**FAMILIES[request.param], "stop_token_ids": (STOP,)})
    set_spec(policy.config, spec)
    return policy, spec


@pytest.fixture
def policy(named):
    return named[0]


@pytest.fixture
def spec(named):
    return named[1]
