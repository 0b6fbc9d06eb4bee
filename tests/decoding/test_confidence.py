"""Which distribution a strategy looks at: the policy's own, whatever temperature and truncation tokens are sampled with."""

from __future__ import annotations

import math

import pytest
import torch

from tests.closeness import assert_close
from tests.conftest import MASK, SPECS, make_policy, make_prompts
from tests.reference import plain_forward_logps
from trl_diffusion import DecodingConfig, DTRPOConfig, decode
from trl_diffusion.commands.generate import main
from trl_diffusion.decoding import loop, sampling
from trl_diffusion.decoding.sampling import propose
from trl_diffusion.decoding.strategies import STRATEGIES
from trl_diffusion.offline.orders import finished_batch, replay_confidence


TEMPERATURES = (0.0, 0.01, 0.3, 1.0, 2.0)
SPEC = SPECS["block-from-response"].replace(block_size=4, stop_token_ids=())
PROMPT = [7, 8, 9]
# Of each position of a block, the probabilities of tokens 10, 11, ...; the surest position is the third.
# Largest: 0.5, 0.7, 0.97, 0.92. Entropies: 1.04, 0.80, 0.13, 0.28. Margins: 0.2, 0.5, 0.94, 0.84.
PROBABILITIES = [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.97, 0.03], [0.92, 0.08]]


def table() -> torch.Tensor:
    """Logits of each position of the block, `(4, 40)`."""
    logits = torch.full((4, 40), -torch.inf)
    for place, row in enumerate(PROBABILITIES):
        logits[place, 10 : 10 + len(row)] = torch.tensor(row).log()
    return logits


@pytest.fixture
def hand_made(monkeypatch):
    """A policy whose distributions are those above, in every state."""
    logits = table()

    def policy_logits(model, input_ids, position_ids, allowed, rows, columns, cache=None):
        return logits[position_ids[rows, columns] - len(PROMPT)]

    monkeypatch.setattr(loop, "policy_logits", policy_logits)
    return make_policy(SPEC)


def steps_of(policy, seed: int = 0, **settings) -> list[int]:
    """The step that unmasks each position of the block."""
    return decode(policy, [PROMPT], DecodingConfig(4, **settings), SPEC, seeds=[seed]).steps[0].tolist()


def as_sampled(tokens, temperature: float) -> torch.Tensor:
    """Log-probabilities of the tokens of a block under the tempered distributions; by hand."""
    values = []
    for row, token in zip(PROBABILITIES, tokens.tolist(), strict=True):
        powers = [p ** (1 / (temperature or 1.0)) for p in row]
        values.append(math.log(powers[token - 10] / sum(powers)))
    return torch.tensor(values)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_threshold_means_the_same_at_every_temperature(hand_made, temperature):
    """Positions 2 and 3 at once, as long as their likeliest tokens are sampled; 0 and 1 alone, never above 0.9."""
    seen = 0
    for seed in range(20):
        config = DecodingConfig(4, temperature, strategy="threshold", threshold=0.9)
        batch = decode(hand_made, [PROMPT], config, SPEC, seeds=[seed])
        tokens, steps = batch.canvas_ids[0], batch.steps[0].tolist()
        assert_close(batch.logps[0], as_sampled(tokens, temperature))
        assert steps.count(steps[0]) == steps.count(steps[1]) == 1
        if tokens[2] == tokens[3] == 10 and steps[2] == 0:
            assert steps[3] in (0, 1)  # 1: where its first proposal was the other token
            seen += steps[3] == 0
        if temperature <= 0.01:
            assert steps == [2, 1, 0, 0]
    assert seen > 5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"strategy": "entropy_bound", "entropy_bound": 0.5}, [2, 1, 0, 0]),  # 0.13 + 0.28 < 0.5
        ({"strategy": "entropy_bound", "entropy_bound": 0.2}, [3, 2, 0, 1]),
        ({"strategy": "entropy"}, [3, 2, 0, 1]),
        ({"strategy": "margin"}, [3, 2, 0, 1]),
        ({"strategy": "margin", "tokens_per_step": 3}, [1, 0, 0, 0]),
    ],
)
def test_entropies_and_margins_are_the_same_at_every_temperature(hand_made, settings, expected):
    for temperature in TEMPERATURES:
        for seed in range(3):
            assert steps_of(hand_made, seed, temperature=temperature, **settings) == expected
    for truncation in ({"top_k": 2}, {"top_p": 0.6}, {"suppress_tokens": [11]}):
        assert steps_of(hand_made, temperature=0.0, **truncation, **settings) == expected


