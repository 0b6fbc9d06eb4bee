"""A run that would make no step, or learn nothing, says so: before anything is computed where that can be known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from tests.offline.conftest import collection, run_collect, start  # noqa: F401
from tests.trainer.conftest import codes, make_dataset
from trl_diffusion import DTRPOConfig, load_trajectories
from trl_diffusion.policies.prompts import check_visible


@pytest.fixture
def trajectories(collection):  # noqa: F811
    return load_trajectories(collection)


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        ({"per_device_train_batch_size": 16}, 4),
        ({"gradient_accumulation_steps": 5}, 5),
        ({"steps_per_generation": 6}, 6),
        ({"generation_batch_size": 28}, 7),
    ],
)
def test_fewer_rows_than_a_rollout_takes(make_trainer, options, prompts, tmp_path):
    """As many rows as it takes are enough, and one row less is not."""
    out = tmp_path / "out"
    message = rf"train_dataset has {prompts - 1} rows, but a rollout takes {prompts} prompts \(.*` 4\): no step would be made"
    with pytest.raises(ValueError, match=message):
        make_trainer(dataset=make_dataset(prompts - 1), output_dir=str(out), **options)
    assert not out.exists()
    trainer = make_trainer(dataset=make_dataset(prompts), max_steps=1, **options)
    trainer.train()
    assert trainer.state.global_step == 1


def test_processes_take_their_share(tmp_path, monkeypatch):
    from trl_diffusion.trainer import checks

    monkeypatch.setattr(DTRPOConfig, "world_size", 3)
    args = DTRPOConfig(str(tmp_path), bf16=False, per_device_train_batch_size=8, num_generations=4)
    assert checks.prompts_per_rollout(args) == 6
    with pytest.raises(ValueError, match=r"has 5 rows, but a rollout takes 6 prompts .* 8 x 3 processes x 1 batches"):
        checks.check_number_of_rows(make_dataset(5), args)


def test_rows_that_are_left_after_ties(make_trainer, start, trajectories):  # noqa: F811
    rows = trajectories.to_list()[:4]
    rows[0]["reward_codes"], rows[0]["reward_length"] = [0.5] * 4, [None] * 4
    with pytest.raises(
        ValueError, match=r"train_dataset has 3 rows left \(1 have no pair\), but a rollout takes 4 prompts"
    ):
        make_trainer(str(start), reward_funcs=None, dataset=Dataset.from_list(rows), loss_type="dpo", beta=0.1,
                     per_device_train_batch_size=16)  # fmt: skip


def test_pairs_are_not_replayed_for_nothing(make_trainer, start, monkeypatch):  # noqa: F811
    monkeypatch.setattr("trl_diffusion.trainer.data.from_preferences", None)
    rows = [{"prompt": row["prompt"], "chosen": row["solution"], "rejected": row["puzzle"]} for row in make_dataset(3)]
    with pytest.raises(ValueError, match="train_dataset has 3 rows, but a rollout takes 4 prompts"):
        make_trainer(
            str(start), reward_funcs=None, dataset=Dataset.from_list(rows), decoding_order="confidence", loss_type="dpo",
            beta=0.1, num_generations=2, per_device_train_batch_size=8,
        )  # fmt: skip


def test_a_stream_that_ends_early(make_trainer):
    def stream():
        yield from make_dataset(3)

    trainer = make_trainer(dataset=IterableDataset.from_generator(stream), per_device_train_batch_size=16)
    with pytest.raises(
        ValueError, match="No step was made: the stream of train_dataset ended early, for a rollout takes 4"
    ):
        trainer.train()


# ----------------------------------------------------------------------------------------------------------- rewards


class OnStep(TrainerCallback):
    """Calls a function after each optimizer step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, *args, **kwargs):
        self.function()


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300])
def test_infinite_rewards(make_trainer, value):
    def bad(completions, **kwargs):
        return [value if place == 2 else 0.5 for place, _ in enumerate(completions)]

    trainer = make_trainer(reward_funcs=[codes, bad])
    first = trainer.train_dataset["prompt"]
    with pytest.raises(
        ValueError, match=r"The reward function 'bad' returned -?inf for the answer '.*' to 'sudoku"
    ) as error:
        trainer.train()
    assert any(repr(prompt) in str(error.value) for prompt in first) and trainer.state.global_step == 0


