"""Responses to the same prompt: its whole blocks are run once, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from tests.closeness import assert_close
from tests.conftest import SPECS, make_policy, make_prompts
from trl_diffusion import DecodingConfig, DiffusionSpec, decode
from trl_diffusion.decoding.loop import DenoisingLoop


SOON = ("block-from-sequence", "shift-autoregressive-first", "clean-causal")  # the others are in `make test-long`
BLOCK = [
    pytest.param(name, marks=() if name in SOON else pytest.mark.long)
    for name, spec in sorted(SPECS.items(), key=lambda item: item[0] not in SOON)
    if spec.attention == "block"
]
CONFIG = DecodingConfig(19, temperature=1.0, tokens_per_step=2)


def passes(model: nn.Module, spec: DiffusionSpec) -> list[Counter]:
    """How often each position is run in each pass, from now on."""
    decode(model, [[7]], CONFIG, spec, seeds=[0])  # which tries the policy before its first pass
    found: list[Counter] = []

    def see(module, args, kwargs):
        found.append(Counter(kwargs["position_ids"].flatten().tolist()))

    model.register_forward_pre_hook(see, with_kwargs=True)
    return found


@pytest.mark.parametrize("batch_size", [None, 4, 1])
@pytest.mark.parametrize("name", BLOCK)
def test_every_response_is_what_it_is_alone(name, batch_size):
    """Groups of several sizes, and prompts that differ only after their whole blocks."""
    spec = SPECS[name]
    model, (first, second, third, *_) = make_policy(spec), make_prompts(lengths=(21, 16, 3))
    prompts = [first, first, second, first, third, third, [*first[:16], *first[:3]], second, second, first]
    seeds = list(range(len(prompts)))
    together = decode(model, prompts, CONFIG, spec, seeds=seeds, batch_size=batch_size)
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = decode(model, [prompt], CONFIG, spec, seeds=[seed])
        own = together.select([number])
        length = int(alone.canvas_lengths)
        assert int(own.canvas_lengths) == length and int(own.completion_lengths) == int(alone.completion_lengths)
        assert torch.equal(own.canvas_ids[:, :length], alone.canvas_ids)
        assert torch.equal(own.steps[:, :length], alone.steps)
        assert_close(own.logps[:, :length], alone.logps)


@pytest.mark.parametrize("name", BLOCK)
def test_whole_blocks_of_a_prompt_are_run_once(name):
    spec = SPECS[name]
    model, (prompt, other) = make_policy(spec), make_prompts(lengths=(21, 18))
    seen = passes(model, spec)
    decode(model, [prompt] * 3 + [other] * 2, CONFIG, spec, seeds=list(range(5)))
    lengths = torch.tensor([21, 18])
    heads = spec.head(lengths).tolist()
    before = int(spec.token_shift or spec.first_token == "autoregressive")
    expected: Counter = Counter()
    for head, count in zip(heads, (3, 2), strict=True):
        expected.update(range(head))
        expected.update(list(range(head - before, head)) * (count - 1))
    assert {place: seen[0][place] for place in range(min(heads))} == {p: expected[p] for p in range(min(heads))}
    assert all(
        sum(counter[place] for counter in seen) == expected[place] for place in range(min(heads))
    )  # and never again


def test_a_response_that_begins_later_copies_from_one_that_is_under_way():
    """The second lane is free first: its answer ends with its first block."""
    spec = SPECS["block-from-sequence"]
    model, (prompt,) = make_policy(spec), make_prompts(lengths=(24,))
    loop = DenoisingLoop(model, [prompt] * 4, CONFIG, spec, seeds=[0, 1, 2, 3], batch_size=2)
    seen = passes(model, spec)
    with torch.no_grad():
        loop.run()
    assert sum(counter[0] for counter in seen) == 1


def test_nothing_is_copied_from_a_lane_that_has_ended():
    spec = SPECS["block-from-sequence"]
    model, (prompt, other) = make_policy(spec), make_prompts(lengths=(24, 24))
    seen = passes(model, spec)
    decode(model, [prompt, other, prompt], CONFIG, spec, seeds=[0, 1, 2], batch_size=1)
    assert sum(counter[0] for counter in seen) == 3


def test_full_attention_shares_nothing():
    spec = SPECS["full"]
    model, (prompt,) = make_policy(spec), make_prompts(lengths=(24,))
    seen = passes(model, spec)
    decode(model, [prompt] * 3, CONFIG, spec, seeds=[0, 1, 2])
    assert {counter[0] for counter in seen} <= {1, 2, 3} and seen[0][0] == 3
