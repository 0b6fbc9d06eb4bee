"""The options of a dry run. They are known before anything that takes long is imported."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

from ..fields import Within


REHEARSED = ("train", "sft", "adapt", "collect")  # the commands with these options that `accelerate launch` starts


@dataclass
class DryRun:
    """Options of a command that can be rehearsed."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check everything but the weights, and say what the run needs, instead of running. Every mistake is named."
        },
    )
    gpu_memory: Annotated[float, Within("(0, inf)")] | None = field(
        default=None,
        metadata={"help": "With `dry_run`: GiB of each GPU of the run. Those of this machine by default."},
    )

    def check_wet(self) -> None:
        """Raises a `ValueError` if one of these options is set where the command is about to compute."""
        if self.dry_run:
            raise ValueError("`dry_run` in a YAML file starts no dry run: give `--dry_run` on the command line.")
        if self.gpu_memory is not None:
            raise ValueError("`--gpu_memory` is for `--dry_run`. Leave it out.")


def is_dry(words: list[str] | None) -> bool:
    """Whether a command line, that of this process by default, asks for a dry run."""
    found = [
        word for word in (sys.argv[1:] if words is None else words) if word.startswith(("--dry_run", "--dry-run"))
    ]
    return bool(found) and found[-1].partition("=")[2].lower() not in ("false", "0", "no")
