"""A run that goes on from a checkpoint is the uninterrupted run: the same draws, losses and final weights, to the bit."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import transformers

from tests.conftest import make_policy
from tests.offline.conftest import collection, start  # noqa: F401
from tests.trainer.conftest import make_dataset, record
from trl_diffusion import load_trajectories
from trl_diffusion.trainer.checkpoints import is_complete, last_complete_checkpoint


# Settings, optimizer steps and checkpoint of a run over 6 prompts, two groups of four at a time.
CASES = {
    "second epoch": ({}, 7, 5),
    "end of an epoch": ({}, 5, 3),
    "between passes and batches": ({"steps_per_generation": 2, "num_iterations": 2}, 9, 6),
    "rollouts across steps": (
        {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "per_device_train_batch_size": 4}, 4, 2,
    ),
    "a short last step": ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 5, 3),
    "without groups in a batch": ({"num_iterations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 4}, 8, 5),
    "pairs": ({"loss_type": "dpo", "num_iterations": 2, "steps_per_generation": 2}, 9, 6),
    "evaluated after it was saved": (
        {"eval_strategy": "epoch", "per_device_train_batch_size": 2, "steps_per_generation": 4}, 14, 12,
    ),
}  # fmt: skip
RUNS = [("online", case) for case in CASES if case != "pairs"] + [
    ("offline", case) for case in ("second epoch", "rollouts across steps", "pairs")
]


@pytest.mark.parametrize(("source", "case"), RUNS)
def test_resume_repeats_the_uninterrupted_run(make_trainer, start, collection, tmp_path, source, case):  # noqa: F811
    changes, steps, checkpoint = CASES[case]
    options = {
        "per_device_train_batch_size": 8, "max_steps": steps, "save_strategy": "steps", "save_steps": checkpoint,
        "output_dir": str(tmp_path), "beta": 0.05, **changes,
    }  # fmt: skip
    if "eval_strategy" in options:
        options["kwargs"] = {"eval_dataset": make_dataset(2)}
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


@pytest.mark.parametrize("logging_steps", [4, 5])
def test_the_log_goes_on_where_it_was(make_trainer, start, tmp_path, logging_steps):  # noqa: F811
    """Figures of the steps before the checkpoint that were not logged yet are part of the next entry; also the table of
    completions, and the rollout that callbacks may draw."""
    options = {
        "max_steps": 6, "num_iterations": 4, "logging_steps": logging_steps, "save_strategy": "steps", "save_steps": 3,
        "log_completions": True, "num_completions_to_print": 1,
    }  # fmt: skip
    whole = make_trainer(str(start), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    part = make_trainer(str(start), output_dir=str(tmp_path / "part"), **options)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))

    def logged(trainer) -> list[dict]:
        clocked = ("time", "throughput/", "memory/", "per_second", "total_flos")
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [{k: v for k, v in entry.items() if not any(part in k for part in clocked)} for entry in history]

    assert logged(whole) == logged(part) and len(logged(whole)) == 1
    name = f"completions_0000{logging_steps}.parquet"
    tables = [pd.read_parquet(tmp_path / run / "completions" / name) for run in ("whole", "part")]
    assert len(tables[0]) == 4
    pd.testing.assert_frame_equal(*tables)
    for expected, found in zip(*(vars(t.last_rollouts).values() for t in (whole, part)), strict=True):
        assert torch.equal(expected, found) if isinstance(expected, torch.Tensor) else expected == found


@pytest.mark.slow
def test_train_loss_is_that_of_this_call(make_trainer, start, tmp_path):  # noqa: F811
    """Losses before the checkpoint are part of the log's next entry, but not of the mean that `train` returns."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    each, whole, part = (make_trainer(str(start), **options, logging_steps=steps) for steps in (1, 3, 3))
    each.train()
    losses = [entry["loss"] for entry in each.state.log_history if "loss" in entry]
    whole.train()
    mean = part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).metrics["train_loss"]
    (entry,) = [entry["loss"] for entry in part.state.log_history if "loss" in entry]
    assert entry == pytest.approx(sum(losses[:3]) / 3, rel=1e-5, abs=1e-6)
    # Older versions of transformers divide by all steps of the run.
    assert any(mean * steps == pytest.approx(losses[2] + losses[3], rel=1e-4, abs=1e-5) for steps in (2, 4))


def test_tied_weights_are_not_missing(make_trainer, char_spec, tokenizer, monkeypatch):
    """A weight that is tied to a loaded one is in the checkpoint under the other's name. One that is really missing is named."""
    said = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", said.append)
    head, norm, embedding = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
    for tied in (True, False):
        policy = make_policy(char_spec, vocab_size=len(tokenizer), tie_word_embeddings=tied)
        trainer = make_trainer(policy)
        whole = policy.state_dict()

        def load(*names, trainer=trainer, policy=policy, whole=whole, **more) -> list[str]:
            said.clear()
            weights = {name: weight for name, weight in whole.items() if name not in names} | more
            trainer._issue_warnings_after_load(policy.load_state_dict(weights, strict=False))
            return list(said)

        message = "There were missing keys in the checkpoint model loaded: {}."
        assert load() == []
        assert load(head) == ([] if tied else [message.format([head])])
        assert load(head, norm) == [message.format([norm] if tied else [norm, head])]
        assert load(head, embedding) == [message.format([embedding, head])]
        assert load(x=whole[norm]) == ["There were unexpected keys in the checkpoint model loaded: ['x']."]


def test_later_checkpoints_do_not_count_once_a_run_goes_back(make_trainer, start, tmp_path):  # noqa: F811
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    make_trainer(str(start), **options).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    again = make_trainer(str(start), **{**options, "max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_run_that_starts_anew_leaves_checkpoints_until_it_has_one(make_trainer, start, tmp_path):  # noqa: F811
    """A command that was given without `resume_from_checkpoint` by mistake, and stopped at once, costs nothing."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    make_trainer(str(start), **options).train()
    stopped = make_trainer(str(start), **options)
    stopped.training_step = None  # the first step fails
    with pytest.raises(TypeError):
        stopped.train()
    assert is_complete(tmp_path / "checkpoint-1") and is_complete(tmp_path / "checkpoint-2")
    make_trainer(str(start), **{**options, "max_steps": 1}).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-2").exists() and not is_complete(tmp_path / "checkpoint-2")
