"""The probability with which a denoising step selects its positions, if the selection depends on the sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..policies.spec import DiffusionSpec


_NOTHING = -100.0  # log-probability, in nats, of an impossible event; finite, so that its gradient is 0 and not NaN


@dataclass(frozen=True)
class Selection:
    """
    How a denoising step selected positions by the tokens that were sampled for them.

    Args:
        threshold (`float`, *optional*): threshold of `"sampled_threshold"`. `None` for `"sampled_confidence"`.
        sub_block_size (`int`, *optional*): size of the parts of a block that are unmasked one after another.
        tempered (`bool`, *optional*, defaults to `False`): see `DecodingConfig.tempered_confidence`.
        new_tokens (`int`, *optional*): largest number of tokens of a response. If it is less than a block, positions after it
            could not be selected.
    """

    threshold: float | None = None
    sub_block_size: int | None = None
    tempered: bool = False
    new_tokens: int | None = None

    def of_policy(self, spec: DiffusionSpec) -> Selection:
        """A copy without `new_tokens` if it has no effect, that is, if it is at least a block."""
        whole = self.new_tokens is None or self.new_tokens >= spec.block_size
        return replace(self, new_tokens=None) if whole else self

    def rejected_logps(self, log_probs: Tensor, seen: Tensor, lowest: Tensor) -> Tensor:
        """
        Log-probability that each position is left masked: that a token is sampled with which the position is not selected.

        Args:
            log_probs (`Tensor` of shape `(M, V)`): log-distributions that tokens are sampled from.
            seen (`Tensor` of shape `(M, V)`): log-distributions that the selection reads confidences from.
            lowest (`Tensor` of shape `(M,)`): the lowest log-confidence among the tokens that the step unmasked.

        Returns:
            `Tensor` of shape `(M,)`, in nats.
        """
        leaves = seen < lowest[:, None]
        if self.threshold is not None:
            # Either all unmasked tokens are above the threshold, or the most confident ones filled the quota.
            leaves = torch.where(lowest[:, None].exp() > self.threshold, seen.exp() <= self.threshold, leaves)
        return log_probs.masked_fill(~leaves, _NOTHING).logsumexp(-1)

    def shares(
        self, log_probs: Tensor, seen: Tensor, tokens: Tensor, states: Tensor, unmasked: Tensor, rejected: Tensor
    ) -> Tensor:
        """
        The log-probability of a step's selection, given the tokens that it unmasked. It is divided equally among these tokens
        (docs/method.md, section 1).

        Args:
            log_probs, seen (`Tensor` of shape `(M, V)`): see [`Selection.rejected_logps`].
            tokens (`Tensor` of shape `(M,)`): token at each place; used only where `unmasked`.
            states (`Tensor` of shape `(M,)`): number of the state that each place belongs to.
            unmasked (boolean `Tensor` of shape `(M,)`): places that the step unmasked.
            rejected (boolean `Tensor` of shape `(M,)`): places that the step could have unmasked but did not.

        Returns:
            `Tensor` of shape `(M,)`, in nats; 0 where nothing was unmasked.
        """
        number = int(states.max()) + 1 if len(states) else 0
        confidences = seen.detach()[unmasked].gather(1, tokens[unmasked, None]).squeeze(1)
        lowest = torch.full((number,), torch.inf, device=seen.device, dtype=seen.dtype)
        lowest = lowest.scatter_reduce(0, states[unmasked], confidences, reduce="amin")
        own = self.rejected_logps(log_probs[rejected], seen.detach()[rejected], lowest[states[rejected]])
        zeros = torch.zeros(number, device=own.device, dtype=own.dtype)
        sums = zeros.index_add(0, states[rejected], own)
        counts = zeros.index_add(0, states[unmasked], torch.ones_like(confidences))
        return torch.where(unmasked, (sums / counts.clamp(min=1))[states], 0.0)
