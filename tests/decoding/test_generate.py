"""Text in, text out, and the canvas while it is denoised."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import SPECS, make_policy, make_prompts
from trl_diffusion import DecodingConfig, decode, generate, get_spec, tiny_policy_path


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(tiny_policy_path())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_policy_path())


PROMPTS = ["countdown 1,2,3=6 ", "countdown 4,5,9="]


def test_texts_and_trajectories(policy, tokenizer):
    policy.train()
    answers = generate(policy, tokenizer, PROMPTS, max_new_tokens=16, tokens_per_step=2)
    assert policy.training  # as it was
    batch = decode(
        policy, tokenizer(PROMPTS)["input_ids"], DecodingConfig(16, tokens_per_step=2), get_spec(policy.config)
    )
    assert torch.equal(answers.trajectories.canvas_ids, batch.canvas_ids)
    assert answers.texts == tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
    alone = generate(policy, tokenizer, PROMPTS[0], DecodingConfig(16, tokens_per_step=2))
    assert alone.texts == answers.texts[:1]


def test_seeds(policy, tokenizer):
    first, again, other = (
        generate(policy, tokenizer, PROMPTS * 8, temperature=1.5, max_new_tokens=16, seed=seed, batch_size=3).texts
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first[::2])) > 1  # each prompt has a stream of its own


def test_bad_calls(policy, tokenizer):
    with pytest.raises(ValueError, match="not both"):
        generate(policy, tokenizer, PROMPTS, DecodingConfig(), temperature=1.0)
    with pytest.raises(ValueError, match="no prompt"):
        generate(policy, tokenizer, [])
    with pytest.raises(TypeError, match="max_tokens"):
        generate(policy, tokenizer, PROMPTS, max_tokens=3)
    with pytest.raises(TypeError, match="`model` must be a model, got 'outputs/policy' .* Load it first"):
        generate("outputs/policy", tokenizer, PROMPTS)
    with pytest.raises(TypeError, match="`model` must be a model, got "):
        generate(tokenizer, policy, PROMPTS)
    with pytest.raises(TypeError, match="`tokenizer` must be a tokenizer, got .*'countdown"):
        generate(policy, PROMPTS, tokenizer)


def test_streaming(policy, tokenizer, capsys):
    """The last frame holds the whole answer, the first one mostly masks."""
    frames = []
    answers = generate(
        policy,
        tokenizer,
        PROMPTS[0],
        max_new_tokens=8,
        streamer=lambda loop: frames.append([masked for _, masked in loop.canvas(0)]),
    )
    counts = [sum(frame) for frame in frames[: len(frames[0])]]
    assert counts == sorted(counts, reverse=True) and frames[-1].count(True) == 0

    generate(policy, tokenizer, PROMPTS[0], max_new_tokens=8, streamer=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(frames) and lines[0].count("░") > lines[-1].count("░") == 0
    assert answers.texts[0] in lines[-1] and "\x1b" not in "".join(lines)
    assert lines[-1].startswith(f"step {len(frames)} of {len(frames)}") and lines[0].startswith("step 1 of at most")


MOST = [  # policy, settings, and whether a response may take fewer steps
    ("shift-autoregressive-first", dict(tokens_per_step=3, sub_block_size=2), False),
    ("block-from-sequence", dict(steps_per_block=3), False),
    ("full", dict(steps_per_block=5, schedule="linear", strategy="random"), False),
    ("full", dict(strategy="threshold", threshold=0.2), True),
    ("block-from-response", dict(strategy="entropy_bound", entropy_bound=20.0, tokens_per_step=4), True),
    ("block-from-response", dict(stop_token_ids=tuple(range(6, 20))), True),
]


def test_most_steps_left():
    """As many as are taken, if nothing ends a response early and no strategy unmasks more than the schedule says."""
    for name, settings, fewer in MOST:
        taken, told = Counter(), defaultdict(list)

        def watch(loop, taken=taken, told=told):
            for lane in loop.active_lanes():
                taken[lane.row] += 1
                told[lane.row].append(taken[lane.row] + loop.most_steps_left(lane))

        config = DecodingConfig(12, 1.0, **{"stop_token_ids": (), "stop_rule": "block", **settings})
        decode(make_policy(SPECS[name]), make_prompts((3, 5)), config, seeds=[0, 1], on_step=watch)
        for row, most in told.items():
            assert most == sorted(most, reverse=True) and most[-1] == taken[row], name
        assert any(most[0] > taken[row] for row, most in told.items()) == fewer, name