def test_truncation_makes_no_token_surer(hand_made):
    """With `top_k=1` every token that is sampled has probability 1 there, and its own in the policy."""
    for truncation in ({"top_k": 1}, {"top_p": 0.01}, {"suppress_tokens": [11, 12]}):
        config = DecodingConfig(4, 1.0, strategy="threshold", threshold=0.9, **truncation)
        batch = decode(hand_made, [PROMPT], config, SPEC, seeds=[0])
        assert batch.steps.tolist() == [[2, 1, 0, 0]]
        assert batch.logps.abs().max() < 1e-6  # recorded: as sampled


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "threshold", "threshold": 0.9, "temperature": 0.01},
        {"strategy": "entropy_bound", "temperature": 0.01},
        {"strategy": "threshold", "threshold": 0.9, "temperature": 1.0, "top_k": 1},
    ],
)
def test_tempered_confidence_looks_at_what_is_sampled_from(hand_made, settings):
    """Where every token looks sure, all are unmasked at once."""
    assert steps_of(hand_made, tempered_confidence=True, **settings) == [0, 0, 0, 0]
    assert steps_of(hand_made, **settings) != [0, 0, 0, 0]


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"random"}))
@pytest.mark.parametrize("name", ["block-from-sequence", "shift-autoregressive-first", "full-shift"])
def test_a_temperature_of_nearly_0_is_greedy_decoding(name, strategy):
    """The same tokens at the same steps."""
    spec = SPECS[name]
    policy, prompts = make_policy(spec), make_prompts((3, 8, 13))
    settings = {"strategy": strategy, "threshold": 0.4, "entropy_bound": 2.0}
    greedy = decode(policy, prompts, DecodingConfig(16, **settings), spec)
    cold = decode(policy, prompts, DecodingConfig(16, 1e-5, **settings), spec, seeds=[0, 1, 2])
    assert torch.equal(cold.canvas_ids, greedy.canvas_ids)
    assert torch.equal(cold.steps, greedy.steps)


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.0, "top_p": 0.8},
    {"temperature": 1.3, "suppress_tokens": (8, 9)},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("predicts_mask_token", [False, True])
def test_two_distributions(settings, predicts_mask_token):
    """What is recorded, and what a strategy looks at, against `torch` on the same logits."""
    spec = SPEC.replace(predicts_mask_token=predicts_mask_token)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=generator)
    uniforms = torch.rand(50, generator=generator) if settings["temperature"] else None
    proposal = propose(logits, spec, DecodingConfig(**settings), uniforms)
    plain = logits.clone()
    if not predicts_mask_token:
        plain[:, MASK] = -torch.inf
    expected = plain.log_softmax(-1)
    assert torch.equal(proposal.seen == -torch.inf, expected == -torch.inf)
    assert_close(proposal.seen.exp(), expected.exp())
    picked = proposal.tokens[:, None]
    assert_close(proposal.seen_logps, expected.gather(1, picked)[:, 0])
    tempered = propose(logits, spec, DecodingConfig(**settings, tempered_confidence=True), uniforms)
    assert torch.equal(tempered.tokens, proposal.tokens) and torch.equal(tempered.logps, proposal.logps)
    assert torch.equal(tempered.seen.gather(1, picked)[:, 0], proposal.logps)
    assert (tempered.seen.exp().sum(-1) - 1).abs().max() < 1e-5
    assert not torch.allclose(tempered.seen_logps, proposal.seen_logps)


def test_nothing_is_computed_twice_where_both_are_the_same(monkeypatch):
    calls = []

    def counting(*args):
        calls.append(args)
        return original(*args)

    original = sampling.log_distribution
    monkeypatch.setattr(sampling, "log_distribution", counting)
    logits, uniforms = torch.randn(5, 40), torch.rand(5)
    for settings, expected in (
        ({"temperature": 1.0}, 1),
        ({"temperature": 0.0}, 1),
        ({"temperature": 0.5}, 2),
        ({"temperature": 0.5, "tempered_confidence": True}, 1),
        ({"temperature": 1.0, "top_k": 3}, 2),
        ({"temperature": 1.0, "top_k": 3, "tempered_confidence": True}, 1),
    ):
        calls.clear()
        propose(logits, SPEC, DecodingConfig(**settings), uniforms if settings["temperature"] else None)
        assert len(calls) == expected


