"""Metrics of many rows: how those of several batches are combined, and those that need all rows at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from ..scoring.diagnostics import summarise_ratios


How = Literal["mean", "sum", "min", "max", "last"]


def add_over_processes(accelerator: Accelerator, *values: Tensor | float) -> list[float]:
    """
    Sums of some numbers over all processes. Must be called by every process.

    Args:
        accelerator ([`~accelerate.Accelerator`]): connects the processes.
        values (scalar `Tensor` or `float`): the numbers of this process.

    Returns:
        `list[float]`: one sum for each number, the same on every process.
    """
    device = accelerator.device
    local = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device).detach() for value in values])
    return accelerator.reduce(local, reduction="sum").tolist()


@dataclass
class Tally:
    """
    Metrics that are added batch by batch. The results are the same as if all rows had been in one batch.

    Values are over all processes, so every process holds the same tally. It consists only of numbers, text, lists and
    mappings, so that a checkpoint can hold it.

    Attributes:
        figures (`dict[str, list]`): for each name, how values are combined, the value so far, and its weight.
        ratios (`list[float]`): sums of [`~scoring.diagnostics.ratio_statistics`]. Empty if there are none.
        loads (`list[list[float]]`): for each layer with experts, the scored tokens that each expert got.
    """

    figures: dict[str, list] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    loads: list[list[float]] = field(default_factory=list)

    def add(self, name: str, value: float, weight: float = 1.0, how: How = "mean") -> None:
        """
        Adds the metric of a batch.

        Args:
            name (`str`): name of the metric.
            value (`float`): its value. NaN means that there is no value, and does not count.
            weight (`float`, *optional*, defaults to `1.0`): for a mean, the number of items over which it was taken.
            how (`str`, *optional*, defaults to `"mean"`): how it is combined with those of other batches: `"mean"`,
                `"sum"`, `"min"`, `"max"`, or `"last"`, which keeps the newest.
        """
        entry = self.figures.setdefault(name, [how, None, 0.0])
        if value != value:
            return
        found = entry[1]
        if how == "mean":
            value *= weight
            entry[2] += weight
        if found is None or how == "last":
            entry[1] = value
        elif how in ("mean", "sum"):
            entry[1] = found + value
        else:
            entry[1] = min(found, value) if how == "min" else max(found, value)

    def add_ratios(self, sums: Tensor) -> None:
        """Adds [`~scoring.diagnostics.ratio_statistics`] of a batch, shape `(8,)`, summed over processes."""
        values = sums.double().tolist()
        self.ratios = [a + b for a, b in zip(self.ratios, values, strict=True)] if self.ratios else values

    def add_loads(self, counts: Tensor) -> None:
        """Adds the tokens of each expert in a batch, shape `(L, E)` for `L` layers of `E` experts, summed over processes."""
        before = torch.tensor(self.loads, dtype=torch.float64) if self.loads else 0.0
        self.loads = (counts.double().cpu() + before).tolist()

    def results(self) -> dict[str, float | None]:
        """The metrics. A metric without a value is `None`."""
        found: dict[str, float | None] = {}
        for name, (how, value, weight) in self.figures.items():
            found[name] = value / weight if how == "mean" and value is not None and weight else value
        if self.ratios:
            ratios = summarise_ratios(torch.tensor(self.ratios, dtype=torch.float64))
            found.update({f"diffusion/{name}": value for name, value in ratios.items()})
        if self.loads:
            loads = torch.tensor(self.loads, dtype=torch.float64)
            even = loads.mean(1).clamp(min=1e-9)
            found["experts/largest_load"] = (loads.amax(1) / even).mean().item()
            found["experts/unused"] = (loads == 0).double().mean().item()
        return found


def deviation(values: Tensor, dim: int = 0) -> Tensor:
    """Standard deviation of the values that are not NaN (with Bessel's correction). NaN if there are fewer than 2."""
    count = (~values.isnan()).sum(dim)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim)
    return torch.where(count > 1, squares / (count - 1).clamp(min=1), torch.nan).sqrt()


def reward_figures(rewards: Tensor, names: list[str], weights: Tensor, group_size: int) -> dict[str, float]:
    """
    TRL's metrics of rewards, from all rows at once.

    Args:
        rewards (`Tensor` of shape `(R, F)`): rewards of `R` responses, group after group, by `F` reward functions. NaN where
            a function does not apply.
        names (`list[str]` of length `F`): names of the functions.
        weights (`Tensor` of shape `(F,)`): weights of the functions in the total reward.
        group_size (`int`): number of responses to a prompt.

    Returns:
        `dict[str, float]`: `rewards/NAME/mean` and `rewards/NAME/std` are over the rows to which a function applies. `reward`
        and `reward_std` are over the rows to which any function applies. They are NaN without such rows.
        `frac_reward_zero_std` is the share of groups whose responses all have the same reward, for any scaling of the
        rewards (TRL's is 0 or 1 with `scale_rewards="batch"`).
    """
    rewards = rewards.double()
    found = {}
    for column, name in enumerate(names):
        found[f"rewards/{name}/mean"] = rewards[:, column].nanmean().item()
        found[f"rewards/{name}/std"] = deviation(rewards[:, column]).item()
    whole = (rewards * weights.double()).nansum(1)
    whole[rewards.isnan().all(1)] = torch.nan
    found["reward"] = whole.nanmean().item()
    found["reward_std"] = deviation(whole).item()
    if group_size == 1:
        found["frac_reward_zero_std"] = 1.0  # a group of one response has no differing rewards
    else:
        spread = deviation(whole.view(-1, group_size), 1)
        found["frac_reward_zero_std"] = torch.isclose(spread, torch.zeros_like(spread)).double().mean().item()
    return found


def length_figures(lengths: Tensor, truncated: Tensor) -> dict[str, float]:
    """
    TRL's metrics of the lengths of responses, from all rows at once.

    Args:
        lengths (`Tensor` of shape `(R,)`): number of tokens of each response.
        truncated (`Tensor` of shape `(R,)`): whether each response was cut off.

    Returns:
        `dict[str, float]`: with the prefix `completions/`, the mean, smallest and largest length of all responses, and of those
        that ended with a stop token (0 if there are none), and the share of responses that were cut off.
    """
    ended = lengths[~truncated] if (~truncated).any() else lengths.new_zeros(1)
    found = {"completions/clipped_ratio": truncated.double().mean().item()}
    for kind, values in (("length", lengths.double()), ("terminated_length", ended.double())):
        found[f"completions/mean_{kind}"] = values.mean().item()
        found[f"completions/min_{kind}"] = values.min().item()
        found[f"completions/max_{kind}"] = values.max().item()
    return found
