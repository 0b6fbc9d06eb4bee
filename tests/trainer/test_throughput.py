"""What a run's log says about time and memory."""

from __future__ import annotations

import time

import pytest
import torch

from tests.trainer.conftest import codes
from trl_diffusion.trainer.throughput import peak_memory


NAMES = [
    "time/rollout",
    "time/reward",
    "time/update",
    "throughput/responses_per_second",
    "throughput/tokens_per_second",
    "memory/peak_gib",
]


@pytest.mark.slow
def test_seconds_are_where_they_were_spent(make_trainer):
    """Delays put into decoding, rewards and the optimizer come out under their names."""

    def slow_codes(completions, **kwargs):
        time.sleep(0.4)
        return codes(completions)

    trainer = make_trainer(reward_funcs=slow_codes, max_steps=2, gradient_accumulation_steps=2)
    decode = trainer._decode
    trainer._decode = lambda *args: (time.sleep(0.7), decode(*args))[1]
    trainer.create_optimizer()
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *args, **kwargs: (time.sleep(1.0), step(*args, **kwargs))[1]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert all(entry[name] > 0 for name in NAMES)
        assert entry["time/rollout"] >= 0.7 and entry["time/reward"] >= 0.4 and entry["time/update"] >= 1.0
        # 8 responses a step; the whole step is longer than its parts.
        seconds = 8 / entry["throughput/responses_per_second"]
        assert seconds >= sum(entry[name] for name in NAMES[:3]) - 0.01
        per_response = entry["throughput/tokens_per_second"] / entry["throughput/responses_per_second"]
        assert per_response == pytest.approx(entry["completions/mean_length"], rel=1e-4)


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
