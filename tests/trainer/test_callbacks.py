"""Callbacks show the run."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from transformers import ProgressCallback, TrainerCallback
from trl import LogCompletionsCallback, WeaveCallback

from tests.trainer.conftest import make_dataset
from trl_diffusion.trainer.callbacks import RewardProgressCallback, TrajectoryCallback
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


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_pictures_at_the_right_steps(make_trainer, tmp_path):
    trainer = make_trainer()
    assert trainer.last_rollouts is None
    trainer.add_callback(TrajectoryCallback(trainer, every=2))
    trainer.add_callback(TrajectoryCallback(trainer, every=1, directory=tmp_path / "all", rows=2, max_positions=3))
    trainer.train()
    assert isinstance(trainer.last_rollouts, TrajectoryBatch) and len(trainer.last_rollouts) == 4
    assert [path.name for path in (tmp_path / "trajectories").iterdir()] == ["step_000002.png"]
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == [f"step_00000{step}{row}.png" for step in (1, 2, 3) for row in ("", "_1")]
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.glob("*/*.png"))
    small, large = tmp_path / "all" / "step_000002.png", tmp_path / "trajectories" / "step_000002.png"
    width = [int.from_bytes(path.read_bytes()[16:20], "big") for path in (small, large)]
    assert width[0] < width[1]


@pytest.mark.slow
def test_pictures_reach_the_trackers(make_trainer, tmp_path, monkeypatch):
    logged = []
    wandb = SimpleNamespace(run=object(), Image=lambda path: ("image", path), log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    class Writer(TrainerCallback):
        tb_writer = SimpleNamespace(add_image=lambda *args, **kwargs: logged.append((args, kwargs)))

    trainer = make_trainer(max_steps=1)
    callback = TrajectoryCallback(trainer, every=1, rows=2)
    trainer.add_callback(callback)
    trainer.add_callback(Writer())
    trainer.train()
    assert logged == []  # `report_to` names no tracker

    trainer.args.report_to = ["wandb", "tensorboard"]
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    paths = [str(tmp_path / "trajectories" / name) for name in ("step_000001.png", "step_000001_1.png")]
    assert logged[0] == {"trajectory": [("image", path) for path in paths], "train/global_step": 1}
    for row, (args, kwargs) in enumerate(logged[1:]):
        name, image, step = args
        assert name == ("trajectory", "trajectory/1")[row] and step == 1 and kwargs == {"dataformats": "HWC"}
        assert image.ndim == 3 and image.shape[2] == 3 and 0 <= image.min() < image.max() <= 1
    assert len(logged) == 3

    logged.clear()
    wandb.run = None
    trainer.args.report_to = ["wandb"]
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    trainer.state.is_world_process_zero = False
    wandb.run = object()
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert logged == []


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
