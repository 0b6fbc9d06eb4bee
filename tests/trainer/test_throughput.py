"""What a run's log says about time and memory."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.conftest import codes
from trl_diffusion.trainer import throughput
from trl_diffusion.trainer.throughput import peak_memory


class Clock:
    """Stands still but for what it is told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def before(self, function, seconds: float):
        """`function`, which then takes `seconds`."""

        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slow


def test_seconds_are_where_they_were_spent(make_trainer, monkeypatch):
    """Delays put into decoding, rewards and the optimizer come out under their names, and nothing else does."""
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    trainer = make_trainer(reward_funcs=clock.before(codes, 4.0), max_steps=2, gradient_accumulation_steps=2)
    trainer.decode = clock.before(trainer.decode, 7.0)
    trainer.create_optimizer()
    trainer.optimizer.step = clock.before(trainer.optimizer.step, 10.0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert [entry[f"time/{name}"] for name in ("rollout", "reward", "update")] == [7.0, 4.0, 10.0]
        assert entry["time/rollout_share"] == pytest.approx(7 / 21, rel=1e-6)
        assert entry["throughput/responses_per_second"] == pytest.approx(8 / 21)
        tokens = 8 * entry["completions/mean_length"]
        assert entry["throughput/tokens_per_second"] == pytest.approx(tokens / 21, rel=1e-4)
        assert entry["memory/peak_gib"] > 0


def test_peak_memory_sees_what_was_freed():
    device = torch.device("cpu")
    before = peak_memory(device)
    block = torch.ones(300 * 2**20 // 4)  # 300 MiB
    del block
    peak = peak_memory(device)
    assert before + 100 * 2**20 < peak or before > 300 * 2**20  # unless the tests before this one needed more
    assert peak < 64 * 2**30


def test_a_stored_rollout_takes_no_time(make_trainer):
    """Steps on a rollout of an earlier one count their responses, with no time for decoding."""
    trainer = make_trainer(num_iterations=2, max_steps=2)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["time/rollout"] > 0 == second["time/rollout"] == second["time/reward"]
    assert second["throughput/responses_per_second"] > 0
