"""A run that goes on from a checkpoint is the uninterrupted run: the same draws, losses and final weights, to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.offline.conftest import collection, start  # noqa: F401
from tests.trainer.conftest import make_dataset
from trl_diffusion import load_trajectories


# Optimizer steps and checkpoint of a run over 6 prompts (9 stored ones), two groups of four at a time.
CASES = {
    "between rollouts": ({}, 6, 2),
    "second epoch": ({}, 9, 5),
    "end of an epoch": ({}, 9, 3),
    "between passes": ({"num_iterations": 3}, 9, 4),
    "between parts of a rollout": ({"steps_per_generation": 3, "per_device_train_batch_size": 4}, 9, 4),
    "between both": ({"steps_per_generation": 2, "num_iterations": 2}, 10, 6),
    "rollouts across steps": (
        {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "per_device_train_batch_size": 4}, 6, 2,
    ),
    "a short last step": ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 6, 3),
    "without groups in a batch": ({"num_iterations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 4}, 12, 5),
}  # fmt: skip


def record(trainer):
    """Losses, and everything that is drawn: which tokens are scored, with which weights."""
    draws = []
    scoring = trainer._scoring

    def spy(inputs, *args):
        draws.append([inputs["canvas_ids"].clone(), inputs["draw_seeds"].clone()])
        context = scoring(inputs, *args)

        class Spy:
            def __enter__(self):
                layout = context.__enter__()
                draws[-1] += [layout.weights.clone()]
                return layout

            def __exit__(self, *exception):
                return context.__exit__(*exception)

        return Spy()

    trainer._scoring = spy
    return draws


def compare(whole, part, draws, resumed_draws, checkpoint):
    losses = [
        {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        for trainer in (whole, part)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == whole.state.max_steps
    assert 0 < len(resumed_draws) < len(draws)
    for expected, found in zip(draws[-len(resumed_draws) :], resumed_draws, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for (name, expected), found in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("source", ["online", "offline"])
def test_resume_repeats_the_uninterrupted_run(make_trainer, start, collection, tmp_path, source, case):  # noqa: F811
    changes, steps, checkpoint = CASES[case]
    options = {
        "per_device_train_batch_size": 8, "max_steps": steps, "save_strategy": "steps", "save_steps": checkpoint,
        "save_total_limit": None, "output_dir": str(tmp_path), "beta": 0.05, **changes,
    }  # fmt: skip
    dataset = make_dataset(6) if source == "online" else load_trajectories(collection).select(range(6))
    runs = []
    for resume in (None, str(tmp_path / f"checkpoint-{checkpoint}")):
        trainer = make_trainer(
            str(start), dataset=dataset, **options, **({} if source == "online" else {"reward_funcs": None})
        )
        torch.manual_seed(len(runs))  # the state of the process that goes on is another one
        draws = record(trainer)
        trainer.train(resume_from_checkpoint=resume)
        runs.append((trainer, draws))
    (whole, draws), (part, resumed_draws) = runs
    compare(whole, part, draws, resumed_draws, checkpoint)
