"""Callbacks show the run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from transformers import ProgressCallback
from trl import LogCompletionsCallback, WeaveCallback

from tests.trainer.conftest import make_dataset
from trl_diffusion.trainer.callbacks import LossProgressCallback, RewardProgressCallback, TrajectoryCallback
from trl_diffusion.trajectories.trajectory import TrajectoryBatch


class NotebookBar(ProgressCallback):
    """A bar of another kind."""


def bars(trainer) -> list[type]:
    return [type(one) for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback)]


def test_the_bar_shows_the_rewards(make_trainer, capsys):
    """In Python as on the command line: rewards on the bar, an evaluation as a line above it, and no table of all metrics."""
    assert bars(make_trainer(disable_tqdm=True)) == []
    trainer = make_trainer(
        disable_tqdm=False, max_steps=2, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4,
        kwargs={"eval_dataset": make_dataset(1), "callbacks": [NotebookBar()]},
    )  # fmt: skip
    assert sorted(kind.__name__ for kind in bars(trainer)) == ["NotebookBar", "RewardProgressCallback"]
    trainer.remove_callback(NotebookBar)
    trainer.train()
    out, err = capsys.readouterr()
    logs = [entry for entry in trainer.state.log_history if "rewards/codes/mean" in entry]
    assert ["2/2 [" in line for line in err.split("\r") if f"codes={logs[-1]['rewards/codes/mean']:.3f}" in line][-1]
    (measured,) = [entry for entry in trainer.state.log_history if "eval_rewards/codes/mean" in entry]
    line = next(line for line in out.splitlines() if "Evaluation" in line)
    assert line.endswith(
        f"Evaluation after 2 updates: loss {measured['eval_loss']:.4g}, reward {measured['eval_reward']:.4g}, "
        f"codes {measured['eval_rewards/codes/mean']:.4g}"
    )
    assert "grad_norm" not in out + err and "throughput" not in out + err


def test_the_bar_shows_the_order_of_pairs():
    """With the pairwise loss the bar has the share of pairs in the right order; what was not measured is left out."""
    shown, written = [], []
    callback = RewardProgressCallback()
    callback.training_bar = SimpleNamespace(set_postfix=shown.append, write=written.append)
    logs = {
        "loss": 0.5,
        "rewards/accuracies": 0.75,
        "rewards/chosen": -1.0,
        "rewards/f/mean": None,
        "rewards/f/std": 0.1,
    }
    main, other = (SimpleNamespace(is_world_process_zero=first, global_step=3) for first in (True, False))
    callback.on_log(None, main, None, logs=logs)
    callback.on_log(None, other, None, logs=logs)
    callback.on_log(None, main, None, logs={"train_runtime": 3.0})
    callback.on_log(
        None, main, None, logs={"eval_sudoku_solved": 0.5, "eval_runtime": 3.0, "eval_completions/mean_length": 9.0}
    )
    assert shown == [{"accuracies": "0.750"}] and written == ["Evaluation after 3 updates: sudoku_solved 0.5"]


def test_the_bar_of_supervised_fine_tuning_shows_the_loss():
    shown, written = [], []
    callback = LossProgressCallback()
    callback.training_bar = SimpleNamespace(set_postfix=shown.append, write=written.append)
    main = SimpleNamespace(is_world_process_zero=True, global_step=3)
    for logs in ({"loss": 0.5, "grad_norm": 1.0}, {"train_runtime": 3.0, "train_loss": 0.4}, {"eval_loss": 0.25}):
        callback.on_log(None, main, None, logs=logs)
    assert shown == [{"loss": "0.500"}] and written == ["Evaluation after 3 updates: loss 0.25"]


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_pictures_at_the_right_steps(make_trainer, tmp_path):
    """Of training every few updates, and of each evaluation, under its name. The trackers get the same ones."""
    sent: list[tuple] = []
    trainer = make_trainer(
        max_steps=2, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4,
        kwargs={"eval_dataset": {"low": make_dataset(1)}},
    )  # fmt: skip
    trainer.trackers = SimpleNamespace(start=lambda: None, send_pictures=lambda *found: sent.append(found))
    assert trainer.last_rollouts is None
    trainer.add_callback(TrajectoryCallback(trainer, every=2))
    trainer.add_callback(TrajectoryCallback(trainer, every=1, directory=tmp_path / "all", rows=2, max_positions=3))
    trainer.train()
    assert isinstance(trainer.last_rollouts, TrajectoryBatch) and len(trainer.last_rollouts) == 4
    assert {path.name for path in (tmp_path / "trajectories").iterdir()} == {
        "step_000002.png",
        "eval_low_000002.png",
    }
    steps = [f"{name}{row}.png" for name in ("step_000001", "step_000002", "eval_low_000002") for row in ("", "_1")]
    assert {path.name for path in (tmp_path / "all").iterdir()} == {*steps}
    assert [(name, [path.name for path in paths]) for name, paths in sent if len(paths) == 2] == [
        ("trajectory", steps[:2]), ("trajectory", steps[2:4]), ("eval_low/trajectory", steps[4:]),
    ]  # fmt: skip
    sent.clear()
    trainer.state.is_world_process_zero = False
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrajectoryCallback):
            callback.on_step_end(trainer.args, trainer.state, trainer.control)
            callback.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert sent == []
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.glob("*/*.png"))
    small, large = tmp_path / "all" / "step_000002.png", tmp_path / "trajectories" / "step_000002.png"
    width = [int.from_bytes(path.read_bytes()[16:20], "big") for path in (small, large)]
    assert width[0] < width[1]


def test_bad_settings_are_refused(make_trainer, monkeypatch):
    trainer = make_trainer()
    for options in ({"every": 0}, {"every": 1, "rows": 0}, {"every": 1, "max_positions": 0}):
        with pytest.raises(ValueError, match="must be a whole number of at least 1, got 0"):
            TrajectoryCallback(trainer, **options)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="trl-diffusion\\[viz\\]"):
        TrajectoryCallback(trainer, every=1)


class Weave(WeaveCallback):
    """One of a user's own."""


@pytest.mark.parametrize("kind", [LogCompletionsCallback, Weave])
def test_callbacks_that_generate_from_left_to_right_are_refused(make_trainer, kind):
    trainer = make_trainer(kwargs={"eval_dataset": make_dataset(4)})
    callback = kind(trainer)
    message = (
        f"^{kind.__name__} calls the model's own `generate`, which writes from left to right.*`log_completions=True`"
    )
    with pytest.raises(ValueError, match=message) as caught:
        trainer.add_callback(callback)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        make_trainer(kwargs={"callbacks": [callback]})
