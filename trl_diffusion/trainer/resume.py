"""What a checkpoint needs besides weights, optimizer and random state, so that training goes on as if never interrupted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Progress:
    """
    Where a process is inside a rollout.

    Attributes:
        batches (`int`): batches trained on so far.
        num_processes (`int`): processes of the run; a rollout is divided among them.
        rollout (`list[dict[str, Any]]`, *optional*): the batches of the rollout that is still being trained on.
    """

    batches: int
    num_processes: int
    rollout: list[dict[str, Any]] | None

    @staticmethod
    def path(checkpoint: str | Path, process_index: int) -> Path:
        return Path(checkpoint) / f"rollout_{process_index}.pt"

    def save(self, checkpoint: str | Path, process_index: int) -> None:
        """Adds it to a checkpoint."""
        torch.save(asdict(self), self.path(checkpoint, process_index))

    @classmethod
    def load(cls, checkpoint: str | Path, process_index: int, device: torch.device) -> Progress | None:
        """
        Reads it from a checkpoint; `None` if another program wrote that.

        Raises:
            ValueError: if the file is damaged.
        """
        path = cls.path(checkpoint, process_index)
        if not path.is_file():
            return None
        try:
            progress = cls(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({error}). Go on from another checkpoint, or delete this file: a rollout that was "
                "still being trained on is then made anew."
            ) from error
        if progress.rollout is not None:
            progress.rollout = [
                {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
                for batch in progress.rollout
            ]
        return progress
