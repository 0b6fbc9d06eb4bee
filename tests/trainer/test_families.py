"""Every checkpoint family trains from its path, and its trajectories are scored as they were made."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import trl_diffusion  # noqa: F401  (registers the families)
from tests.checkpoints import EXPERTS, checkpoint
from tests.closeness import ROUNDING, assert_close
from tests.conftest import make_prompts, shared
from tests.reference import draw_everything_at, lay_out, plain_forward_logps, writes_that_count
from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import DecodingConfig, collect, decode, get_spec, load_trajectories
from trl_diffusion.policies.loading import load_config
from trl_diffusion.policies.lora import empty_model, expert_names, linear_names
from trl_diffusion.scoring.score import score
from trl_diffusion.trajectories.trajectory import token_states


# What the fixtures' configs do not say, and blocks short enough for a quick test.
FAMILIES = {
    "llada": {"block_size": 8},
    "dream": {"block_size": 8},
    "fast_dllm_v2": {"mask_token_id": 300},
    "sdar": {},
    "sdar_moe": {},
    "llada_moe": {"block_size": 8},
    "llada2": {},
    "illada": {"block_size": 8},
    "stable_diffcoder": {"mask_token_id": 300, "block_size": 4, "stop_token_ids": [290]},
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_o1_recorded_equals_packed_equals_plain(name):
    policy = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    spec = get_spec(policy.config, FAMILIES[name])
    for config in (
        DecodingConfig(20, 1.0, tokens_per_step=2),
        DecodingConfig(20, 0.8, strategy="threshold", threshold=0.02),
    ):
        batch = decode(policy, make_prompts((3, 13, 32, 37)), config, spec, seeds=[1, 2, 3, 4])
        plain = plain_forward_logps(policy, spec, batch, config.temperature)
        unmasked, counted = batch.steps >= 0, writes_that_count(spec, batch)
        assert_close(batch.logps[unmasked], plain[unmasked])
        groups, states, *_ = token_states(spec, batch)
        scored = torch.zeros_like(counted)
        for step in range(int(states.max()) + 1):
            layout = lay_out(batch, spec, draw_everything_at(step, batch, groups))
            here = layout.weights > 0
            logps = score(policy, layout, spec, config.temperature)[0]
            assert_close(logps[here], plain[here])
            scored |= here
        assert torch.equal(scored, counted)


@pytest.mark.parametrize(
    ("name", "beta", "lora"),
    [
        *((name, 0.1 * (number % 2), False) for number, name in enumerate(FAMILIES)),
        *((name, 0.1, True) for name in FAMILIES),
    ],
)
def test_three_steps_from_a_path(make_trainer, tmp_path, name, beta, lora):
    directory = checkpoint(name)
    model = empty_model(load_config(directory))
    targets = {
        "target_modules": [part for part in linear_names(model) if part != "lm_head"],
        "target_parameters": expert_names(model),
    }
    trainer = make_trainer(
        str(directory),
        beta=beta,
        gradient_checkpointing=True,
        diffusion_spec=FAMILIES[name] or None,
        kwargs={"peft_config": LoraConfig(r=4, **targets)} if lora else None,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 3
    for n, p in trainer.model.named_parameters():
        changes = "lora_" in n if lora else True
        assert torch.equal(p, before[n]) != changes, n
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert max(entry["diffusion/recorded_gap/max"] for entry in logs) < ROUNDING
    assert all(entry["diffusion/scored_tokens"] > 0 for entry in logs)
    assert ["experts/largest_load" in entry for entry in logs] == [name in EXPERTS] * 3
    if name in EXPERTS:
        evenly = model.config.num_experts / model.config.num_experts_per_tok
        assert all(1 < entry["experts/largest_load"] <= evenly and 0 <= entry["experts/unused"] < 1 for entry in logs)
    if beta:
        assert logs[0]["kl"] < 1e-6 < logs[-1]["kl"]
    trainer.save_model(tmp_path / "trained")
    if not lora:  # saved under the family's own names
        with (
            safe_open(directory / "model.safetensors", "pt") as a,
            safe_open(tmp_path / "trained" / "model.safetensors", "pt") as b,
        ):
            assert set(a.keys()) == set(b.keys())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
        assert all(torch.equal(x, y) for x, y in zip(again.parameters(), trainer.model.parameters(), strict=True))
        assert get_spec(again.config) == trainer.spec


@pytest.mark.parametrize("name", FAMILIES)
def test_stored_answers_of_every_family(make_trainer, tokenizer, tmp_path, name):
    """What a family answered trains it offline: the first update finds the log-probabilities that were recorded."""
    spec = FAMILIES[name] or None
    policy = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    collect(
        policy, tokenizer, make_dataset(2), codes, tmp_path / "run", DecodingConfig(14, 1.0, tokens_per_step=2),
        num_responses=4, batch_size=8, seed=0, spec=get_spec(policy.config, spec), disable_tqdm=True,
    )  # fmt: skip
    trainer = make_trainer(
        str(checkpoint(name)),
        reward_funcs=None,
        dataset=load_trajectories(tmp_path / "run"),
        diffusion_spec=spec,
        max_steps=2,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["diffusion/recorded_gap/max"] < ROUNDING and logs[0]["reward_std"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_an_unknown_model_type_is_told_what_there_is(make_trainer, tmp_path):
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange_dlm", "architectures": ["StrangeLM"]}')
    with pytest.raises(ValueError, match="(?s)strange_dlm.*LLaDA.*SDAR.*diffusion_spec"):
        make_trainer(str(tmp_path / "strange"))


def test_a_mask_token_that_only_the_tokenizer_knows(make_trainer, tokenizer):
    """Fast-dLLM v2's config does not name it."""
    path = str(shared("fixtures", "fast_dllm_v2"))
    assert make_trainer(path).spec.mask_token_id == tokenizer.mask_token_id
    blank = copy.deepcopy(tokenizer)
    blank.mask_token = None
    with pytest.raises(ValueError, match="Neither the config .* nor its tokenizer says which token stands for"):
        make_trainer(path, kwargs={"processing_class": blank})
