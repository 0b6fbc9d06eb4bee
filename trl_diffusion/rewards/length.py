"""
Rewards for the length of completions, in tokens.

TRL's `get_soft_overlong_punishment` is the soft penalty for overlong completions, and is offered here as it is documented
(https://huggingface.co/docs/trl/rewards). A penalty for completions that were cut off is what TRL lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from trl.rewards import get_soft_overlong_punishment


__all__ = ["get_soft_overlong_punishment", "truncation_penalty"]


def truncation_penalty(stop_token_ids: Collection[int], penalty: float = -1.0) -> Callable[..., list[float]]:
    """
    Makes a reward function: `penalty` for a completion that was cut off, 0 for one that stopped by itself.

    Args:
        stop_token_ids (`Collection[int]`): tokens that end a completion, such as `get_spec(model).stop_token_ids`.
        penalty (`float`, *optional*, defaults to `-1.0`): reward of a completion whose last token is none of these,
            or that has no tokens; not positive.

    Raises:
        ValueError: if there are no stop tokens, or the penalty is positive.

    Example:

    ```python
    >>> reward = truncation_penalty(stop_token_ids=[2])
    >>> reward(completion_ids=[[5, 6, 2], [5, 6, 7]])
    [0.0, -1.0]
    ```
    """
    if not stop_token_ids:
        raise ValueError("`stop_token_ids` is empty: no completion could ever stop.")
    if penalty > 0:
        raise ValueError(f"`penalty` must not be positive, got {penalty}.")
    return _TruncationPenalty(frozenset(stop_token_ids), penalty)


class _TruncationPenalty:
    """A class and not a closure, so that it can be pickled."""

    __name__ = "truncation_penalty"  # TRL names metrics after it

    def __init__(self, stop_token_ids: frozenset[int], penalty: float):
        self.stop_token_ids = stop_token_ids
        self.penalty = penalty

    def __call__(self, completion_ids, **kwargs) -> list[float]:
        return [0.0 if ids and ids[-1] in self.stop_token_ids else self.penalty for ids in completion_ids]