# ----------------------------------------------------------------------- tokens that are no answer are never proposed


@pytest.mark.parametrize("truncation", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_truncation_counts_tokens_that_can_be_proposed(truncation, temperature):
    """Where the mask token is the likeliest, something else is still left."""
    spec = SPEC.replace(predicts_mask_token=True)
    logits = torch.full((200, 40), -5.0)
    logits[:, MASK], logits[:, 12], logits[:, 13] = 9.0, 3.0, 1.0
    uniforms = torch.linspace(0, 0.999, 200) if temperature else None
    proposal = propose(logits, spec, DecodingConfig(temperature=temperature, **truncation), uniforms)
    assert set(proposal.tokens.tolist()) <= {12, 13} and proposal.logps.isfinite().all()


def test_a_share_too_small_for_float32_is_sampled_from_all_the_same():
    """The mask token has all but 1e-60 of the probability; the rest is 3 : 1."""
    spec = SPEC.replace(predicts_mask_token=True)
    logits = torch.full((1000, 40), -torch.inf)
    logits[:, MASK], logits[:, 12], logits[:, 13] = 140.0, math.log(3), 0.0
    proposal = propose(logits, spec, DecodingConfig(temperature=1.0), torch.linspace(0, 0.9999, 1000))
    assert set(proposal.tokens.tolist()) == {12, 13}
    assert abs((proposal.tokens == 12).float().mean().item() - 0.75) < 0.01
    assert_close(proposal.logps[0], torch.tensor(math.log(3) - 140))


def test_rounding_of_a_parallel_sum_proposes_no_token_of_probability_0(monkeypatch):
    """A sum that is computed in parallel, as on a GPU, may rise where nothing is added."""
    logits = torch.full((1000, 40), -torch.inf)
    logits[:, 10], logits[:, 20] = 0.0, 0.0
    original = torch.Tensor.cumsum

    def rounded(values, *args, **kwargs):
        total = original(values, *args, **kwargs)
        total[:, 11:20] += 0.1  # far more than rounding, so that it is met
        return total

    monkeypatch.setattr(torch.Tensor, "cumsum", rounded)
    proposal = propose(logits, SPEC, DecodingConfig(temperature=1.0), torch.linspace(0, 0.9999, 1000))
    assert set(proposal.tokens.tolist()) == {10, 20} and proposal.logps.isfinite().all()


# -------------------------------------------------------------------------------------------- where else it is decided


@pytest.mark.parametrize("name", ["block-from-sequence", "shift-autoregressive-first", "full"])
def test_a_replay_has_the_same_order_at_every_temperature(name):
    """`decoding_order="confidence"`: the order is the policy's own, what is recorded is tempered."""
    spec = SPECS[name]
    policy = make_policy(spec)
    responses = [[*row, 5] for row in make_prompts((11, 20, 7), seed=4)]
    batch = finished_batch(make_prompts((3, 8, 13)), responses, spec)
    plain = replay_confidence(policy, batch, spec, 2, 1.0)
    cold = replay_confidence(policy, batch, spec, 2, 0.3)
    assert torch.equal(cold.steps, plain.steps)
    expected = plain_forward_logps(policy, spec, cold, 0.3)
    counted = cold.completion_mask
    assert_close(cold.logps[counted], expected[counted])
    assert not torch.allclose(cold.logps, plain.logps)


def test_the_trainer_and_the_command_line_have_the_setting(capsys, tmp_path):
    for value in (False, True):
        args = DTRPOConfig(str(tmp_path), tempered_confidence=value)
        assert args.decoding().tempered_confidence is args.decoding(temperature=0.0).tempered_confidence is value
    command = ["sudoku 3102200002100320", "--max_new_tokens", "17", "--strategy", "threshold", "--temperature", "0.01"]
    shown = []
    for options in ([], ["--tempered_confidence"], ["--temperature", "0"]):
        assert main([*command, "--stream", *options]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[2]  # the same steps
    assert shown[1].count("\n") < shown[0].count("\n")  # fewer of them, since all tokens look sure
    with pytest.raises(ValueError, match="`tempered_confidence` must be true or false"):
        DecodingConfig(tempered_confidence="yes")
