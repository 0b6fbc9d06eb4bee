"""Statistics that show how reliable an estimate is, and how far the policy has moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policies.spec import DiffusionSpec
from ..seeds import derive_seed
from ..trajectories.trajectory import TrajectoryBatch
from .estimators import ESTIMATORS, EstimatorConfig
from .layout import PackedLayout, pack


@dataclass
class EstimateQuality:
    """
    Estimates of the log-ratios of two policies, and the exact log-ratios, for `R` trajectories.

    Attributes:
        exact (`Tensor` of shape `(R,)`): `D`, the log-ratio of the whole trajectory in nats (docs/method.md, section 2).
        estimates (`Tensor` of shape `(estimates, R)`): independent estimates of it.
    """

    exact: Tensor
    estimates: Tensor

    @property
    def bias(self) -> float:
        """Mean of estimate minus exact value, in nats."""
        return (self.estimates - self.exact).mean().item()

    @property
    def std(self) -> float:
        """Standard deviation of the estimates of a trajectory, in nats: the root of the mean variance."""
        return self.estimates.var(0, correction=1).mean().sqrt().item()

    @property
    def correlation(self) -> float:
        """Pearson correlation of estimates with exact values. NaN if one of the two does not vary."""
        pairs = torch.stack([self.estimates.flatten(), self.exact.expand_as(self.estimates).flatten()])
        return torch.corrcoef(pairs)[0, 1].item() if (pairs.std(1) > 1e-6).all() else float("nan")


@torch.no_grad()
def estimate_quality(
    log_ratios: Callable[[PackedLayout], Tensor],
    batch: TrajectoryBatch,
    spec: DiffusionSpec,
    config: EstimatorConfig,
    seeds: list[int],
    num_estimates: int = 8,
) -> EstimateQuality:
    """
    Computes the exact log-ratios of some trajectories, and several independent estimates of each by an estimator.

    Args:
        log_ratios (callable): computes the log-ratio of each write from a layout, `(R, E)`.
        batch ([`TrajectoryBatch`]): the trajectories.
        spec ([`DiffusionSpec`]): facts about the policy.
        config ([`EstimatorConfig`]): the estimator.
        seeds (`list[int]` of length `R`): one seed per trajectory.
        num_estimates (`int`, *optional*, defaults to `8`): number of estimates per trajectory.
    """

    def estimate(config: EstimatorConfig, seeds: list[int]) -> Tensor:
        estimator = ESTIMATORS[config.name]
        layout = pack(batch, spec, estimator.states(batch, spec, seeds, config), estimator.one_row)
        return (log_ratios(layout).double() * layout.weights).sum(1)

    exact = estimate(EstimatorConfig("exact", selection=config.selection), seeds)
    estimates = [estimate(config, [derive_seed(seed, n) for seed in seeds]) for n in range(num_estimates)]
    return EstimateQuality(exact, torch.stack(estimates))


def ratio_statistics(log_ratios: Tensor, weights: Tensor) -> Tensor:
    """
    Sums from which [`summarise_ratios`] computes statistics of importance ratios. Sums of several batches can be added.

    Args:
        log_ratios (`Tensor` of shape `(R, E)`): log-ratio of each write, policy over old policy, in nats.
        weights (`Tensor` of shape `(R, E)`): weight of each write, 0 where it is not scored.

    Returns:
        `Tensor` of shape `(8,)`.
    """
    log_ratios = torch.where(weights > 0, log_ratios, 0.0)
    ratios = log_ratios.exp()
    moments = [
        torch.ones_like(ratios),
        log_ratios,
        log_ratios.square(),
        ratios,
        ratios.square(),
        ratios - 1 - log_ratios,
        (weights > 0) / torch.where(weights > 0, weights, 1.0),  # counts the scored tokens
        weights,
    ]
    return torch.stack([(weights * moment).sum() for moment in moments])


def summarise_ratios(sums: Tensor) -> dict[str, float]:
    """
    Statistics of importance ratios over scored tokens, with their weights, from the sums of [`ratio_statistics`]:

    - `log_ratio_std`: standard deviation of the log-ratio, in nats;
    - `effective_sample_size`: `(sum w r)^2 / (sum w * sum w r^2)` of the ratios `r`, 1 if all are equal (Kish);
    - `kl_to_old`: mean of `r - 1 - log r`, an estimate of the KL divergence from the old policy
      (http://joschu.net/blog/kl-approx.html, "k3");
    - `effective_draws`: `(sum w)^2 / (n sum w^2)` of the weights `w` of the `n` scored tokens, 1 if all are equal (Kish).
    """
    total, first, second, ratios, squares, divergence, tokens, squared_weights = sums.double().tolist()
    if total <= 0:
        return {"log_ratio_std": 0.0, "effective_sample_size": 1.0, "kl_to_old": 0.0, "effective_draws": 1.0}
    mean = first / total
    return {
        "log_ratio_std": max(second / total - mean**2, 0.0) ** 0.5,
        "effective_sample_size": ratios**2 / (total * squares) if squares > 0 else 0.0,
        "kl_to_old": divergence / total,
        "effective_draws": total**2 / (tokens * squared_weights),
    }
