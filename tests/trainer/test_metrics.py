"""Figures of batches put together are those of all rows at once."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from accelerate import Accelerator

from trl_diffusion.scoring.diagnostics import ratio_statistics, summarise_ratios
from trl_diffusion.trainer.metrics import Tally, add_over_processes, length_figures, reward_figures


VALUES = [3.0, -1.0, 4.0, 1.0, 5.0, -9.0, 2.0]


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 3, 1], [2, 5]])
def test_a_tally_does_not_depend_on_the_batches(sizes):
    tally, rest = Tally(), list(VALUES)
    for size in sizes:
        batch, rest = rest[:size], rest[size:]
        tally.add("mean", sum(batch) / size, size)
        tally.add("sum", sum(batch), how="sum")
        tally.add("min", min(batch), how="min")
        tally.add("max", max(batch), how="max")
        tally.add("last", batch[-1], how="last")
    assert tally.results() == pytest.approx(
        {"mean": 5 / 7, "sum": 5.0, "min": -9.0, "max": 5.0, "last": 2.0}, rel=1e-12
    )


def test_what_does_not_exist_does_not_count():
    tally = Tally()
    for value, weight in ((math.nan, 5), (2.0, 1), (math.nan, 1), (4.0, 3)):
        tally.add("some", value, weight)
        tally.add("none", math.nan, weight)
    tally.add("empty", 0.0, 0.0)  # of a batch without such tokens
    assert tally.results() == {"some": 3.5, "none": None, "empty": 0.0}
    assert Tally(**vars(tally)).results() == tally.results()  # as a checkpoint keeps it


def test_ratios_of_batches_are_those_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    ratios, weights = torch.randn(6, 5, generator=generator), torch.rand(6, 5, generator=generator)
    tally = Tally()
    for rows in (slice(0, 4), slice(4, 6)):
        tally.add_ratios(ratio_statistics(ratios[rows], weights[rows]))
    expected = summarise_ratios(ratio_statistics(ratios, weights))
    assert tally.results() == pytest.approx({f"diffusion/{name}": value for name, value in expected.items()}, rel=1e-5)


def test_rewards_of_all_rows():
    """By hand, for two functions of which one leaves out a group and a row that no function scores."""
    nan = math.nan
    first, second = [1.0, 2.0, 0.5, 0.5, nan, 4.0], [nan, nan, 1.0, 1.0, nan, 6.0]
    rewards = torch.tensor([first, second]).T
    found = reward_figures(rewards, ["a", "b"], torch.tensor([1.0, 2.0]), group_size=2)
    kept, totals = [1.0, 2.0, 0.5, 0.5, 4.0], [1.0, 2.0, 2.5, 2.5, 16.0]
    assert found == pytest.approx({
        "rewards/a/mean": statistics.mean(kept), "rewards/a/std": statistics.stdev(kept),
        "rewards/b/mean": 8 / 3, "rewards/b/std": statistics.stdev([1.0, 1.0, 6.0]),
        "reward": statistics.mean(totals), "reward_std": statistics.stdev(totals),
        "frac_reward_zero_std": 1 / 3,  # the second group; the third has a single score, so it has no spread
    }, rel=1e-6)  # fmt: skip
    alone = reward_figures(rewards[:1], ["a", "b"], torch.ones(2), group_size=1)
    assert math.isnan(alone["reward_std"]) and math.isnan(alone["rewards/b/mean"]) and alone["reward"] == 1.0


def test_lengths_of_all_rows():
    found = length_figures(torch.tensor([4, 7, 1, 8]), torch.tensor([False, True, False, True]))
    assert found == {
        "completions/clipped_ratio": 0.5,
        "completions/mean_length": 5.0, "completions/min_length": 1.0, "completions/max_length": 8.0,
        "completions/mean_terminated_length": 2.5, "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 4.0,
    }  # fmt: skip
    cut_off = length_figures(torch.tensor([3]), torch.tensor([True]))
    assert cut_off["completions/max_terminated_length"] == 0.0


def test_sums_of_one_process():
    assert add_over_processes(Accelerator(cpu=True), torch.tensor(2), 0.5, torch.tensor(1.5)) == [2.0, 0.5, 1.5]


def test_loads_of_experts_are_summed_before_they_are_compared():
    """Two layers of four experts: of 12 tokens, the expert that got most has 6 where an even share is 3, and 4."""
    tally = Tally()
    tally.add_loads(torch.tensor([[6, 0, 0, 0], [1, 1, 2, 2]]))
    tally.add_loads(torch.tensor([[0, 5, 1, 0], [1, 2, 1, 2]]))
    assert tally.results() == {"experts/largest_load": pytest.approx((2 + 4 / 3) / 2), "experts/unused": 1 / 8}
    assert Tally(**vars(tally)).results() == tally.results()
