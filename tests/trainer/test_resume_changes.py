"""Runs that go on otherwise than they began, after their end, or from a stream."""

from __future__ import annotations

import re

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.offline.conftest import start  # noqa: F401
from tests.trainer.conftest import make_dataset, record
from trl_diffusion.trainer.resume import Progress


CPU = torch.device("cpu")


def follow(trainer):
    """Of each batch that is trained on: how many batches ago its rollout was made, 0 for the first."""
    ages, made = [], []
    generate, step = trainer._generate_and_score_completions, trainer.training_step

    def generating(inputs):
        if trainer.model.training:
            made.append(len(ages))
        return generate(inputs)

    def stepping(*args, **kwargs):
        loss = step(*args, **kwargs)
        ages.append(len(ages) - made[-1] if made else None)
        return loss

    trainer._generate_and_score_completions, trainer.training_step = generating, stepping
    return ages


# What a run of 16 prompts began with, after how many steps it was interrupted, and what it goes on with; and from which of
# the `num_iterations * steps_per_generation` batches of a rollout.
CHANGES = {
    "larger batch inside a rollout": ({"num_iterations": 2}, 3, {"per_device_train_batch_size": 8}, 1),
    "fewer passes between rollouts": ({"num_iterations": 3}, 3, {"num_iterations": 2}, 1),
    "more passes and accumulation": (
        {"num_iterations": 2}, 3, {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "num_iterations": 3}, 0,
    ),
    "more accumulation between rollouts": (
        {"num_iterations": 2}, 2, {"gradient_accumulation_steps": 2, "steps_per_generation": 2}, 0,
    ),
    "more batches of a rollout": ({"num_iterations": 2}, 3, {"steps_per_generation": 4, "num_iterations": 1}, 3),
    "fewer batches of a rollout": ({"steps_per_generation": 4}, 3, {"steps_per_generation": 2}, 1),
    "another order and loss": ({"num_iterations": 2}, 3, {"shuffle_dataset": False, "loss_type": "grpo"}, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_other_batches_begin_with_a_fresh_rollout(make_trainer, start, tmp_path, caplog, case):  # noqa: F811
    """The warning names what has changed, and no batch is trained on that a policy before the checkpoint answered."""
    before, steps, changes, place = CHANGES[case]
    options = {"save_strategy": "steps", "save_steps": steps, "beta": 0.05, **before}
    make_trainer(str(start), max_steps=steps, **options).train()
    trainer = make_trainer(str(start), **{**options, **changes, "max_steps": steps + 4})
    ages = follow(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))

    period = trainer.args.num_iterations * trainer.args.steps_per_generation
    batches = 4 * trainer.args.gradient_accumulation_steps
    expected = list(range(period - place))  # what is left of the rollout that this place is in
    while len(expected) < batches:
        expected += range(period)
    assert ages == expected[:batches] and trainer.state.global_step == steps + 4
    warning = next(record.message for record in caplog.records if "fresh rollout" in record.message)
    for name, value in changes.items():
        if name != "steps_per_generation" or before.get(name, 1) != value:
            assert re.search(rf"{name}=\S+, not {value!r}", warning), warning
    assert "\n" not in warning and "learning_rate" not in warning


@pytest.mark.slow
def test_what_is_shown_and_saved_may_change(make_trainer, start, tmp_path, caplog):  # noqa: F811
    """Such a run is the uninterrupted one."""
    options = {"max_steps": 4, "num_iterations": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(str(start), **options)
    whole.train()
    options |= {"logging_steps": 2, "save_steps": 3, "rollout_batch_size": 2, "log_completions": True}
    part = make_trainer(str(start), **options)
    ages = follow(part)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ages == [None, None] and "fresh rollout" not in caplog.text  # on the rollout of the checkpoint
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), part.model.parameters(), strict=True))


@pytest.mark.slow
def test_another_number_of_processes_and_another_program(make_trainer, start, tmp_path, caplog):  # noqa: F811
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "num_iterations": 2}
    make_trainer(str(start), **options).train()
    checkpoint = tmp_path / "checkpoint-3"
    progress = Progress.load(checkpoint, 0, CPU)
    assert progress.batches == 3 and len(progress.rollout) == 1
    (checkpoint / "checkpoint_complete").unlink()  # or the file below would count as damaged
    progress.settings["number of processes"] = "2"
    progress.save(checkpoint, 0)
    for found in ("number of processes=2, not 1", "holds no rollout"):
        trainer = make_trainer(str(start), **options)
        ages = follow(trainer)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert ages == [0] and trainer.state.global_step == 4
        assert f"{checkpoint} was written with {found}" in caplog.text or f"{checkpoint} {found}" in caplog.text
        Progress.path(checkpoint, 0).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ the end


