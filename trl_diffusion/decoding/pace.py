"""Makes processes that share a policy's parameters run the same number of forward passes."""

from __future__ import annotations

import torch
from torch import distributed


_DONE, _BUSY, _FAILED = 0, 1, 2


class PeerFailed(RuntimeError):
    """Another process failed."""


class Pace:
    """A single process. It continues as long as it has something to decode."""

    def go_on(self, busy: bool) -> bool:
        """
        Called before each forward pass.

        Args:
            busy (`bool`): whether this process has something to decode.

        Returns:
            `bool`: whether to run another pass.
        """
        return busy

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        return None


class SharedPace(Pace):
    """
    Processes whose parameters are sharded (ZeRO-3 without gathering, FSDP). Each forward pass gathers the parameters, so
    all processes must run the same number of passes. A process that is done makes empty passes until all are done. A
    process that fails tells the others, which then fail as well instead of waiting.

    Args:
        device (`torch.device`): device of the policy, on which the processes exchange messages.

    Raises:
        PeerFailed: from [`Pace.go_on`], if another process failed.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def go_on(self, busy: bool) -> bool:
        state = self._share(_BUSY if busy else _DONE)
        if state == _FAILED:
            raise PeerFailed("Decoding failed on another process; its own message says why.")
        return state == _BUSY

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and not isinstance(error, PeerFailed):
            self._share(_FAILED)

    def _share(self, state: int) -> int:
        """The largest state of all processes."""
        message = torch.tensor(state, device=self.device)
        distributed.all_reduce(message, op=distributed.ReduceOp.MAX)
        return int(message)
