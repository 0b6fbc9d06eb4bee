"""Responses that nobody scored, that were cut off, or that say the same are in no pair, and the log says so."""

from __future__ import annotations

import copy
from itertools import cycle, permutations

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version

from tests.offline.conftest import collection, start  # noqa: F401
from tests.trainer.conftest import make_dataset
from trl_diffusion import load_trajectories


PAIRS = {"loss_type": "dpo", "beta": 0.1, "max_steps": 1}


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def rewards(values):
    """A reward function that gives these values in turn."""
    source = cycle(values)
    return lambda completions, **kwargs: [next(source) for _ in completions]


def number_of_pairs(scores, which):
    """Ordered pairs of a group, from the definition; `None` is in no pair."""
    ordered = [(a, b) for a, b in permutations([score for score in scores if score is not None], 2) if a > b]
    return min(len(ordered), 1) if which == "best_worst" else len(ordered)


@pytest.mark.parametrize("which", ["all", "best_worst"])
@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_unscored_responses(make_trainer, start, which, nothing):  # noqa: F811
    scores = [[None, 1.0, 0.0, None], [2.0, None, None, None], [0.5, 0.5, None, 0.5]]
    values = [nothing if score is None else score for group in scores for score in group]
    trainer = make_trainer(
        str(start), pair_selection=which, reward_funcs=rewards(values), per_device_train_batch_size=12, **PAIRS
    )
    trainer.train()
    logs = logs_of(trainer)[0]
    assert logs["pairs/count"] == sum(number_of_pairs(group, which) for group in scores) == 1
    assert logs["pairs/unscored_responses"] == 6 and logs["pairs/truncated_responses"] == 0
    assert logs["pairs/tied_groups"] == 1  # the second group has nothing to compare


def test_a_response_that_one_function_scores_is_scored(make_trainer, start):  # noqa: F811
    """As TRL does, the others are left out of the sum."""
    functions = [rewards([1.0, None, 0.0, None]), rewards([None, 3.0, None, None])]
    trainer = make_trainer(str(start), pair_selection="all", reward_funcs=functions, **PAIRS)
    trainer.train()
    assert logs_of(trainer)[0]["pairs/count"] == number_of_pairs([1.0, 3.0, 0.0, None], "all") == 3


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="TRL knew the tokenizer's end token only")
@pytest.mark.parametrize("which", ["all", "best_worst"])
def test_truncated_responses(make_trainer, start, which):  # noqa: F811
    scores, stops = [float(value) for value in range(32)], range(43, 53)
    trainer = make_trainer(
        str(start), pair_selection=which, reward_funcs=rewards(scores), mask_truncated_completions=True,
        per_device_train_batch_size=32, tokens_per_step=1, max_completion_length=6,
        diffusion_spec={"stop_token_ids": list(stops)}, **PAIRS,
    )  # fmt: skip
    ended = []
    decode = trainer.decode

    def spy(*args, **kwargs):
        batch = decode(*args, **kwargs)
        last = [ids[-1] for ids in batch.completions()]
        # TRL takes padding for an end, too.
        ended.extend(token in {*stops, trainer.processing_class.pad_token_id} for token in last)
        return batch

    trainer.decode = spy
    trainer.train()
    assert any(ended) and not all(ended)
    known = [score if end else None for score, end in zip(scores, ended, strict=True)]
    numbers = [number_of_pairs(known[at : at + 4], which) for at in range(0, 32, 4)]
    assert any(numbers) and not all(numbers)  # of some groups, one response or none has ended
    logs = logs_of(trainer)[0]
    assert logs["pairs/truncated_responses"] == ended.count(False) and logs["pairs/unscored_responses"] == 0
    assert logs["pairs/count"] + logs["pairs/identical"] == sum(numbers)


@pytest.mark.parametrize("which", ["all", "best_worst"])
def test_fresh_responses_that_say_the_same(make_trainer, start, which, caplog):  # noqa: F811
    """The rewards differ, but there is nothing that could become likelier than itself: what differs are the draws."""
    trainer = make_trainer(
        str(start), pair_selection=which, reward_funcs=rewards([0.0, 1.0, 2.0, 3.0]), learning_rate=0.0, **PAIRS
    )
    decode = trainer.decode
    trainer.decode = lambda *args: decode(*args).select(torch.zeros(4, dtype=torch.long))
    trainer.train()
    logs = logs_of(trainer)[0]
    assert logs["pairs/count"] == 0 and logs["grad_norm"] == 0
    assert logs["pairs/identical"] == number_of_pairs([0, 1, 2, 3], which)
    assert "Nothing was learnt from the rewards" in caplog.text


@pytest.fixture
def trajectories(collection):  # noqa: F811
    return load_trajectories(collection)


# Columns with an entry for each response.
OF_RESPONSES = (
    "canvas_lengths",
    "completion_lengths",
    "event_steps",
    "event_positions",
    "event_tokens",
    "event_logps",
)


def repeat_first(row) -> None:
    """The first response of a row becomes all of them, each with a reward of its own."""
    for name in OF_RESPONSES:
        row[name] = [copy.deepcopy(row[name][0]) for _ in row[name]]
    row["reward_codes"], row["reward_length"] = [1.0, 2.0, 3.0, 4.0], [None] * 4


