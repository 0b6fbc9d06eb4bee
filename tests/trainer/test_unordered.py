"""Stored responses whose order nobody knows are given one, and trained on."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.closeness import assert_close
from tests.conftest import make_policy
from tests.trainer.conftest import make_dataset
from trl_diffusion import load_trajectories
from trl_diffusion.offline.orders import finished_batch, replay_confidence
from trl_diffusion.offline.replay import with_orders
from trl_diffusion.offline.responses import import_responses
from trl_diffusion.trajectories.dataset import check_trajectories, completions_of, from_rows, has_unordered


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer, char_spec) -> str:
    directory = tmp_path_factory.mktemp("start")
    make_policy(char_spec, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def unordered(tmp_path_factory, start, tokenizer, char_spec):
    """Four responses to each of 8 prompts."""
    rows = [
        {"prompt": row["prompt"], "responses": [row["solution"][: 9 + number] for number in range(4)], "rewards": [0, 1, 2, number % 3]}
        for number, row in enumerate(make_dataset(8))
    ]  # fmt: skip
    directory = tmp_path_factory.mktemp("imported") / "run"
    config = AutoConfig.from_pretrained(start)
    return load_trajectories(import_responses(rows, tokenizer, char_spec, config, directory, disable_tqdm=True))


def test_orders(unordered, start, char_spec):
    """The responses stay, and every row is as if its order had been known."""
    assert has_unordered(unordered)
    model = AutoModelForCausalLM.from_pretrained(start)
    random = with_orders(unordered, char_spec, "random", tokens_per_step=2, seed=1)
    replayed = with_orders(
        unordered, char_spec, "confidence", tokens_per_step=2, temperature=0.5, model=model, batch_size=5
    )
    for found in (random, replayed):
        check_trajectories(found, char_spec, model.config.vocab_size)
        assert not has_unordered(found) and with_orders(found, char_spec) is found
        assert found.column_names == unordered.column_names
        for name in ("prompt", "reward_given", "completion_lengths", "row"):
            assert found[name][:] == unordered[name][:]
        assert [completions_of(row) for row in found] == [completions_of(row) for row in unordered]
    assert set(map(repr, random["event_logps"])) == {"None"}
    assert len({tuple(steps) for row in random for steps in row["event_steps"]}) > 8
    row = replayed[3]
    alone = replay_confidence(
        model, finished_batch([row["prompt_ids"]] * 4, completions_of(row), char_spec), char_spec, 2, 0.5
    )
    batch = from_rows([(row, number) for number in range(4)], char_spec)
    assert torch.equal(batch.steps, alone.steps) and json.loads(row["decoding"])["temperature"] == 0.5
    assert_close(batch.logps, alone.logps)


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "dpo", "beta": 0.1, "tokens_per_step": 2}, {"loss_type": "dapo", "decoding_order": "confidence"}],
    ids=["pairs", "groups"],
)  # fmt: skip
def test_training(make_trainer, start, unordered, options):
    trainer = make_trainer(
        start, reward_funcs=None, dataset=unordered, max_completion_length=14, max_steps=2, **options
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_replays_are_computed_in_the_precision_of_training(make_trainer, start, unordered):
    """A ratio to log-probabilities of another precision would not be 1 before the first update."""
    trainer = make_trainer(
        start,
        reward_funcs=None,
        dataset=unordered,
        loss_type="dapo",
        decoding_order="confidence",
        bf16=True,
        use_cpu=True,
    )
    found = trainer.train_dataset["event_logps"][:]
    model = AutoModelForCausalLM.from_pretrained(start).eval()
    options = {"tokens_per_step": 2, "model": model, "batch_size": 4}
    in_float32 = with_orders(unordered, trainer.spec, "confidence", **options)["event_logps"][:]
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = with_orders(unordered, trainer.spec, "confidence", **options)["event_logps"][:]
    assert found == in_bfloat16 != in_float32


def test_what_such_responses_need(make_trainer, start, unordered):
    with pytest.raises(ValueError, match="no log-probabilities were recorded.*or `decoding_order='confidence'`"):
        make_trainer(start, reward_funcs=None, dataset=unordered, loss_type="dapo")
    ordered = with_orders(unordered, make_trainer().spec)
    with pytest.raises(ValueError, match="stored responses whose order is unknown, of which there is none here"):
        make_trainer(
            start, reward_funcs=None, dataset=ordered, loss_type="dpo", beta=0.1, decoding_order="left_to_right"
        )
    scored = {"strategy": "sampled_confidence", "score_selection": True}
    with pytest.raises(ValueError, match="there is no selection to score. Set `score_selection=False`"):
        make_trainer(start, reward_funcs=None, dataset=unordered, loss_type="dpo", beta=0.1, **scored)