def test_a_run_that_is_over_makes_no_step(make_trainer, start, tmp_path, caplog):  # noqa: F811
    """Given again and again inside an epoch, it stays where it is; the policy is that of the last checkpoint."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "log_completions": True}
    first = make_trainer(str(start), **options)
    first.train()
    table = (tmp_path / "completions" / "completions_00002.parquet").read_bytes()
    for _ in range(2):
        again = make_trainer(str(start), **options)
        ages = follow(again)
        output = again.train(resume_from_checkpoint=True)
        assert ages == [] and output.global_step == again.state.global_step == 2
        assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert "over after 2 optimizer steps (`max_steps` is 2): nothing is trained" in caplog.text
    assert (tmp_path / "completions" / "completions_00002.parquet").read_bytes() == table
    longer = make_trainer(str(start), **{**options, "max_steps": 3})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


class Counts(TrainerCallback):
    """Where early stopping is, step by step."""

    def __init__(self, stopping):
        self.stopping, self.seen = stopping, []

    def on_evaluate(self, args, state, control, **kwargs):
        self.seen.append(self.stopping.early_stopping_patience_counter)


@pytest.mark.slow
def test_early_stopping_goes_on_counting(make_trainer, start, tmp_path, caplog):  # noqa: F811
    """A reward that never gets better: stopped after the third evaluation, by the run, by one that goes on from the second
    checkpoint, and for good."""
    options = {
        "max_steps": 9, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "eval_rewards/constant/mean", "greater_is_better": True, "load_best_model_at_end": False,
        "per_device_eval_batch_size": 4,
    }  # fmt: skip

    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    def run(resume, patience=2):
        trainer = make_trainer(str(start), reward_funcs=constant, kwargs={"eval_dataset": make_dataset(1)}, **options)
        stopping = EarlyStoppingCallback(early_stopping_patience=patience)
        counts = Counts(stopping)
        trainer.add_callback(stopping)
        trainer.add_callback(counts)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step, counts.seen

    assert run(None) == (3, [0, 1, 2])
    assert run(str(tmp_path / "checkpoint-2")) == (3, [2])
    assert run(True) == (3, [])
    assert "over after 3 optimizer steps (it was stopped early)" in caplog.text
    assert run(True, patience=3) == (4, [3])


# ------------------------------------------------------------------------------------------------------- streams


STREAMS = {
    "first pass": ({}, 4, 2),
    "end of the first pass": ({}, 5, 3),
    "inside a rollout of the second pass": ({"num_iterations": 2}, 10, 7),
    "third pass, accumulated": ({"gradient_accumulation_steps": 3, "steps_per_generation": 1}, 4, 2),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_goes_on_where_it_was(make_trainer, start, tmp_path, case):  # noqa: F811
    """Six prompts, two to a rollout; each pass in an order of its own."""
    changes, steps, checkpoint = STREAMS[case]
    options = {
        "per_device_train_batch_size": 8, "max_steps": steps, "save_strategy": "steps", "save_steps": checkpoint,
        "output_dir": str(tmp_path), **changes,
    }  # fmt: skip
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{checkpoint}")):
        trainer = make_trainer(str(start), dataset=make_dataset(6).to_iterable_dataset(), **options)
        draws = record(trainer)
        torch.manual_seed(7 + len(runs))
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == steps
        runs.append((trainer, draws))
    (whole, draws), (part, resumed) = runs
    assert 0 < len(resumed) < len(draws)
    for expected, found in zip(draws[-len(resumed) :], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), part.model.parameters(), strict=True))


@pytest.mark.slow
def test_a_stream_with_other_batches_goes_on_in_its_pass(make_trainer, start, tmp_path):  # noqa: F811
    """Three rollouts of two prompts, then one prompt at a time: the second pass goes on with its third prompt."""
    asked: list[str] = []

    def asking(prompts, completions, **kwargs):
        asked.extend(dict.fromkeys(prompts))
        return [float(len(text)) for text in completions]

    data = Dataset.from_list([{"prompt": f"sudoku {row}"} for row in range(6)])
    options = {"reward_funcs": asking, "save_strategy": "steps", "save_steps": 4}

    def prompts(size, steps, resume=None):
        asked.clear()
        trainer = make_trainer(
            str(start),
            dataset=data.to_iterable_dataset(),
            per_device_train_batch_size=size,
            max_steps=steps,
            **options,
        )
        trainer.train(resume_from_checkpoint=resume)
        return list(asked)

    whole = prompts(8, 6)
    assert sorted(whole[:6]) == sorted(data["prompt"]) and sorted(whole[6:]) == sorted(data["prompt"])
    assert prompts(4, 8, str(tmp_path / "checkpoint-4")) == whole[8:12]
