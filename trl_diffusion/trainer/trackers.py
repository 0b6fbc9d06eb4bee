"""
Sends tables and pictures to the trackers that `report_to` names. transformers sends numbers.

A further tracker is one more function in [`SENDERS`].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from accelerate.logging import get_logger
from transformers.integrations import (
    TrackioCallback,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)


if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ._trl import TrainerMixin


logger = get_logger(__name__)

STEP = "train/global_step"  # the name under which transformers sends the number of updates
MOST_ROWS = 100  # of a table as text


@dataclass(frozen=True)
class Shown:
    """
    What a tracker gets.

    Attributes:
        name (`str`): its name there.
        step (`int`): number of optimizer steps so far.
        table (`pandas.DataFrame`, *optional*): a table.
        pictures (`list[Path]`): PNG files.
    """

    name: str
    step: int
    table: pd.DataFrame | None = None
    pictures: Sequence[Path] = ()

    @property
    def named_pictures(self) -> list[tuple[str, Path]]:
        """The pictures, each with a name of its own: `NAME`, `NAME/1`, `NAME/2`, ..."""
        return [(f"{self.name}/{row}" if row else self.name, path) for row, path in enumerate(self.pictures)]


@dataclass
class Trackers:
    """
    The trackers of a trainer. Only the main process sends anything.

    A tracker that fails does not end the training: its first error is a warning.

    Attributes:
        trainer ([`~trl.GRPOTrainer`]): the trainer.
        failed (`set[str]`): names of the trackers that have failed.
    """

    trainer: TrainerMixin
    failed: set[str] = field(default_factory=set)

    def start(self) -> None:
        """
        Opens a run of trackio if none is open, as in an evaluation before or after training. TRL sends it the time of each part of
        an evaluation, and fails without a run.
        """
        trainer = self.trainer
        if "trackio" not in (trainer.args.report_to or ()) or not trainer.state.is_world_process_zero:
            return
        import trackio

        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TrackioCallback) and trackio.context_vars.current_run.get() is None:
                callback.setup(trainer.args, trainer.state, trainer.model)

    def send_table(self, name: str, table: pd.DataFrame) -> None:
        """Sends a table to every tracker that is in use."""
        self._send(Shown(name, self.trainer.state.global_step, table=table))

    def send_pictures(self, name: str, pictures: Sequence[Path]) -> None:
        """Sends PNG files to every tracker that is in use."""
        self._send(Shown(name, self.trainer.state.global_step, pictures=pictures))

    def _send(self, shown: Shown) -> None:
        if not self.trainer.state.is_world_process_zero:
            return
        for tracker in self.trainer.args.report_to or ():
            try:
                if tracker in SENDERS:
                    SENDERS[tracker](shown, self.trainer.callback_handler.callbacks)
            except Exception as error:
                if tracker not in self.failed:
                    said = " ".join(f"{type(error).__name__}: {error}".split())
                    logger.warning(
                        f"{tracker} did not take {shown.name!r} ({said}). Training goes on; further errors of {tracker} are not "
                        "reported."
                    )
                self.failed.add(tracker)


def _to_wandb(shown: Shown, callbacks: list[TrainerCallback]) -> None:
    import wandb

    if wandb.run is None:
        return
    entry: Any
    if shown.table is not None:
        entry = wandb.Table(dataframe=shown.table)
    else:
        images = [wandb.Image(str(path)) for path in shown.pictures]
        entry = images[0] if len(images) == 1 else images
    # As transformers logs. With `step=`, wandb drops entries whose step is below its own count of calls.
    wandb.log({shown.name: entry, STEP: shown.step})


def _to_trackio(shown: Shown, callbacks: list[TrainerCallback]) -> None:
    import trackio

    if trackio.context_vars.current_run.get() is None:
        return
    if shown.table is not None:
        trackio.log({shown.name: trackio.Table(dataframe=shown.table), STEP: shown.step})
    else:
        trackio.log({**{name: trackio.Image(str(path)) for name, path in shown.named_pictures}, STEP: shown.step})


def _to_tensorboard(shown: Shown, callbacks: list[TrainerCallback]) -> None:
    for writer in (getattr(callback, "tb_writer", None) for callback in callbacks):
        if writer is None:
            continue
        if shown.table is not None:
            writer.add_text(shown.name, as_markdown(shown.table), shown.step)
        for name, path in shown.named_pictures:
            from matplotlib.image import imread  # which has drawn them

            writer.add_image(name, imread(path)[..., :3], shown.step, dataformats="HWC")
        writer.flush()


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """
    Checks that the trackers are installed, before any weights are loaded.

    Raises:
        ValueError: with the first tracker that is not.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in _INSTALLED and not _INSTALLED[name]():
            raise ValueError(
                f"`report_to` names {name!r}, which is not installed: `pip install {name}`, or leave it out."
            )


_INSTALLED: dict[str, Callable[[], bool]] = {
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
    "tensorboard": is_tensorboard_available,
}
SENDERS: dict[str, Callable[[Shown, list[TrainerCallback]], None]] = {
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "tensorboard": _to_tensorboard,
}


def as_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown. It has the first [`MOST_ROWS`] rows, and markup in its texts is shown as it is written."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.head(MOST_ROWS).values.tolist()]
    text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    left_out = len(table) - MOST_ROWS
    return text if left_out <= 0 else f"{text}\n\n{left_out} more rows are left out."


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value == "---":
        return value
    return re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", escape(str(value), quote=False)).replace("\n", "<br>")
