"""What a run shows while it goes on."""

from __future__ import annotations

from transformers import ProgressCallback


class RewardProgressCallback(ProgressCallback):
    """
    A progress bar that carries the rewards, instead of a page of metrics at every log. All metrics still go to
    `trainer.state.log_history` and to the trackers named by `report_to`.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        shown = {
            name.removeprefix("rewards/").removesuffix("/mean"): f"{value:.3f}"
            for name, value in logs.items()
            if name.startswith("rewards/") and name.endswith("/mean") and value is not None
        }
        if shown:
            self.training_bar.set_postfix(shown)
