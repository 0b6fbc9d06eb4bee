"""Whether the rollouts of a run give something to learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accelerate.logging import get_logger

from ..links import link


logger = get_logger(__name__)

IDLE = 3  # rollouts without a gradient, one after another, after which a run says so


@dataclass
class Learning:
    """
    The rollouts of a run, and those from which nothing could be learnt.

    Attributes:
        learnt (`bool`): whether any response had a gradient.
        rollouts (`int`): rollouts so far.
        idle (`int`): rollouts in which no response had an advantage.
        in_a_row (`int`): idle rollouts since the last one that was not idle.
        reason (`str`): why the last idle rollout was idle.
        warned (`bool`): whether there was a warning about idle rollouts.
    """

    learnt: bool = False
    rollouts: int = 0
    idle: int = 0
    in_a_row: int = 0
    reason: str = ""
    warned: bool = False

    def note(self, number: float, why_idle: Callable[[], str]) -> None:
        """
        Counts a rollout, and warns after a few idle ones.

        Args:
            number (`float`): responses with an advantage, on all processes together.
            why_idle (`Callable[[], str]`): says why there is none. Every process calls it.
        """
        self.rollouts += 1
        self.in_a_row = 0 if number else self.in_a_row + 1
        if number:
            return
        self.idle += 1
        self.reason = why_idle()
        if self.in_a_row == IDLE:
            self.warned = True
            logger.warning(f"Nothing could be learnt from the last {IDLE} rollouts: {self.reason}")

    def summary(self) -> str | None:
        """What to say at the end of a run: from how many rollouts nothing could be learnt, and why. `None` if there is nothing
        to say."""
        if self.rollouts == 0 or (self.learnt and not self.warned):
            return None
        if self.learnt:
            return f"Nothing could be learnt from {self.idle} of {self.rollouts} rollouts: {self.reason}"
        reason = self.reason or "no two responses to a prompt could be compared."
        return (
            f"Nothing was learnt from the rewards: {reason} See `frac_reward_zero_std` in the log, and "
            f"{link('docs/troubleshooting.md#rewards-are-flat')}."
        )
