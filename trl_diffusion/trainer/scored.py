"""The tokens that one pass over a batch scores: the packed drawn states, and the old policy's log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..policies.experts import counted_tokens
from ..policies.trial import try_policy
from ..scoring.diagnostics import estimate_quality, ratio_statistics
from ..scoring.layout import PackedLayout, pack
from ..scoring.score import high_entropy, score
from ..seeds import CHECKS, derive_seed
from ..trajectories.trajectory import TrajectoryBatch
from .batches import is_rows, trajectories_of
from .evaluation import RowwiseEvaluation
from .metrics import add_over_processes


if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..policies.spec import DiffusionSpec
    from ..scoring.estimators import Estimator, EstimatorConfig
    from .reference import Reference
    from .rollouts import Rollout


@dataclass(frozen=True)
class Scored:
    """
    The tokens that one pass scores. Policy, old policy and reference are scored in the same states.

    Attributes:
        layout ([`PackedLayout`]): the drawn states in packed rows, with the weight of each token.
        recorded (`Tensor` of shape `(R, E)`): log-probabilities recorded while decoding; 0 where nothing is scored.
        old (`Tensor` of shape `(R, E)`, *optional*): log-probabilities of the old policy. `None` if the old policy is the
            current one.
    """

    layout: PackedLayout
    recorded: Tensor
    old: Tensor | None


class DiffusionScoring(RowwiseEvaluation):
    """
    Computes the log-probabilities that a [`~trl.GRPOTrainer`] needs, under a diffusion policy.

    Attributes:
        scored ([`Scored`], *optional*): the tokens that the current pass scores. `None` outside [`scoring`].
    """

    scored: Scored | None = None

    rollout: Rollout | None
    spec: DiffusionSpec
    estimator: Estimator
    scoring_config: EstimatorConfig
    reference: Reference
    accelerator: Accelerator
    num_iterations: int
    current_gradient_accumulation_steps: int
    _share_prompts: bool
    _old_is_recorded: bool  # whether the old policy's log-probabilities are those recorded while decoding
    _is_recorded: bool  # whether log-probabilities were recorded

    def try_policy(self, policy: nn.Module, training: bool = False) -> None:
        """Tries a policy once, in all ways in which this trainer runs it."""
        cached = self.spec.attention == "block" or self.args.approximate_cache is not None
        try_policy(policy, self.spec, cached, training)

    def layout(self, batch: TrajectoryBatch, seeds: list[int], iteration: int) -> tuple[PackedLayout, Tensor]:
        """Draws and packs the states that a pass over a batch scores. Also returns the weights, `(R, E)`."""
        draws = [derive_seed(seed, iteration) for seed in seeds]
        states = self.estimator.states(batch, self.spec, draws, self.scoring_config)
        return pack(batch, self.spec, states, self.estimator.one_row, self._share_prompts), states.weights

    @contextmanager
    def scoring(self, inputs: dict[str, Any], iteration: int = 0) -> Iterator[Scored]:
        """
        Draws the states that a pass over a batch scores. Inside this context, `self.scored` holds them.

        Args:
            inputs (`dict[str, Any]`): a batch of a rollout, one row for each response.
            iteration (`int`, *optional*, defaults to `0`): number of passes over the rollout before this one.
        """
        self.try_policy(self.model, training=True)
        batch = trajectories_of(inputs)
        layout, weights = self.layout(batch, inputs["draw_seeds"].tolist(), iteration)
        recorded = torch.where(weights > 0, batch.event_logps, 0.0)  # tokens that are not scored have ratio 1
        old = recorded if self._old_is_recorded else None
        if old is None and "old_estimates" in inputs:
            old = inputs["old_estimates"][:, iteration]
        self.scored = Scored(layout, recorded, old)
        try:
            yield self.scored
        finally:
            self.scored = None

    @torch.no_grad()
    def old_estimates(self, output: dict[str, Any]) -> Tensor:
        """
        Scores a rollout with the policy that generated it, in the states that each of the `I` passes over the rollout will
        draw. Needed if the recorded log-probabilities are not used.

        Returns:
            `Tensor` of shape `(R, I, E)`.
        """
        size = self.args.per_device_train_batch_size
        estimates = []
        for begin in range(0, len(output["prompt_ids"]), size):
            part = {key: value[begin : begin + size] if is_rows(value) else value for key, value in output.items()}
            passes = []
            for iteration in range(self.num_iterations):
                with self.scoring(part, iteration) as scored:
                    passes.append(score(self.model, scored.layout, self.spec, self.temperature)[0])
            estimates.append(torch.stack(passes, 1))
        return torch.cat(estimates)

    def score_policy(self, model: nn.Module, **options: bool) -> tuple[Tensor, Tensor | None]:
        """Scores the policy inside `scoring`, and records metrics of the pass. `options` are those of [`~scoring.score.score`]."""
        assert self.scored is not None
        layout = self.scored.layout
        places = (layout.rows * layout.input_ids.shape[1] + layout.columns)[layout.coefficients != 0]
        with counted_tokens(model, places) as loads:
            logps, entropies = score(model, layout, self.spec, self.temperature, **options)
        self.log_scores(logps.detach())
        if loads:
            self._tally_of_batch.add_loads(self.accelerator.reduce(torch.stack(loads), reduction="sum"))
        return logps, entropies

    # ---------------------------------------------------------------------------------------------- TRL's hooks

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, compute_entropy=False, **kwargs
    ):
        """
        Log-probabilities of the scored tokens, 0 elsewhere.

        TRL calls this during a rollout for the old policy, whose log-probabilities are the recorded ones.
        """
        if self.scored is None:
            if self.rollout is None or self.rollout.trajectories is None:
                raise RuntimeError(
                    "Token ids alone have no log-probability under a diffusion policy: it depends on the order in which "
                    "they were unmasked. Use `trl_diffusion.scoring.score.score` on the states of a trajectory."
                )
            return fit(self.rollout.trajectories.logps, logits_to_keep), None, None
        gradient = self.args.entropy_coef != 0.0 or self.args.use_adaptive_entropy
        if not compute_entropy:  # of the reference
            return *score(model, self.scored.layout, self.spec, self.temperature), None
        return *self.score_policy(model, compute_entropy=True, entropy_gradient=gradient), None

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """
        The scored tokens that `top_entropy_quantile` keeps, among the tokens of all processes. `mask` holds the weights of the
        tokens, where TRL has 0 and 1.
        """
        entropies, weights = entropies.detach().float(), mask.float()
        local = (values[weights > 0] for values in (entropies, weights))
        pool = [
            self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=0, pad_index=-1.0))
            for values in local
        ]
        real = pool[1] > 0
        return high_entropy(entropies, weights, (pool[0][real], pool[1][real]), threshold)

    # -------------------------------------------------------------------------------------------------- figures

    def log_scores(self, logps: Tensor) -> None:
        """
        Records metrics of the scored tokens: their number, their weights and, if log-probabilities were recorded, their
        ratios. Estimators that score tokens in the states in which they were unmasked also get the difference from the
        recorded log-probabilities (docs/method.md, section 4).
        """
        assert self.scored is not None  # inside `scoring`
        weights, recorded = self.scored.layout.weights, self.scored.recorded
        scored, old = weights > 0, logps if self.scored.old is None else self.scored.old
        if self._is_recorded:
            ratios = ratio_statistics(logps - old, weights)
            self._tally_of_batch.add_ratios(self.accelerator.reduce(ratios, reduction="sum"))
        gap = torch.where(scored, (logps - recorded).abs(), 0.0)
        rows = self._counted(len(gap)).sum()
        total, tokens, responses = add_over_processes(self.accelerator, gap.sum(), scored.sum(), rows)
        self._record("diffusion/scored_tokens", tokens / responses, responses)
        self._record("diffusion/largest_weight", self.accelerator.gather(weights.max()).max().item(), how="max")
        if self.estimator.recorded and self._is_recorded:
            self._record("diffusion/recorded_gap/mean", total / max(tokens, 1), tokens)
            self._record("diffusion/recorded_gap/max", self.accelerator.gather(gap.max()).max().item(), how="max")

    def check_estimator(self, inputs: dict[str, Any]) -> None:
        """Compares estimates with the exact log-ratio of a few trajectories. Does so in the first batch of each
        optimizer step that `estimator_check_steps` selects."""
        every = self.args.estimator_check_steps
        due = every is not None and self.model.training and self.state.global_step % every == 0
        if not due or self._step % self.current_gradient_accumulation_steps:
            return
        batch = trajectories_of(inputs).select(slice(0, self.args.estimator_check_size))
        seeds = [derive_seed(seed, CHECKS) for seed in inputs["draw_seeds"][: len(batch)].tolist()]

        def log_ratios(layout: PackedLayout) -> Tensor:
            logps, _ = score(self.model, layout, self.spec, self.temperature)
            if self.beta != 0.0:
                return logps - self.reference.of_layout(batch, layout)
            return logps - torch.where(layout.weights > 0, batch.event_logps, 0.0)

        quality = estimate_quality(log_ratios, batch, self.spec, self.scoring_config, seeds)
        self._record("diffusion/check/log_ratio", self.accelerator.gather(quality.exact).mean().item())
        for name in ("bias", "std", "correlation"):
            value = torch.tensor([getattr(quality, name)], device=batch.logps.device)
            value = self.accelerator.gather(value).nanmean().item()
            if value == value:
                self._record(f"diffusion/check/{name}", value)


def fit(values: Tensor, width: int) -> Tensor:
    """Pads the last dimension of `values` with 0, or truncates it, to `width` columns."""
    return F.pad(values, (0, width - values.shape[1]))
