"""Greedy decoding reproduces the generations of the families' published code, token for token."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trl_diffusion  # noqa: F401  (registers the families)
from tests.conftest import shared
from trl_diffusion import DecodingConfig, decode, get_spec


def family(name: str, **changes):
    directory = shared("fixtures", name)
    policy = AutoModelForCausalLM.from_pretrained(directory).eval()
    # The published loops of these generations do not stop early.
    spec = get_spec(policy.config, {"stop_token_ids": (), **changes})
    return policy, spec, load_file(directory / "golden.safetensors")


CASES = {
    "llada": (
        {"block_size": 8},
        DecodingConfig(32, steps_per_block=8, allow_mask_token=True),
        "prompt",
        "gen_semi_ar_1per",
    ),
    "dream": (
        {"block_size": 24},
        DecodingConfig(
            24, steps_per_block=24, schedule="linear", top_k=50, allow_mask_token=True, tempered_confidence=True
        ),
        "prompt",
        "gen_maskgit_plus",
    ),
    "fast_dllm_v2": (
        {"mask_token_id": 300},
        DecodingConfig(77, strategy="threshold", threshold=1.0, sub_block_size=8, tempered_confidence=True),
        "prompt_20",
        "gen_20_thr1.0",
    ),
    "sdar": ({}, DecodingConfig(22, tokens_per_step=1, tempered_confidence=True), "prompt", "gen_static4"),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_generation(name):
    changes, config, prompt, generation = CASES[name]
    policy, spec, golden = family(name, **changes)
    batch = decode(policy, golden[prompt].tolist(), config, spec)
    expected = golden[generation][:, golden[prompt].shape[1] :].tolist()
    assert batch.completions() == expected


def test_golden_generation_in_a_batch_of_mixed_lengths():
    """A prompt decodes to the golden tokens beside prompts of other lengths, too."""
    for name, (changes, config, prompt, generation) in CASES.items():
        policy, spec, golden = family(name, **changes)
        rows = golden[prompt].tolist()
        batch = decode(policy, [[7, 8, 9], *rows, [11] * 37], config, spec)
        expected = golden[generation][:, golden[prompt].shape[1] :].tolist()
        assert batch.completions()[1 : 1 + len(rows)] == expected
