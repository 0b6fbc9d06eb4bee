"""Likelihoods against plain forward passes, the chain rule, and the definition of the bound."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations
from math import comb, sqrt

import pytest
import torch

from tests.conftest import MASK, SPECS, make_policy, make_prompts
from tests.reference import plain_forward_logps
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.evaluation.likelihood import chain_likelihoods, elbo_likelihoods, is_autoregressive
from trl_diffusion.offline.orders import finished_batch
from trl_diffusion.policies.policy import Policy


PROMPT = make_prompts((9,))[0]  # with blocks of 8, it ends after the first token of a block


def in_order(prompt: list[int], continuation: list[int], spec, steps: list[int]):
    """The continuation, unmasked at the given steps of its block (or, with full attention, of the whole)."""
    batch = finished_batch([prompt], [continuation], spec if spec.attention == "block" else spec.replace(block_size=1))
    known = torch.tensor([steps])
    return replace(batch, steps=torch.cat([known, batch.steps[:, known.shape[1] :]], 1))


def plain(policy, spec, prompt, continuation, steps) -> list[float]:
    spec = spec if spec.attention == "block" else spec.replace(block_size=64)  # one block holds all steps
    with torch.no_grad():
        logps = plain_forward_logps(policy, spec, in_order(prompt, continuation, spec, steps), 1.0)
    return logps[0, : len(continuation)].tolist()


def test_chain_is_one_forward_pass_per_token(policy, spec):
    """From left to right, over several blocks: a token's step in its block is its place in it."""
    prompts, continuations = make_prompts((9, 3, 16)), make_prompts((11, 6, 1), seed=1)
    found = chain_likelihoods(Policy(policy, None, spec), prompts, continuations, batch_size=5)
    for prompt, continuation, one in zip(prompts, continuations, found, strict=True):
        steps = list(range(len(continuation)))
        if spec.attention == "block":
            tail = spec.prompt_tail(len(prompt))
            blocks = [(tail + i) // spec.block_size for i in range(len(continuation))]
            steps = [i - blocks.index(block) for i, block in enumerate(blocks)]
        assert one.value == pytest.approx(sum(plain(policy, spec, prompt, continuation, steps)), abs=1e-4, rel=1e-5)


@torch.no_grad()
def test_blocks_of_one_token_are_an_ordinary_language_model():
    spec = SPECS["block-of-one"]
    policy, prompts, continuations = make_policy(spec), make_prompts((9, 3)), make_prompts((11, 6), seed=1)
    assert is_autoregressive(spec) and not is_autoregressive(SPECS["full"])
    found = chain_likelihoods(Policy(policy, None, spec), prompts, continuations)
    for prompt, continuation, one in zip(prompts, continuations, found, strict=True):
        logits = policy(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1].double()
        logits[:, MASK] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
        assert one.value == pytest.approx(expected, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    ["block-from-sequence", "shift-autoregressive-first", "clean-causal-autoregressive-first", "full", "block-of-one"],
)
def test_chain_is_a_distribution(name):
    """The likelihoods of all continuations of two tokens sum to one."""
    spec = SPECS[name].replace(mask_token_id=8)
    policy = make_policy(spec, vocab_size=9, seed=1)
    pairs = [[a, b] for a in range(8) for b in range(8)]
    prompt = [7, 3, 2, 1, 6, 7, 4]  # the continuation spans two blocks
    found = chain_likelihoods(Policy(policy, None, spec), [prompt] * len(pairs), pairs)
    assert sum(torch.tensor([one.value]).exp().item() for one in found) == pytest.approx(1, rel=1e-4)


def test_greedy_is_what_greedy_decoding_writes(policy, spec):
    """A token a step from left to right is the order of the chain; a change of one token is not greedy."""
    prompt = make_prompts((13,))
    config = DecodingConfig(10, strategy="left_to_right", stop_token_ids=())
    answer = decode(policy, prompt, config, spec).completions()[0]
    if spec.attention == "full":  # the decoder saw masks behind the answer
        spec = spec.replace(block_size=10)
        answer = decode(policy, prompt, config, spec).completions()[0]
    other = [*answer[:-1], 7 if answer[-1] != 7 else 8]
    found = chain_likelihoods(Policy(policy, None, spec), prompt * 3, [answer, other, []])
    assert [one.is_greedy for one in found] == [True, False, True]
    assert found[2].value == 0


@pytest.mark.parametrize(
    "name",
    [
        "block-from-sequence",
        "shift-autoregressive-first",
        "clean-causal-autoregressive-first",
        "mask-predicted",
        "full",
        "full-shift",
    ],
)
def test_elbo_against_its_definition(name):
    """
    For the `N` tokens of a block: `m` uniform in 1 to `N`, a random set of `m` of them masked, `N / m` times the sum of
    their log-probabilities. All sets are written out, one plain forward pass per token, for mean and variance. The mean
    is also that of the chain rule over all orders.
    """
    spec = SPECS[name]
    policy, continuation = make_policy(spec), make_prompts((3,), seed=2)[0]
    mean = square = 0.0
    for m in (1, 2, 3):
        for hidden in combinations(range(3), m):
            logps = plain(policy, spec, PROMPT, continuation, [int(i in hidden) for i in range(3)])
            value = 3 / m * sum(logps[i] for i in hidden)
            mean += value / 3 / comb(3, m)
            square += value * value / 3 / comb(3, m)
    orders = [sum(plain(policy, spec, PROMPT, continuation, list(order))) for order in permutations(range(3))]
    assert sum(orders) / 6 == pytest.approx(mean, abs=1e-4, rel=1e-5)
    assert max(orders) - min(orders) > 0.1  # the order matters, so the bound is not the likelihood of any of them
    draws = 1500
    found = elbo_likelihoods(Policy(policy, None, spec), [PROMPT], [continuation], draws, seed=1, batch_size=250)[0]
    assert abs(found - mean) < 4 * sqrt((square - mean * mean) / draws)


def test_elbo_of_several_blocks_is_their_sum():
    """With block attention, what comes behind changes nothing about the bound of a block, which is that of its own."""
    spec = SPECS["shift-autoregressive-first"]
    policy = Policy(make_policy(spec), None, spec)
    prompt, continuation = make_prompts((8,))[0], make_prompts((11,), seed=3)[0]
    first, second = continuation[:8], continuation[8:]
    # One token of a block that is not the first is read from clean tokens, whatever is masked.
    whole, head = (
        elbo_likelihoods(policy, [prompt], [text], 400, batch_size=100)[0] for text in (continuation, first)
    )
    tail = elbo_likelihoods(policy, [prompt + first], [second], 400, batch_size=100)[0]
    assert abs(whole - head - tail) < 1.5
    assert abs(whole) > 5


def test_elbo_depends_on_its_own_text_alone(policy, spec):
    prompts, continuations = make_prompts((9, 3, 16, 9)), [*make_prompts((11, 6, 1), seed=1), []]
    opened = Policy(policy, None, spec)
    together = elbo_likelihoods(opened, prompts, continuations, 3, seed=5, batch_size=7)
    alone = [elbo_likelihoods(opened, [p], [c], 3, seed=5)[0] for p, c in zip(prompts, continuations, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4, rel=1e-5)
    assert together[3] == 0
    other = elbo_likelihoods(opened, prompts[:1], continuations[:1], 3, seed=6)[0]
    assert other != pytest.approx(together[0], abs=1e-4, rel=1e-5) or is_autoregressive(spec)


def test_no_draws_is_refused(policy, spec):
    with pytest.raises(ValueError, match="num_draws"):
        elbo_likelihoods(Policy(policy, None, spec), [[6]], [[7]], 0)
