"""Columns that vanish before they are looked at: with `remove_unused_columns`, or behind a format of the dataset."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from tests.offline.conftest import codes, collection, length, start  # noqa: F401
from tests.trainer.conftest import make_dataset
from trl_diffusion import load_trajectories


@pytest.fixture
def trajectories(collection):  # noqa: F811
    return load_trajectories(collection)


def trained(make_trainer, start, dataset, **options):  # noqa: F811
    trainer = make_trainer(str(start), dataset=dataset, max_steps=1, **options)
    trainer.decode = None  # nothing is to be generated
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("reward_funcs", [None, [codes, length]])
def test_stored_responses_are_read(make_trainer, start, trajectories, reward_funcs):  # noqa: F811
    expected, found = (
        trained(make_trainer, start, trajectories, reward_funcs=reward_funcs, remove_unused_columns=remove)
        for remove in (False, True)
    )
    assert torch.equal(expected, found)


def test_stored_responses_are_read_in_an_evaluation(make_trainer, start, trajectories):  # noqa: F811
    trainer = make_trainer(
        str(start), reward_funcs=None, dataset=trajectories, kwargs={"eval_dataset": trajectories.select([0, 1])},
        per_device_eval_batch_size=4, remove_unused_columns=True,
    )  # fmt: skip
    trainer.decode = None
    given = [value for row in trajectories.select([0, 1])["reward_codes"] for value in row]
    assert trainer.evaluate()["eval_rewards/codes/mean"] == pytest.approx(sum(given) / len(given), rel=1e-5)


@pytest.mark.parametrize("hide", [lambda d: d.with_format(columns=["prompt"]), lambda d: d.with_format("numpy")])
def test_a_format_hides_nothing(make_trainer, start, trajectories, hide):  # noqa: F811
    expected = trained(make_trainer, start, trajectories, reward_funcs=None)
    assert torch.equal(trained(make_trainer, start, hide(trajectories), reward_funcs=None), expected)


def test_a_reward_function_that_asks_for_a_removed_column(make_trainer):
    def share(completions, solution, **kwargs):
        return [0.0 for _ in completions]

    def optional(completions, puzzle=None, **kwargs):
        return [0.0 for _ in completions]

    message = r"removes the columns \['solution'\] of train_dataset, which the reward function 'share' asks for"
    with pytest.raises(ValueError, match=message):
        make_trainer(reward_funcs=[codes, share], remove_unused_columns=True)
    with pytest.raises(
        ValueError, match=r"\['puzzle'\] of train_dataset, which the reward function 'optional' asks for"
    ):
        make_trainer(reward_funcs=optional, remove_unused_columns=True)


def test_removed_columns_are_named(make_trainer, caplog):
    """A reward function may look for a column in `**kwargs`: that cannot be known."""
    seen = {}

    def watch(completions, **kwargs):
        seen.update(kwargs)
        return codes(completions)

    trainer = make_trainer(reward_funcs=watch, remove_unused_columns=True, max_steps=1)
    assert "`remove_unused_columns=True` removes the columns ['puzzle', 'solution']" in caplog.text
    trainer.train()
    assert "puzzle" not in seen and "prompts" in seen
    caplog.clear()
    make_trainer(remove_unused_columns=True, dataset=Dataset.from_dict({"prompt": make_dataset(4)["prompt"][:]}))
    assert "removes" not in caplog.text
