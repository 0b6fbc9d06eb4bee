"""What the engine must not change, and what it must not compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from tests.closeness import assert_close
from tests.conftest import MASK, SPECS, STOP, make_policy, make_prompts
from tests.processes import run_pair
from trl_diffusion import DecodingConfig, TrajectoryBatch, decode
from trl_diffusion.decoding.attention import Spans, ragged_mask
from trl_diffusion.decoding.pace import PeerFailed
from trl_diffusion.policies.attention import PLANNED
from trl_diffusion.policies.spec import DiffusionSpec, get_spec
from trl_diffusion.policies.trial import try_policy
from trl_diffusion.trajectories.trajectory import NEVER


class Passes:
    """Counts what a policy runs: tokens of each forward pass, and positions whose logits are computed."""

    def __init__(self, policy):
        try_policy(policy, get_spec(policy.config), cached=True)  # or the first decoding would
        self.tokens, self.logits = [], []
        self.handles = [
            policy.register_forward_pre_hook(self._count, with_kwargs=True),
            policy.get_output_embeddings().register_forward_hook(lambda m, a, out: self.logits.append(out.shape[1])),
        ]

    def _count(self, module, args, kwargs):
        self.tokens.append(kwargs["input_ids"].numel())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


def assert_same(one: TrajectoryBatch, row: int, other: TrajectoryBatch, index: int) -> None:
    """Two batches hold the same trajectory."""
    length = int(one.canvas_lengths[row])
    assert int(other.canvas_lengths[index]) == length
    assert int(other.completion_lengths[index]) == int(one.completion_lengths[row])
    assert torch.equal(other.canvas_ids[index, :length], one.canvas_ids[row, :length])
    assert torch.equal(other.steps[index, :length], one.steps[row, :length])
    assert_close(other.logps[index, :length], one.logps[row, :length])


CONFIGS = {
    "greedy": DecodingConfig(16),
    "sampled": DecodingConfig(16, 0.8, tokens_per_step=2),
    "threshold": DecodingConfig(16, 0.8, strategy="threshold", threshold=0.3, sub_block_size=4),
    "random": DecodingConfig(16, strategy="random", tokens_per_step=3),
    "entropy-bound": DecodingConfig(16, strategy="entropy_bound", entropy_bound=2.0, stop_rule="token"),
}
CASES = [(spec, name) for spec in ("block-from-response", "shift-autoregressive-first") for name in CONFIGS]
CASES += [("full-shift", "sampled"), ("full-shift", "entropy-bound")]


@pytest.mark.parametrize(("spec_name", "name"), CASES)
def test_a_batch_of_64_and_the_queue_change_nothing(spec_name, name):
    policy = make_policy(SPECS[spec_name])
    size = 64 if (spec_name, name) == ("shift-autoregressive-first", "sampled") else 24
    prompts = make_prompts([1 + (7 * row) % 31 for row in range(size)])
    seeds = [50 + row for row in range(size)]
    together = decode(policy, prompts, CONFIGS[name], seeds=seeds)
    queued = decode(policy, prompts, CONFIGS[name], seeds=seeds, batch_size=5)
    for row in range(size):
        assert_same(together, row, queued, row)
    for row in range(0, size, 9):
        assert_same(together, row, decode(policy, [prompts[row]], CONFIGS[name], seeds=[seeds[row]]), 0)


@pytest.mark.parametrize(
    "spec_name", ["block-from-sequence", "shift-autoregressive-first", "clean-causal-autoregressive-first", "full"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_rules_give_the_same_responses(spec_name, temperature):
    """Ending with the stop token saves steps; what counts, and the states it was made in, stay the same."""
    policy = make_policy(SPECS[spec_name], seed=3)
    stops = tuple(range(5, 12))
    prompts, seeds = make_prompts([1 + row for row in range(16)]), list(range(16))
    batches, tokens = [], []
    for rule in ("block", "token"):
        config = DecodingConfig(24, temperature, stop_rule=rule, stop_token_ids=stops)
        with Passes(policy) as passes:
            batches.append(decode(policy, prompts, config, seeds=seeds))
        tokens.append(sum(passes.tokens))
    block, token = batches
    assert block.completions() == token.completions()
    mask = block.completion_mask
    width = min(mask.shape[1], token.steps.shape[1])
    counted = mask[:, :width]
    assert torch.equal(block.steps[:, :width][counted], token.steps[:, :width][counted])
    assert_close(block.logps[:, :width][counted], token.logps[:, :width][counted])
    assert tokens[1] < tokens[0]


def test_one_pass_for_each_step_and_no_other():
    """The pass that commits a block is the first step of the next one; so is that which reads the prompt."""
    spec = SPECS["block-from-sequence"].replace(stop_token_ids=())
    policy = make_policy(spec)
    prompt = make_prompts((16,))
    with Passes(policy) as passes:
        decode(policy, prompt, DecodingConfig(16, tokens_per_step=2), spec)
    # 16 of the prompt and a block of 8, then the block; the next block brings the finished one along.
    assert passes.tokens == [24, 8, 8, 8, 16, 8, 8, 8]
    assert passes.logits == [8, 6, 4, 2, 8, 6, 4, 2]


def test_an_autoregressive_first_token_is_a_step_of_its_own():
    spec = SPECS["shift-autoregressive-first"].replace(stop_token_ids=())
    policy = make_policy(spec)
    with Passes(policy) as passes:
        decode(policy, make_prompts((16,)), DecodingConfig(16, tokens_per_step=7), spec)
    assert passes.tokens == [16, 8, 8, 8]  # the prompt; its block; the clean block; its block
    assert passes.logits == [1, 7, 1, 7]


def test_full_attention_runs_the_canvas_and_a_cache_less():
    spec = SPECS["full"].replace(stop_token_ids=())
    policy = make_policy(spec)
    expected = {
        None: [36, 36, 36, 36],  # 20 of the prompt, 16 of the canvas
        "prefix": [36, 16, 36, 8],
        "dual": [36, 8, 36, 8],
    }
    for cache, tokens in expected.items():
        config = DecodingConfig(16, tokens_per_step=4, approximate_cache=cache)
        with Passes(policy) as passes:
            batch = decode(policy, make_prompts((20,)), config, spec)
        assert passes.tokens == tokens
        assert passes.logits == [8, 4, 8, 4]
        assert batch.cache == (cache or "exact")


def test_a_sub_block_cache_runs_the_part():
    spec = SPECS["shift-autoregressive-first"].replace(stop_token_ids=())
    policy = make_policy(spec)
    config = DecodingConfig(16, sub_block_size=4, approximate_cache="sub_block")
    with Passes(policy) as passes:
        decode(policy, make_prompts((16,)), config, spec)
    # The prompt; parts of four, of which the first has its first token: whole block, then the part and, from the
    # second part on, the position before it, whose logits are those of the part's first.
    assert passes.tokens[:8] == [16, 8, 4, 4, 8, 5, 5, 5]
    # With parts as large as the block nothing is reused that is out of date.
    whole = DecodingConfig(16, sub_block_size=8, approximate_cache="sub_block")
    exact = DecodingConfig(16, sub_block_size=8)
    one, other = (decode(policy, make_prompts(), config, spec) for config in (whole, exact))
    for row in range(len(one)):
        assert_same(one, row, other, row)


def test_the_cost_of_a_batch_follows_the_tokens_produced():
    """Responses that stop early cost what they are long, whatever the others do."""
    spec = SPECS["block-from-sequence"]
    policy = make_policy(spec, seed=3)
    prompts, seeds = make_prompts([8] * 40), list(range(40))
    with Passes(policy) as passes:
        batch = decode(policy, prompts, DecodingConfig(96, 1.0, stop_rule="block"), seeds=seeds)
    blocks = batch.canvas_lengths // spec.block_size
    assert blocks.min() < blocks.max()
    # Each row: 8 of the prompt, then 8 steps of 8 tokens a block, and 8 clean ones for every block that is not its last.
    assert sum(passes.tokens) == int((8 + 64 * blocks + 8 * (blocks - 1)).sum())


def test_a_strategy_of_your_own():
    spec = SPECS["block-from-sequence"].replace(stop_token_ids=())
    policy = make_policy(spec)

    def right_to_left(view):
        columns = torch.arange(view.candidates.shape[1], dtype=torch.float)
        return view.top(columns.expand(view.candidates.shape))

    batch = decode(policy, make_prompts((8,)), DecodingConfig(16, strategy=right_to_left), spec)
    assert batch.steps[0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0] * 2
    assert DecodingConfig(strategy=right_to_left).to_dict()["strategy"].endswith("right_to_left")

    with pytest.raises(ValueError, match="unmasked nothing"):
        decode(policy, make_prompts(), DecodingConfig(16, strategy=lambda view: view.candidates & False), spec)
    with pytest.raises(ValueError, match=r"boolean tensor of the positions' shape, \(6, 8\)"):
        decode(policy, make_prompts(), DecodingConfig(16, strategy=lambda view: view.confidences), spec)


def test_an_error_leaves_the_policy_as_it_was():
    spec = SPECS["block-from-sequence"]
    policy = make_policy(spec)
    head = policy.get_output_embeddings()
    before = policy.config._attn_implementation

    def fail(view):
        assert policy.config._attn_implementation == PLANNED
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        decode(policy, make_prompts(), DecodingConfig(16, strategy=fail), spec)
    assert policy.config._attn_implementation == before
    assert not head._forward_pre_hooks and "forward" not in vars(head)


def test_suppressed_tokens_and_nucleus():
    """Recorded log-probabilities are those of the distribution that was sampled from."""
    spec = SPECS["block-of-one"]
    policy = make_policy(spec, initializer_range=0.15)
    prompt = [7, 8, 9]
    logits = policy(torch.tensor([prompt])).logits[0, -1].detach().double() / 0.7
    logits[MASK] = -torch.inf
    probabilities = logits.softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    banned = order[:2].tolist()

    def draw(**settings):
        config = DecodingConfig(1, 0.7, **settings)
        batch = decode(policy, [prompt] * 3000, config, seeds=list(range(3000)))
        return batch.canvas_ids[:, 0], batch.logps[:, 0].double()

    tokens, logps = draw(suppress_tokens=tuple(banned))
    left = probabilities.clone()
    left[banned] = 0
    assert not set(tokens.tolist()) & set(banned)
    assert_close(logps, (left / left.sum()).log()[tokens])

    tokens, logps = draw(top_p=0.6)
    size = int((ordered.cumsum(0) < 0.6).sum()) + 1  # the smallest set that reaches 0.6
    assert set(tokens.tolist()) == set(order[:size].tolist())
    left = torch.zeros_like(probabilities)
    left[order[:size]] = probabilities[order[:size]]
    assert_close(logps, (left / left.sum()).log()[tokens])


@pytest.mark.parametrize(
    ("settings", "attention", "message"),
    [
        ({"approximate_cache": "dual"}, "block", "full-attention policies"),
        ({"approximate_cache": "sub_block", "sub_block_size": 2}, "full", "block-attention policies"),
        ({"stop_token_ids": (40,)}, "block", "`stop_token_ids` holds 40"),
        ({"suppress_tokens": (99,)}, "block", "`suppress_tokens` holds 99"),
        ({"strategy": "random"}, "block", "needs `seeds`"),
        ({"stop_token_ids": (MASK,)}, "block", "mask token"),
    ],
)
def test_settings_that_mean_nothing_for_a_policy_are_refused(settings, attention, message):
    spec = DiffusionSpec(mask_token_id=MASK, attention=attention, block_size=8, block_origin="response")
    with pytest.raises(ValueError, match=message):
        decode(make_policy(spec), make_prompts(), DecodingConfig(8, **settings))
    with pytest.raises(ValueError, match="batch_size"):
        decode(make_policy(spec), make_prompts(), DecodingConfig(8), batch_size=0)


def test_stop_tokens_can_be_replaced():
    spec = SPECS["block-from-sequence"]
    policy = make_policy(spec, seed=3)
    prompts, seeds = make_prompts([5] * 24), list(range(24))
    batch = decode(policy, prompts, DecodingConfig(20, 1.0, stop_token_ids=()), seeds=seeds)
    assert set(batch.completion_lengths.tolist()) == {20}
    assert any(STOP in ids[:-1] for ids in batch.completions())


def test_lanes_of_all_attention_implementations():
    """A ragged pass equals one pass for each sequence, whichever way attention is computed."""
    spec = SPECS["block-from-sequence"]
    batches = []
    for implementation in ("sdpa", "eager"):
        policy = make_policy(spec)
        policy.set_attn_implementation(implementation)
        batches.append(decode(policy, make_prompts(), DecodingConfig(20), batch_size=4))
        assert policy.config._attn_implementation == implementation
    for row in range(6):
        assert_same(batches[0], row, batches[1], row)


def test_recorded_logps_are_those_of_plain_passes():
    """Each token of each step, from a pass of the whole sequence under an explicit mask, without cache or lanes."""
    spec = SPECS["shift-autoregressive-first"]
    policy = make_policy(spec)
    prompts = make_prompts()
    batch = decode(policy, prompts, DecodingConfig(20, 1.0, tokens_per_step=3), seeds=[3] * 6, batch_size=2)
    for row, prompt in enumerate(prompts):
        length = int(batch.canvas_lengths[row])
        tokens, steps = batch.canvas_ids[row, :length], batch.steps[row, :length]
        positions = torch.arange(len(prompt) + length)
        blocks = positions // spec.block_size
        allowed = (blocks[:, None] >= blocks[None, :])[None, None]
        for column in (steps != NEVER).nonzero().flatten().tolist():
            here = len(prompt) + column
            block = blocks[len(prompt) :]
            later = (steps >= steps[column]) | (steps == NEVER)
            hidden = (block > blocks[here]) | ((block == blocks[here]) & later)
            state = torch.cat([torch.tensor(prompt), tokens.masked_fill(hidden, MASK)])
            with torch.no_grad():
                logits = policy(state[None], attention_mask=allowed).logits[0, here - 1].float()
            logits[MASK] = -torch.inf
            expected = F.log_softmax(logits, -1)[tokens[column]]
            assert_close(batch.logps[row, column], expected)


def _decode_beside_another(rank: int, failing: bool) -> tuple[int, list[int] | str]:
    """Passes and response lengths (or the error) of one of two processes, of which the first has much more to do."""
    spec = SPECS["block-from-sequence"].replace(stop_token_ids=())
    policy = make_policy(spec)

    def strategy(view):
        if failing and rank == 1 and len(counter.tokens) > 2:
            raise KeyError("mine")
        return view.candidates if rank else view.top(view.confidences)

    prompts = make_prompts((3, 8) if rank else (3, 8, 13, 21, 24))
    with Passes(policy) as counter:
        try:
            batch = decode(policy, prompts, DecodingConfig(24, strategy=strategy), spec, batch_size=2, keep_pace=True)
            outcome = batch.completion_lengths.tolist()
        except (PeerFailed, KeyError) as error:
            outcome = type(error).__name__
    return len(counter.tokens), outcome


def _rank(rank: int) -> list:
    distributed.init_process_group("gloo")
    return [_decode_beside_another(rank, failing) for failing in (True, False)]


@pytest.mark.distributed
def test_processes_keep_pace():
    """When one fails, the other does not wait for it; else both run the same number of forward passes."""
    outcomes = run_pair(_rank)
    ((_, peer_failed), (passes, lengths)), ((_, failed), (other_passes, other_lengths)) = outcomes
    assert (peer_failed, failed) == ("PeerFailed", "KeyError")
    assert passes == other_passes > 20 and lengths == [24] * 5 and other_lengths == [24] * 2


@pytest.mark.parametrize("capacity", [None, 16])
@pytest.mark.parametrize("lanes", [(0, 1, 2), (1, 2, 3), (2, 0, 1)])
@pytest.mark.parametrize("ends", [(8, 8, 8), (8, 12, 8), (8, 12, 16)])
@pytest.mark.parametrize("sharing", [1, 3])
def test_attention_in_groups_is_that_of_the_whole_mask(capacity, lanes, ends, sharing):
    """Lanes side by side are looked at where they are, others are gathered: what comes out is the same. Also where several
    query heads share keys."""
    spec = SPECS["block-from-sequence" if capacity else "full"].replace(block_size=4)
    ends = np.array(ends)
    begins = ends - 4 if capacity else np.zeros(3, dtype=np.int64)
    spans = Spans(np.arange(3), np.array(lanes), np.zeros(3, dtype=np.int64), ends - 4, begins, ends, ends)
    number = int(spans.lengths.sum())
    mask = ragged_mask(spans, spec, capacity, 4 * capacity if capacity else number, "cpu")
    together = capacity is None or lanes != (2, 0, 1)
    if set(ends) == {8}:
        (group,) = mask.groups
        assert group.queries.run is not None and (group.keys.run is not None) == together
    query, key, value = (
        torch.randn(1, heads, size, 8, generator=torch.Generator().manual_seed(seed))
        for seed, (heads, size) in enumerate(((2 * sharing, number), (2, mask.num_keys), (2, mask.num_keys)))
    )
    copied = (values.repeat_interleave(sharing, 1) for values in (key, value))
    expected = F.scaled_dot_product_attention(query, *copied, mask.dense(), scale=0.3)
    found = mask.attend(torch.nn.Module(), query, key, value, scaling=0.3)
    assert_close(found, expected.transpose(1, 2))
