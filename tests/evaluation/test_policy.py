"""Opening policies, and what their answers cost."""

from __future__ import annotations

import math
import sys
from importlib import import_module

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.conftest import SPECS, make_policy, make_prompts
from trl_diffusion import DecodingConfig, decode, tiny_policy_path
from trl_diffusion.evaluation.generate import Usage, cut, generate
from trl_diffusion.policies.policy import Policy, open_policy
from trl_diffusion.utils import read_mapping


PROMPTS = ["sudoku 3102200002100320", "countdown 30,100,93=23", "sudoku 0140432014020000"]


def test_an_adapter_is_used_as_it_is(tiny, adapter):
    """Neither merged nor left out: answers are those of the merged model, and the weights are still apart."""
    opened = open_policy(adapter=adapter)  # it knows which model it was made for
    assert isinstance(opened.model, PeftModel) and not opened.model.training
    assert any("lora_A" in name for name, _ in opened.model.named_parameters())
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_policy_path()), adapter)
    merged = Policy(merged.merge_and_unload().eval(), opened.tokenizer, opened.spec)
    config = DecodingConfig(17, tokens_per_step=2)
    answers = [generate(policy, policy.encode(PROMPTS), config)[0] for policy in (opened, merged, tiny)]
    assert answers[0] == answers[1] != answers[2]


def test_an_adapter_for_other_layers_is_refused(tmp_path):
    model = make_policy(SPECS["full"], hidden_size=128, backbone="llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"q_proj"', '"q_proj", "attn_out"'))
    with pytest.raises(ValueError, match=r"\['attn_out'\] match nothing"):
        open_policy(tiny_policy_path(), adapter=str(tmp_path))


def test_a_whole_model_is_no_adapter():
    with pytest.raises(ValueError, match="holds a whole model and no adapter. Give it as the model."):
        open_policy(tiny_policy_path(), tiny_policy_path())


def test_no_model_is_refused():
    with pytest.raises(ValueError, match="No model was given"):
        open_policy()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_usage_is_what_decoding_one_by_one_costs(policy, spec, batch_size):
    """Whatever is decoded together: an answer's forward passes are those it needs alone."""
    prompts = make_prompts((9, 3, 16, 21))
    config = DecodingConfig(20, temperature=1.0, tokens_per_step=3)
    forwards, expected = 0, []

    def count(*args, **kwargs):
        nonlocal forwards
        forwards += 1

    answering = Policy(policy, None, spec)  # tries the policy
    handle = policy.register_forward_hook(count)
    for prompt, seed in zip(prompts, (1, 2, 3, 4), strict=True):
        expected += decode(policy, [prompt], config, spec, [seed]).completions()
    handle.remove()
    answers, usage = generate(answering, prompts, config, [1, 2, 3, 4], batch_size)
    assert answers == expected
    assert usage.forwards == forwards
    assert (usage.answers, usage.tokens) == (4, sum(map(len, expected)))
    assert usage.tokens_per_forward == pytest.approx(usage.tokens / forwards)
    assert usage.seconds > 0 and usage.tokens_per_second == pytest.approx(usage.tokens / usage.seconds)


def test_a_prompt_that_cannot_be_answered_is_named_by_its_own_place(tiny):
    """Prompts are answered in another order, the longest first."""
    prompts = tiny.encode(PROMPTS)
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        generate(tiny, [prompts[0], [], *prompts[1:]], DecodingConfig(4))


def test_no_answers_cost_nothing():
    assert math.isnan(Usage().tokens_per_forward) and math.isnan(Usage().tokens_per_second)
    total = Usage(1, 2, 3, 4.0)
    total.add(Usage(1, 2, 3, 4.0))
    assert total == Usage(2, 4, 6, 8.0)


@pytest.mark.parametrize("origin", ["sequence", "response"])
def test_prompts_lose_their_beginning_where_they_must(origin):
    """What is left fits, and one token more would not."""
    spec = SPECS["block-from-sequence" if origin == "sequence" else "block-from-response"]
    policy = Policy(make_policy(spec, max_position_embeddings=44), None, spec)
    prompt = make_prompts((60,))[0]
    (fitted,) = policy.fit([prompt], 10)
    assert fitted == prompt[-len(fitted) :]
    decode(policy.model, [fitted], DecodingConfig(10), spec)
    with pytest.raises(ValueError, match="more than the policy's context of 44"):
        decode(policy.model, [prompt[-len(fitted) - 1 :]], DecodingConfig(10), spec)
    assert policy.fit([prompt[:5]], 10) == [prompt[:5]]
    with pytest.raises(ValueError, match="leave no room"):
        policy.fit([prompt], 44)


def test_cut():
    assert cut("a\ndef b\nclass", ["\nclass", "\ndef"]) == "a"
    assert cut("a", ["b", ""]) == "a"
    assert cut("ab", []) == "ab"


@pytest.mark.parametrize(
    "text",
    ["strategy:threshold+threshold:0.5", '{"strategy": "threshold", "threshold": 0.5}', "FILE.json", "FILE.yaml"],
)
def test_settings_from_a_command_line(tmp_path, text):
    expected = {"strategy": "threshold", "threshold": 0.5}
    (tmp_path / "FILE.json").write_text('{"strategy": "threshold", "threshold": 0.5}')
    (tmp_path / "FILE.yaml").write_text("strategy: threshold\nthreshold: 0.5\n")
    assert read_mapping(text if "FILE" not in text else str(tmp_path / text), "decoding") == expected
    assert read_mapping(expected, "decoding") == expected
    assert read_mapping(None, "decoding") == {}
    assert DecodingConfig.from_dict(expected) == DecodingConfig(**expected)


@pytest.mark.parametrize("text", ["threshold", "{", "nothing.yaml", "[1, 2]"])
def test_settings_that_are_none(text):
    with pytest.raises(ValueError, match="decoding"):
        read_mapping(text, "decoding")


def test_unknown_and_impossible_settings():
    with pytest.raises(ValueError, match=r"\['speed'\]; there are .*'tokens_per_step'"):
        DecodingConfig.from_dict({"speed": 3})
    with pytest.raises(ValueError, match="threshold"):
        DecodingConfig.from_dict({"threshold": 3})


def test_nothing_here_needs_the_harness(monkeypatch):
    """lm-evaluation-harness is an extra: only its own model and tasks import it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or "diffusion.evaluation" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("generate", "likelihood", "benchmarks", "run"):
        import_module(f"trl_diffusion.evaluation.{name}")
    with pytest.raises(ImportError, match="pip install 'trl-diffusion\\[eval\\]'"):
        import_module("trl_diffusion.evaluation.harness")


def test_float_types():
    assert open_policy(tiny_policy_path(), dtype="bfloat16").model.dtype == torch.bfloat16
    assert open_policy(tiny_policy_path()).model.dtype == torch.float32
