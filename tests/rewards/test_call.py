"""Reward functions outside of a trainer give what they give inside TRL's: functions of every kind."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification, TrainerState
from trl import GRPOTrainer

from trl_diffusion import tiny_policy_path
from trl_diffusion.rewards.call import RewardCaller, as_stored, is_asynchronous


PROMPTS = ["sudoku 1", "sudoku 12", "sudoku 123"]
COMPLETIONS = ["1", "22", "333"]
COLUMNS = {"puzzle": ["a", "b", "c"]}


def lengths(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def sometimes(completions, puzzle, trainer_state, log_extra, log_metric, **kwargs):
    """Asks for all that TRL gives, and does not always apply."""
    log_extra("seen", puzzle)
    log_metric("steps", trainer_state.global_step)
    return [None, math.nan, 1.0]


async def slowly(completions, completion_ids, **kwargs):
    await asyncio.sleep(0)
    return [float(sum(ids)) for ids in completion_ids]


class Judge:
    async def __call__(self, prompts, completions, **kwargs):
        return [float(len(prompt)) for prompt in prompts]


@pytest.fixture
def model(tmp_path):
    """A reward model on disk, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "judge-model")
    tokenizer.save_pretrained(tmp_path / "judge-model")
    return str(tmp_path / "judge-model")


def test_every_kind_at_once(model):
    caller = RewardCaller([lengths, sometimes, slowly, Judge(), model])
    assert caller.names == ["lengths", "sometimes", "slowly", "Judge", "judge-model"]
    found = caller(PROMPTS, COMPLETIONS, [[1], [2, 3], [4]], COLUMNS)
    assert list(found) == caller.names
    assert found["lengths"] == [1.0, 2.0, 3.0] and found["slowly"] == [1.0, 5.0, 4.0]
    assert found["Judge"] == [8.0, 9.0, 10.0] and found["sometimes"][0] is None

    # A reward model, asked about one response at a time, without padding.
    judge, tokenizer = caller.reward_funcs[-1], caller.tokenizers[-1]
    for prompt, completion, reward in zip(PROMPTS, COMPLETIONS, found["judge-model"], strict=True):
        ids = tokenizer(prompt + completion, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            assert judge(**ids).logits[0, 0].item() == pytest.approx(reward, rel=1e-4, abs=1e-5)


def test_trl_gives_the_same(model):
    """The rewards of TRL's own method, on a trainer that is nothing but what the method looks at."""
    caller = RewardCaller([lengths, model])
    trainer = object.__new__(GRPOTrainer)
    vars(trainer).update(
        accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=True), reward_funcs=caller.reward_funcs,
        reward_processing_classes=caller.tokenizers, reward_func_names=caller.names, environments=None, state=TrainerState(),
        chat_template_kwargs={}, args=SimpleNamespace(report_to=[], device=torch.device("cpu")), is_deepspeed_enabled=False,
        _pending_metrics={}, _logs={},
    )  # fmt: skip
    rows = [{"prompt": prompt, "puzzle": puzzle} for prompt, puzzle in zip(PROMPTS, COLUMNS["puzzle"], strict=True)]
    expected = trainer._calculate_rewards(rows, PROMPTS, COMPLETIONS, [[1], [2, 3], [4]])
    found = caller(PROMPTS, COMPLETIONS, [[1], [2, 3], [4]], COLUMNS)
    torch.testing.assert_close(torch.tensor([found[name] for name in caller.names]).T, expected, rtol=1e-4, atol=1e-5)


def test_what_is_asynchronous():
    assert is_asynchronous(slowly) and is_asynchronous(Judge())
    assert not is_asynchronous(lengths) and not is_asynchronous(len)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **kwargs: [1.0], "'<lambda>' returned 1 rewards for 3 completions"),
        (lambda completions, **kwargs: ["good"] * 3, "'<lambda>' returned 'good', which is no number. Return a list"),
        (lambda completions, **kwargs: [[1.0]] * 3, r"'<lambda>' returned \[1.0\], which is no number"),
        (lambda completions, **kwargs: 1.0, "'<lambda>' returned 1.0 for 3 completions. Return a list with a number"),
    ],
)
def test_what_are_no_rewards(reward, message):
    with pytest.raises(ValueError, match=message):
        RewardCaller(reward)(PROMPTS, COMPLETIONS, [[1], [2], [3]], {})


def test_what_is_stored():
    assert as_stored(None, "f", "row 0") is None and as_stored(math.nan, "f", "row 0") is None
    assert as_stored(True, "f", "row 0") == 1.0 and as_stored(torch.tensor(0.5), "f", "row 0") == 0.5
    for reward in (math.inf, -math.inf, 1e39):
        with pytest.raises(ValueError, match="'f' returned .* for row 7; rewards must be finite"):
            as_stored(reward, "f", "row 7")


def test_names_and_numbers_are_checked():
    with pytest.raises(ValueError, match="No reward function"):
        RewardCaller([])
    with pytest.raises(ValueError, match=r"different names, got \['lengths', 'lengths'\]"):
        RewardCaller([lengths, lengths])
    with pytest.raises(ValueError, match="2 reward functions but 1 tokenizers"):
        RewardCaller([lengths, slowly], tokenizers=[None])


@pytest.mark.parametrize("names", ["math_accuracy", ["math_accuracy"]])
def test_the_name_of_a_function_is_no_model(names):
    with pytest.raises(
        ValueError, match=r"Pass the function itself: from trl_diffusion\.rewards\.math import math_accuracy"
    ):
        RewardCaller(names)
