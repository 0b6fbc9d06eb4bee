"""A run that goes on from a checkpoint is the uninterrupted run: the same draws, losses and final weights, to the bit."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tests.offline.conftest import collection, start  # noqa: F401
from tests.trainer.conftest import make_dataset
from trl_diffusion import load_trajectories
from trl_diffusion.trainer.checkpoints import last_complete_checkpoint
from trl_diffusion.trainer.resume import Progress


# Settings, optimizer steps and checkpoint of a run over 6 prompts, two groups of four at a time.
CASES = {
    "between rollouts": ({}, 4, 2),
    "second epoch": ({}, 7, 5),
    "end of an epoch": ({}, 5, 3),
    "between passes": ({"num_iterations": 3}, 8, 4),
    "between both": ({"steps_per_generation": 2, "num_iterations": 2}, 9, 6),
    "rollouts across steps": (
        {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "per_device_train_batch_size": 4}, 4, 2,
    ),
    "a short last step": ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 5, 3),
    "without groups in a batch": ({"num_iterations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 4}, 8, 5),
    "pairs": ({"loss_type": "dpo", "num_iterations": 2, "steps_per_generation": 2}, 9, 6),
}  # fmt: skip
RUNS = [("online", case) for case in CASES] + [
    ("offline", case) for case in ("second epoch", "between both", "rollouts across steps", "pairs")
]


def record(trainer):
    """Everything that is drawn: responses, and how each of their tokens is weighed."""
    draws = []
    scoring = trainer._scoring

    @contextmanager
    def spy(inputs, *args):
        with scoring(inputs, *args) as layout:
            draws.append((inputs["canvas_ids"].clone(), inputs["draw_seeds"].clone(), layout.weights.clone()))
            yield layout

    trainer._scoring = spy
    return draws


@pytest.mark.parametrize(("source", "case"), RUNS)
def test_resume_repeats_the_uninterrupted_run(make_trainer, start, collection, tmp_path, source, case):  # noqa: F811
    changes, steps, checkpoint = CASES[case]
    options = {
        "per_device_train_batch_size": 8, "max_steps": steps, "save_strategy": "steps", "save_steps": checkpoint,
        "output_dir": str(tmp_path), "beta": 0.05, **changes,
    }  # fmt: skip
    if source == "online":
        options["dataset"] = make_dataset(6)
    else:
        options.update(dataset=load_trajectories(collection).select(range(6)), reward_funcs=None)
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{checkpoint}")):
        trainer = make_trainer(str(start), **options)
        draws = record(trainer)
        torch.manual_seed(7 + len(runs))  # another process has another random state
        trainer.train(resume_from_checkpoint=resume)
        runs.append((trainer, draws))
    (whole, draws), (part, resumed_draws) = runs
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, part)]
    assert losses[0] == losses[1] and len(losses[0]) == steps
    assert 0 < len(resumed_draws) < len(draws)
    for expected, found in zip(draws[-len(resumed_draws) :], resumed_draws, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for (name, expected), found in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.slow
def test_a_checkpoint_without_a_rollout(make_trainer, start, tmp_path, caplog):  # noqa: F811
    """One of another program, or of another number of processes, still serves; a damaged file is named."""
    options = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "num_iterations": 2,
        "output_dir": str(tmp_path),
    }
    make_trainer(str(start), **options).train()
    checkpoint = tmp_path / "checkpoint-3"
    progress = Progress.load(checkpoint, 0, torch.device("cpu", 0))
    assert progress.batches == 3 and len(progress.rollout) == 1
    for change in (
        lambda: replace(progress, num_processes=2).save(checkpoint, 0),
        lambda: Progress.path(checkpoint, 0).unlink(),
    ):
        change()
        trainer = make_trainer(str(start), **options)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 4 and trainer._step == 4
    assert "was written by 2 processes" in caplog.text and "holds no rollout" in caplog.text
    Progress.path(checkpoint, 0).write_bytes(b"half a fi")
    with pytest.raises(ValueError, match="rollout_0.pt cannot be read"):
        make_trainer(str(start), **options).train(resume_from_checkpoint=str(checkpoint))


def test_later_checkpoints_do_not_count_once_a_run_goes_back(make_trainer, start, tmp_path):  # noqa: F811
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    make_trainer(str(start), **options).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    again = make_trainer(str(start), **{**options, "max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
