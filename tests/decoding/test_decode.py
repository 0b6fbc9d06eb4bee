"""The denoising loop: what it must never do, and what must not change its result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close, close_to
from tests.conftest import MASK, SPECS, STOP, make_policy, make_prompts
from trl_diffusion.decoding.config import DecodingConfig
from trl_diffusion.decoding.decode import decode
from trl_diffusion.decoding.loop import leftmost_part
from trl_diffusion.decoding.strategies import SCHEDULED, STRATEGIES, StepView, step_quota
from trl_diffusion.policies.spec import DiffusionSpec
from trl_diffusion.trajectories.trajectory import NEVER, TrajectoryBatch, response_blocks


def assert_valid(batch: TrajectoryBatch, spec: DiffusionSpec, config: DecodingConfig) -> None:
    """What holds for every trajectory."""
    width = batch.canvas_ids.shape[1]
    blocks = response_blocks(spec, batch.prompt_lengths, width)
    inside = torch.arange(width) < batch.canvas_lengths[:, None]
    unmasked = batch.steps != NEVER
    if spec.attention == "full":  # what was never reached is in the canvas, as masks
        assert (batch.canvas_ids[inside & ~unmasked] == spec.mask_token_id).all()
        blocks_done = torch.where(unmasked, blocks, -1).max(1).values
        inside = inside & (blocks <= blocks_done[:, None])
    columns = torch.arange(width)
    if config.max_new_tokens < spec.block_size:  # what follows a response that is shorter than a block stays masked
        assert (batch.canvas_ids[inside & (columns >= config.max_new_tokens)] == spec.mask_token_id).all()
        inside = inside & (columns < config.max_new_tokens)
    if config.stop_rule == "token":  # the last block may keep masks, behind a stop token or the limit only
        stops = torch.isin(batch.canvas_ids, torch.tensor(spec.stop_token_ids)) & unmasked
        first = torch.where(stops.any(1), stops.long().argmax(1), width)[:, None].clamp(max=config.max_new_tokens - 1)
        last = torch.where(inside, blocks, -1).max(1, keepdim=True).values
        loose = (columns > first) & (blocks == last)
        assert not (unmasked & ~inside).any() and (batch.canvas_ids[loose & inside & ~unmasked] == MASK).all()
        inside = inside & (~loose | unmasked)
    assert torch.equal(unmasked, inside)  # whole blocks are unmasked, and nothing else
    assert (batch.logps <= 0).all() and (batch.logps[~inside] == 0).all()
    assert (batch.canvas_ids[inside] != spec.mask_token_id).all()
    ends = spec.prompt_tail(batch.prompt_lengths) + batch.canvas_lengths
    assert (ends % spec.block_size == 0).all()  # the canvas ends with a block
    for row in range(len(batch)):
        length, counted = int(inside[row].nonzero().max()) + 1, int(batch.completion_lengths[row])
        for block in blocks[row, :length].unique():
            steps = batch.steps[row, :length][(blocks[row, :length] == block) & unmasked[row, :length]]
            sizes = torch.bincount(steps)
            assert (sizes > 0).all()  # steps are contiguous, each unmasks something
            if config.strategy in SCHEDULED and config.steps_per_block is None:
                assert (sizes <= max(config.tokens_per_step, 1)).all()
        ids = batch.canvas_ids[row, :length].tolist()
        stops = [column for column, token in enumerate(ids[: config.max_new_tokens]) if token in spec.stop_token_ids]
        assert not stops or unmasked[row, : stops[0] + 1].all()
        assert counted == (stops[0] + 1 if stops else min(config.max_new_tokens, length))
        assert counted <= config.max_new_tokens
        if not stops:
            assert length >= config.max_new_tokens


@pytest.mark.slow
@given(
    name=st.sampled_from(sorted(SPECS)),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    max_new_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    tokens_per_step=st.integers(1, 9),
    threshold=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    steps_per_block=st.sampled_from([None, None, 1, 3, 8, 11]),
    schedule=st.sampled_from(["even", "linear"]),
    sub_block_size=st.sampled_from([None, None, 1, 2, 3]),
    stop_rule=st.sampled_from(["block", "token"]),
    entropy_bound=st.sampled_from([0.01, 1.0, 5.0]),
    batch_size=st.sampled_from([None, 1, 2]),
    stops=st.sampled_from([(STOP,), tuple(range(STOP, 15))]),
    block_size=st.sampled_from([None, 1, 3, 16]),
    seed=st.integers(0, 10),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_trajectory_is_valid(
    name, lengths, max_new_tokens, temperature, strategy, tokens_per_step, threshold, steps_per_block, schedule,
    sub_block_size, stop_rule, entropy_bound, batch_size,
    stops, block_size, seed,
):  # fmt: skip
    spec = SPECS[name].replace(stop_token_ids=stops)
    if block_size is not None:
        spec = spec.replace(block_size=block_size)
    if strategy == "entropy_bound":
        steps_per_block = None
    config = DecodingConfig(
        max_new_tokens,
        temperature,
        strategy=strategy,
        tokens_per_step=tokens_per_step if steps_per_block is None else 1,
        threshold=threshold,
        steps_per_block=steps_per_block,
        schedule=schedule,
        sub_block_size=sub_block_size,
        stop_rule=stop_rule,
        entropy_bound=entropy_bound,
    )
    prompts = make_prompts(lengths, seed)
    batch = decode(make_policy(spec), prompts, config, seeds=list(range(len(prompts))), batch_size=batch_size)
    assert_valid(batch, spec, config)
    assert [ids[:n] for ids, n in zip(prompts, lengths, strict=True)] == [
        row[mask == 1].tolist() for row, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neighbours_and_order_do_not_matter(policy, spec, temperature):
    config = DecodingConfig(20, temperature, tokens_per_step=2)
    prompts = make_prompts()
    seeds = [7 + row for row in range(len(prompts))]
    together = decode(policy, prompts, config, seeds=seeds)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = decode(policy, [prompts[i] for i in order], config, seeds=[seeds[i] for i in order])
    for place, row in enumerate(order):
        alone = decode(policy, [prompts[row]], config, seeds=[seeds[row]])
        for other, index in ((alone, 0), (shuffled, place)):
            length = int(together.canvas_lengths[row])
            assert int(other.canvas_lengths[index]) == length
            assert torch.equal(other.canvas_ids[index, :length], together.canvas_ids[row, :length])
            assert torch.equal(other.steps[index, :length], together.steps[row, :length])
            assert_close(other.logps[index, :length], together.logps[row, :length])


def test_sampling_is_reproducible_and_leaves_the_global_random_state_alone(policy):
    config = DecodingConfig(16, 1.0)
    before = torch.random.get_rng_state()
    first = decode(policy, make_prompts(), config, seeds=[1] * 6)
    assert torch.equal(before, torch.random.get_rng_state())
    again = decode(policy, make_prompts(), config, seeds=[1] * 6)
    other = decode(policy, make_prompts(), config, seeds=[2] * 6)
    assert torch.equal(first.canvas_ids, again.canvas_ids)
    assert first.completions() != other.completions()


@pytest.mark.slow
def test_samples_follow_the_policy():
    """With blocks of one token, the first token's frequencies are the softmax of the logits at the prompt's end."""
    spec = SPECS["block-of-one"]
    policy = make_policy(spec, initializer_range=0.15)
    prompt = [7, 8, 9]
    logits = policy(torch.tensor([prompt])).logits[0, -1].detach().double() / 0.8
    logits[MASK] = -torch.inf
    repeats = 20_000
    batch = decode(policy, [prompt] * repeats, DecodingConfig(1, 0.8), seeds=list(range(repeats)))
    frequencies = torch.bincount(batch.canvas_ids[:, 0], minlength=40) / repeats
    expected = logits.softmax(-1)
    assert ((frequencies - expected).abs() < 5 * (expected * (1 - expected) / repeats).sqrt() + 1e-9).all()


def test_top_k_samples_from_what_is_left():
    spec = SPECS["block-of-one"]
    policy = make_policy(spec)
    logits = policy(torch.tensor([[7, 8, 9]])).logits[0, -1].detach()
    logits[MASK] = -torch.inf
    best = logits.topk(3)
    batch = decode(policy, [[7, 8, 9]] * 500, DecodingConfig(1, 1.0, top_k=3), seeds=list(range(500)))
    assert set(batch.canvas_ids[:, 0].tolist()) <= set(best.indices.tolist())
    expected = dict(zip(best.indices.tolist(), best.values.log_softmax(-1).tolist(), strict=True))
    for token, logp in zip(batch.canvas_ids[:, 0].tolist(), batch.logps[:, 0].tolist(), strict=True):
        assert logp == close_to(expected[token])


def make_view(probabilities, candidates, quota, config, uniforms=None) -> StepView:
    """A view of candidates with these distributions, `(R, B, V)`; each proposes its most likely token."""
    log_probs = torch.tensor(probabilities).log()
    candidates = torch.tensor(candidates)
    places = candidates.nonzero(as_tuple=True)
    return StepView(
        candidates=candidates,
        quota=torch.tensor(quota),
        token_logps=log_probs.max(-1).values.masked_fill(~candidates, 0.0),
        best_logps=log_probs.max(-1).values.masked_fill(~candidates, 0.0),
        log_probs=log_probs[places],
        places=places,
        config=config,
        uniforms=uniforms,
    )


def picks(name: str, view: StepView) -> list[list[int]]:
    """Columns that a strategy picks in each row."""
    return [row.nonzero().flatten().tolist() for row in STRATEGIES[name](view)]


def test_strategies():
    """Worked out by hand. Columns of row 0: sure, middling, a tie between two tokens, broad."""
    sure, middling, tie, broad = [0.95, 0.03, 0.02], [0.6, 0.2, 0.2], [0.5, 0.5 - 1e-6, 1e-6], [0.4, 0.3, 0.3]
    # Entropies 0.23, 0.95, 0.69, 1.09; margins 0.92, 0.4, 0, 0.1.
    probabilities = [[broad, middling, tie, sure], [sure, broad, middling, sure]]
    candidates = [[True, True, True, True], [False, True, True, False]]
    config = DecodingConfig(threshold=0.5, entropy_bound=1.0)
    uniforms = torch.tensor([[0.3, 0.9, 0.1, 0.5], [0.9, 0.2, 0.1, 0.9]])

    def view(quota):
        return make_view(probabilities, candidates, quota, config, uniforms)

    assert picks("confidence", view([2, 1])) == [[1, 3], [2]]
    assert picks("entropy", view([2, 1])) == [[2, 3], [2]]
    assert picks("margin", view([3, 2])) == [[0, 1, 3], [1, 2]]
    assert picks("random", view([2, 1])) == [[1, 3], [1]]
    assert picks("left_to_right", view([2, 1])) == [[0, 1], [1]]
    assert picks("threshold", view([1, 1])) == [[1, 3], [2]]  # 0.5 is not above 0.5
    assert picks("threshold", view([3, 2])) == [[1, 2, 3], [1, 2]]  # the schedule's minimum
    assert picks("entropy_bound", view([1, 1])) == [[2, 3], [2]]  # 0.23 + 0.69 < 1 <= 0.23 + 0.69 + 0.95
    config = DecodingConfig(threshold=1.0, entropy_bound=0.01)
    assert picks("entropy_bound", view([1, 1])) == [[3], [2]]  # always one
    assert picks("threshold", view([1, 1])) == [[3], [2]]


def test_ties_go_to_the_left():
    view = make_view([[[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]], [[False, True, True]], [1], DecodingConfig())
    for name in ("confidence", "entropy", "margin", "left_to_right"):
        assert picks(name, view) == [[1]]


def test_leftmost_part():
    masked = np.array([[False, True, True, True], [False, False, True, True], [False] * 4])
    assert leftmost_part(masked, 2).tolist() == [[False, True, False, False], [False, False, True, True], [False] * 4]
    assert (leftmost_part(masked, None) == masked).all()


@pytest.mark.parametrize(
    ("schedule", "total", "expected"),
    [
        ("even", 10, [3, 3, 2, 2]),
        ("even", 3, [1, 1, 1, 0]),
        (
            "linear",
            10,
            [2, 2, 2, 4],
        ),  # times 1, 0.75, 0.5, 0.25, 0.001: floor(10/4), floor(8/3), floor(6/2) - rounding
    ],
)
def test_schedules_unmask_everything(schedule, total, expected):
    config = DecodingConfig(steps_per_block=4, schedule=schedule)
    left, taken = total, []
    for step in range(4):
        quota = step_quota(step, total, left, config)
        taken.append(quota)
        left = left - quota
    assert taken == expected and left == 0


def test_a_sub_block_may_stretch_a_schedule():
    """With sub-blocks of one position a block takes as many steps as it has positions, whatever the schedule says."""
    spec = SPECS["block-from-sequence"]
    config = DecodingConfig(24, 1.0, steps_per_block=3, schedule="linear", sub_block_size=1)
    batch = decode(make_policy(spec), make_prompts((8,)), config, seeds=[0])
    assert batch.steps[0, :8].tolist() == list(range(8))


def test_rows_leave_the_batch_when_they_stop():
    """A row that has stopped costs nothing more: the number of rows that the model sees goes down."""
    spec = SPECS["block-from-sequence"]
    policy = make_policy(spec)
    rows = []
    handle = policy.register_forward_pre_hook(
        lambda m, a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts = make_prompts()
    batch = decode(policy, prompts, DecodingConfig(40, 1.0, tokens_per_step=2), seeds=[100 + r for r in range(6)])
    handle.remove()
    assert any(ids[-1] == STOP for ids in batch.completions())
    assert rows == sorted(rows, reverse=True) and rows[-1] < len(prompts)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[7, 8], []], "Prompt 1 is empty"),
        ([[7, 8], [7, MASK, 8]], r"Prompt 1 contains the mask token \(39\) at position 1"),
        ([[7] * 120], "more than the policy's context of 128"),
        ([], "no prompt"),
        ([[7, 40]], "Prompt 0 holds token 40, but the model's vocabulary has 40 tokens"),
    ],
)
def test_bad_prompts_are_refused(prompts, message):
    spec = SPECS["block-from-sequence"]
    with pytest.raises(ValueError, match=message):
        decode(make_policy(spec), prompts, DecodingConfig(16))


def test_sampling_needs_a_seed_for_each_prompt():
    policy = make_policy(SPECS["block-from-sequence"])
    with pytest.raises(ValueError, match="got 1 for 2 prompts"):
        decode(policy, [[7], [8]], DecodingConfig(8, 1.0), seeds=[3])


@pytest.mark.parametrize(
    "settings_",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"strategy": "best"},
        {"tokens_per_step": 0},
        {"threshold": 1.5},
        {"steps_per_block": 0},
        {"schedule": "cosine"},
        {"sub_block_size": 0},
        {"top_k": 0},
        {"tokens_per_step": 1.5},
        {"temperature": float("nan")},
        {"steps_per_block": 4, "strategy": "entropy_bound"},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"entropy_bound": 0.0},
        {"suppress_tokens": [-1]},
        {"suppress_tokens": 3},
        {"stop_token_ids": ["a"]},
        {"stop_rule": "line"},
        {"approximate_cache": "triple"},
        {"approximate_cache": "sub_block"},
        {"allow_mask_token": True},
    ],
)
def test_bad_settings_are_refused(settings_):
    with pytest.raises(ValueError, match=next(iter(settings_))):
        DecodingConfig(**settings_)


def test_attention_implementations_agree():
    """SDPA and eager run the same mask; one that cannot is refused."""
    spec = SPECS["block-from-sequence"]
    batches = []
    for implementation in ("sdpa", "eager"):
        policy = make_policy(spec)
        policy.set_attn_implementation(implementation)
        batches.append(decode(policy, make_prompts(), DecodingConfig(20)))
    assert torch.equal(batches[0].canvas_ids, batches[1].canvas_ids)
    assert_close(batches[0].logps, batches[1].logps)
    policy.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        decode(policy, make_prompts(), DecodingConfig(20))