def same(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("reason", "reward", "options"),
    [
        ("all responses to a prompt have the same reward", same, {}),
        ("all responses to a prompt are the same. A higher `temperature`", same, {"temperature": 1e-4}),
        ("every response is empty. Does the policy know prompts of this form?", same, {}),
        ("no reward function applies", lambda completions, **kwargs: [None] * len(completions), {}),
        ("are cut off, and `mask_truncated_completions`", codes, {"mask_truncated_completions": True}),
    ],
    ids=["equal rewards", "equal responses", "empty", "not scored", "cut off"],
)
def test_nothing_learnt(make_trainer, char_spec, caplog, reason, reward, options):
    """Said after the third rollout, once, with the reason; and in the end."""
    trainer = make_trainer(reward_funcs=reward, max_steps=5, **options)
    decode = trainer.decode

    def end_at_once(*given):
        batch = decode(*given)
        batch.canvas_ids[:, 0] = char_spec.stop_token_ids[0]
        return replace(batch, completion_lengths=torch.ones_like(batch.completion_lengths))

    def never_end(*given):
        batch = decode(*given)
        batch.canvas_ids[batch.canvas_ids == char_spec.stop_token_ids[0]] = 7
        return replace(batch, completion_lengths=batch.canvas_lengths)

    if "empty" in reason or "cut off" in reason:
        trainer.decode = end_at_once if "empty" in reason else never_end
    seen = []
    trainer.add_callback(
        OnStep(lambda: seen.append(caplog.text.count("Nothing could be learnt from the last 3 rollouts")))
    )
    trainer.train()
    assert seen == [0, 0, 1, 1, 1] and reason in caplog.text
    assert trainer.learning.summary().startswith("Nothing was learnt from the rewards: ")
    assert caplog.messages[-1].endswith(trainer.learning.summary()) and reason in caplog.messages[-1]


def test_a_run_that_stops_learning(make_trainer, caplog):
    """The rewards become equal after two updates: said in the end, too, from how many rollouts nothing could be learnt."""
    calls = []

    def fades(completions, **kwargs):
        calls.append(1)
        return codes(completions) if len(calls) <= 2 else same(completions)

    trainer = make_trainer(reward_funcs=fades, max_steps=6)
    trainer.train()
    said = "Nothing could be learnt from 4 of 6 rollouts: all responses to a prompt have the same reward."
    assert trainer.learning.summary().startswith(said) and caplog.messages[-1].endswith(trainer.learning.summary())


@pytest.mark.parametrize("loss_type", ["dapo", "dpo"])
def test_something_learnt(make_trainer, start, caplog, loss_type):  # noqa: F811
    trainer = make_trainer(str(start), loss_type=loss_type, beta=0.1, max_steps=1)
    trainer.train()
    assert trainer.learning.summary() is None and trainer.learning.rollouts == 1
    assert "Nothing" not in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1"])
