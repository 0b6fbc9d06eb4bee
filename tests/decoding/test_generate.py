"""Text in, text out, and the canvas while it is denoised."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_diffusion import DecodingConfig, TerminalStreamer, decode, generate, get_spec, tiny_policy_path


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


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_streaming(policy, tokenizer, capsys):
    """The last frame holds the whole answer, the first one mostly masks; a terminal is drawn over."""
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

    terminal = Terminal()
    generate(policy, tokenizer, PROMPTS, max_new_tokens=8, streamer=TerminalStreamer(tokenizer, terminal))
    assert "\x1b[2F\x1b[J" in terminal.getvalue()