def test_stored_groups_without_a_pair(make_trainer, start, trajectories, caplog):  # noqa: F811
    rows = trajectories.to_list()
    repeat_first(rows[0])
    rows[1]["reward_codes"] = rows[1]["reward_length"] = [None, None, 1.0, None]
    rows[2]["reward_codes"], rows[2]["reward_length"] = [0.5] * 4, [None] * 4
    trainer = make_trainer(str(start), reward_funcs=None, dataset=Dataset.from_list(rows), **PAIRS)
    assert trainer.train_dataset["row"][:] == list(range(3, 10))
    assert "3 of 10 groups were dropped, because they have no pair" in caplog.text
    for reason in (
        "1 groups where the better and the worse response have the same tokens",
        "1 groups where fewer than two responses are scored",
        "1 groups where all responses have the same reward",
    ):
        assert reason in caplog.text
    with pytest.raises(
        ValueError, match="train_dataset has nothing to learn from: 1 groups where the better and the worse"
    ):
        make_trainer(str(start), reward_funcs=None, dataset=Dataset.from_list(rows[:1]), **PAIRS)


def test_a_group_of_more_responses_than_are_taken(make_trainer, start, trajectories):  # noqa: F811
    """Its best and worst response are the same tokens, but other responses may be taken in another epoch."""
    rows = trajectories.to_list()[:1]
    repeat_first(rows[0])
    other = trajectories[1]
    for name in OF_RESPONSES:
        rows[0][name][1] = other[name][1]
    options = {**PAIRS, "reward_funcs": None, "dataset": Dataset.from_list(rows)}
    make_trainer(str(start), num_generations=2, per_device_train_batch_size=2, **options)
    with pytest.raises(ValueError, match="nothing to learn from"):
        make_trainer(str(start), **options)


def test_ties_are_those_of_the_aggregated_rewards(make_trainer, start, trajectories):  # noqa: F811
    """Twice 1 and once 2 are the same sum; normalised in their group before, they are not."""
    rows = trajectories.to_list()[:1]
    rows[0]["reward_codes"], rows[0]["reward_length"] = [2.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 1.0]
    options = {**PAIRS, "reward_funcs": None, "dataset": Dataset.from_list(rows), "reward_weights": [1.0, 2.0]}
    with pytest.raises(ValueError, match="all responses have the same reward"):
        make_trainer(str(start), **options)
    trainer = make_trainer(
        str(start), multi_objective_aggregation="normalize_then_sum", pair_selection="all", **options
    )
    trainer.train()
    assert logs_of(trainer)[0]["pairs/count"] == 4
    with pytest.raises(ValueError, match="`reward_weights` holds 1 weights, but train_dataset has the rewards"):
        make_trainer(str(start), **{**options, "reward_weights": [1.0]})


def test_preferences_that_say_the_same(make_trainer, start, caplog):  # noqa: F811
    """The same text, and texts that are the same up to the token that ends them."""
    rows = [{"prompt": row["prompt"], "chosen": row["solution"], "rejected": row["puzzle"]} for row in make_dataset(4)]
    end = make_trainer(str(start), reward_funcs=None, dataset=Dataset.from_list(rows), num_generations=2,
                       max_completion_length=20, **PAIRS).processing_class.eos_token  # fmt: skip
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["rejected"] = rows[2]["chosen"] + end + "12"
    options = {**PAIRS, "reward_funcs": None, "num_generations": 2, "max_completion_length": 20}
    trainer = make_trainer(str(start), dataset=Dataset.from_list(rows), **options)
    assert trainer.train_dataset["row"][:] == [0, 3]
    assert (
        "2 of 4 groups were dropped, because they have no pair: 2 groups where the better and the worse" in caplog.text
    )
    trainer.train()
    assert logs_of(trainer)[0]["pairs/count"] == 2
    with pytest.raises(ValueError, match="train_dataset has nothing to learn from: 2 groups"):
        make_trainer(str(start), dataset=Dataset.from_list(rows[1:3]), **options)


def test_preferences_that_say_the_same_in_an_evaluation(make_trainer, start):  # noqa: F811
    rows = [{"prompt": row["prompt"], "chosen": row["solution"], "rejected": row["puzzle"]} for row in make_dataset(4)]
    same = [{**row, "rejected": row["chosen"]} for row in rows[:2]]
    trainer = make_trainer(
        str(start), reward_funcs=None, dataset=Dataset.from_list(rows), num_generations=2, max_completion_length=20,
        kwargs={"eval_dataset": Dataset.from_list(same)}, per_device_eval_batch_size=4, **PAIRS,
    )  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_pairs/count"] == 0 and found["eval_pairs/identical"] == 2


def test_columns_that_would_be_taken_for_stored_rewards(make_trainer, start):  # noqa: F811
    rows = [{"prompt": "a", "chosen": "1", "rejected": "2", "reward_model": "x", "row": 3}]
    with pytest.raises(ValueError, match=r"columns that trajectories need for themselves: \['reward_model', 'row'\]"):
        make_trainer(str(start), reward_funcs=None, dataset=Dataset.from_list(rows), num_generations=2, **PAIRS)