def test_stored_rewards_that_are_none(make_trainer, start, trajectories, value):  # noqa: F811
    rows = copy.deepcopy(trajectories.to_list())
    if value == "1":
        for row in rows:
            row["reward_codes"] = [str(reward) for reward in row["reward_codes"]]
    else:
        rows[2]["reward_codes"][1] = value
    row, place = (0, 0) if value == "1" else (2, 1)
    with pytest.raises(
        ValueError, match=f"Row {row}, column `reward_codes`, response {place}: is .*; a reward is a finite"
    ):
        make_trainer(str(start), reward_funcs=None, dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("loss_type", ["dapo", "dpo"])
@pytest.mark.parametrize("reward", [0.5, None])
def test_stored_rewards_that_are_all_the_same(make_trainer, start, trajectories, loss_type, reward):  # noqa: F811
    rows = trajectories.to_list()
    for row in rows:
        row["reward_codes"], row["reward_length"] = [reward] * 4, [None] * 4
    why = "all responses have the same reward" if reward else "fewer than two responses are scored"
    with pytest.raises(ValueError, match=f"train_dataset has nothing to learn from: 10 groups where {why}"):
        make_trainer(str(start), reward_funcs=None, dataset=Dataset.from_list(rows), loss_type=loss_type, beta=0.1)


def test_collected_rewards(start, tokenizer, tmp_path):  # noqa: F811
    """NaN is stored as null, which is what TRL takes it for; infinity ends the collection before the shard is written."""

    def sometimes(completions, **kwargs):
        return [math.nan if place == 1 else float(place) for place, _ in enumerate(completions)]

    def infinite(completions, **kwargs):
        return [math.inf if place == 5 else 0.0 for place, _ in enumerate(completions)]

    stored = load_trajectories(run_collect(start, tmp_path / "nan", tokenizer, reward_funcs=sometimes))
    assert stored[0]["reward_sometimes"] == [0.0, None, 2.0, 3.0]
    with pytest.raises(ValueError, match="The reward function 'infinite' returned inf for a response to row 1"):
        run_collect(start, tmp_path / "inf", tokenizer, reward_funcs=infinite)
    assert not list((tmp_path / "inf").glob("data/*.parquet"))


def test_collected_columns_that_would_be_taken_for_rewards(start, tokenizer, tmp_path):  # noqa: F811
    prompts = make_dataset(4).add_column("reward_model", ["x"] * 4)
    with pytest.raises(ValueError, match=r"need for themselves: \['reward_model'\]"):
        run_collect(start, tmp_path / "run", tokenizer, dataset=prompts)


# ----------------------------------------------------------------------------------------------------------- prompts

USER = {"role": "user", "content": "sudoku 12"}
KEEPS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
STRIPS = "{% for m in messages %}{{ m['content'] | trim | upper }}{% endfor %}"
DROPS_USER = "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}sudoku"
DROPS_SYSTEM = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
FORGETS = "{% for m in messages %}{{ m['content'].split('=')[-1] }}{% endfor %}"


def test_prompts_of_unknown_tokens(make_trainer):
    dataset = Dataset.from_dict({"prompt": ["sudoku 12", "ЖЖЖ", "sudoku 34", "sudoku 56"]})
    with pytest.raises(ValueError, match=r"train_dataset: Row 1: the tokenizer knows nothing of the prompt"):
        make_trainer(dataset=dataset)
    make_trainer(dataset=Dataset.from_dict({"prompt": ["sudoku Ж"] * 4}))


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            DROPS_USER,
            [USER],
            "the chat template drops the message of 'user', whatever it says; the prompt becomes 'sudoku'",
        ),
        (DROPS_USER, [{"role": "system", "content": "sudoku"}, USER], "drops the message of 'user'"),
        (DROPS_SYSTEM, [{"role": "system", "content": "sudoku"}, USER], "drops the message of 'system'"),
        (DROPS_SYSTEM, [{"role": "human", "content": "sudoku"}, USER], "drops the message of 'human'"),
        (KEEPS, [{"role": "user", "content": "ЖЖ"}], "the tokenizer knows nothing of the prompt"),
    ],
)
def test_chat_templates_that_drop_messages(make_trainer, tokenizer, template, messages, message):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    dataset = Dataset.from_list([{"prompt": messages}] * 4)
    with pytest.raises(ValueError, match=f"train_dataset: Row 0: .*{message}"):
        make_trainer(dataset=dataset, kwargs={"processing_class": chatty})


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (KEEPS, [USER]),
        (STRIPS, [{"role": "user", "content": " sudoku 12\n"}]),
        (FORGETS, [{"role": "assistant", "content": "thought=sudoku"}, USER]),  # thoughts of earlier answers
        (DROPS_SYSTEM, [{"role": "assistant", "content": "sudoku"}, USER]),
    ],
)
def test_chat_templates_that_keep_messages(tokenizer, template, messages):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    ids = chatty.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    check_visible(chatty, [messages], [ids])


def test_a_form_is_tried_once(tokenizer):
    """Every form of conversation is tried, wherever it comes first; what was tried is not tried again."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = DROPS_SYSTEM
    prompts, forms = [[USER]] * 3 + [[{"role": "system", "content": "sudoku"}, USER]], set()
    with pytest.raises(ValueError, match="Row 13: the chat template drops the message of 'system'"):
        check_visible(chatty, prompts, [[1]] * 4, first_row=10, forms=forms)
    assert len(forms) == 2
    check_visible(chatty, prompts, [[1]] * 4, forms=forms)
