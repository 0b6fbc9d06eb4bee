"""Keeping processes in step that share a policy's parameters."""

from __future__ import annotations

import torch
from torch import distributed


_DONE, _BUSY, _FAILED = 0, 1, 2


class PeerFailed(RuntimeError):
    """Another process failed."""


class Pace:
    """One process alone: it goes on as long as it has something to do."""

    def go_on(self, busy: bool) -> bool:
        """
        Called before each forward pass.

        Args:
            busy (`bool`): whether this process has something to decode.

        Returns:
            `bool`: whether there is another pass.
        """
        return busy

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        return None


class SharedPace(Pace):
    """
    Processes whose parameters are sharded (ZeRO-3 without gathering, FSDP): each forward pass gathers them, so all
    processes must run the same number of passes. One that is done keeps pace until all are. One that fails tells the
    others, which then fail as well, instead of waiting for it.

    Args:
        device (`torch.device`): where the processes' messages are exchanged: the policy's.

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
