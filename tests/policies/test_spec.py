"""What a checkpoint says about itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from tests.conftest import SPECS, make_policy
from trl_diffusion import DiffusionSpec, get_spec, set_spec, tiny_policy_path


def test_spec_is_saved_with_the_model(tmp_path, spec):
    policy = make_policy(spec)
    policy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert get_spec(loaded.config) == spec
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), loaded.parameters(), strict=True))


def test_a_model_without_a_spec_is_told_how_to_get_one():
    with pytest.raises(ValueError, match=r"no diffusion spec.*set_spec\(model.config, DiffusionSpec\(mask_token_id"):
        get_spec(Qwen3Config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_token_id": -1}, "mask_token_id"),
        ({"mask_token_id": 3, "attention": "causal"}, r"`attention` must be one of \['block', 'full'\], got 'causal'"),
        ({"mask_token_id": 3, "block_size": 0}, "block_size"),
        ({"mask_token_id": 3, "block_origin": "prompt"}, "block_origin"),
        (
            {"mask_token_id": 3, "first_token": "autoregressive"},
            "needs `token_shift=True` or `clean_attention='causal'`",
        ),
        ({"mask_token_id": 3, "clean_attention": "full"}, r"`clean_attention` must be one of \['block', 'causal'\]"),
        ({"mask_token_id": 3, "attention": "full", "clean_attention": "causal"}, "no block is clean while others"),
        ({"mask_token_id": 3, "token_shift": True}, "first_token='autoregressive'"),
        ({"mask_token_id": 3, "blocksize": 4}, r"Unknown diffusion spec fields \['blocksize'\]"),
        ({"block_size": 4}, "needs `mask_token_id`"),
        ({"mask_token_id": True}, "mask_token_id"),
        ({"mask_token_id": 3, "block_size": True}, "block_size"),
        ({"mask_token_id": 3, "token_shift": "false"}, "`token_shift` must be true or false, got 'false'"),
        ({"mask_token_id": 3, "stop_token_ids": 5}, "must be a list of token ids, got 5"),
        ({"mask_token_id": 3, "stop_token_ids": [3]}, "holds the mask token"),
    ],
)
def test_bad_specs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSpec.from_dict(fields)


def test_a_token_outside_the_vocabulary_is_refused():
    config = Qwen3Config(vocab_size=40)
    with pytest.raises(ValueError, match="`mask_token_id` holds 40, but the model's vocabulary has 40"):
        set_spec(config, DiffusionSpec(mask_token_id=40))
    with pytest.raises(ValueError, match="`stop_token_ids` holds 99"):
        set_spec(config, DiffusionSpec(mask_token_id=3, stop_token_ids=(99,)))


def test_spec_round_trips_through_plain_types(spec):
    assert DiffusionSpec.from_dict(spec.to_dict()) == spec
    assert SPECS["block-of-one"].replace(block_size=4).block_size == 4


def test_embedded_policy_loads():
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    spec = get_spec(policy.config)
    assert tokenizer.mask_token_id == spec.mask_token_id
    assert spec.stop_token_ids == (tokenizer.eos_token_id,)
    text = "sudoku 12\n34 = (5*6)?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
