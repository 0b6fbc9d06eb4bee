"""Measures the speed of a run, the time of its parts, and its memory."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainerCallback


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: on its GPU (allocated by torch), or resident if there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class ThroughputCallback(TrainerCallback):
    """
    Adds to the metrics of every optimizer step:

    - `time/rollout`, `time/reward` and `time/update`: seconds for decoding, for the reward functions, and for everything
      from the end of the rollout to the end of the optimizer step. The values are those of the slowest process.
    - `time/rollout_share`: `time/rollout` as a share of all seconds of the steps since the last log.
    - `throughput/responses_per_second` and `throughput/tokens_per_second`: responses and tokens trained on, divided by the
      seconds of all steps since the last log. The values are over all processes.
    - `memory/peak_gib`: largest memory of a process so far, in GiB (see [`peak_memory`]). The value is that of the process
      with the most.

    A step that trains on an earlier rollout has 0 seconds of rollout and reward. A trainer without rollouts has no such
    metrics, nor a number of responses.

    Args:
        trainer ([`DTRPOTrainer`] or [`DiffusionSFTTrainer`]): the trainer that this callback is added to.
        rollouts (`bool`, *optional*, defaults to `True`): whether the trainer has rollouts.
    """

    def __init__(self, trainer, rollouts: bool = True):
        self.trainer, self.rollouts = trainer, rollouts
        self._reset()

    def _reset(self) -> None:
        self.seconds = {"rollout": 0.0, "reward": 0.0, "sampling": 0.0}
        self.responses = 0
        self.tokens: int | torch.Tensor = 0
        self.begin = time.perf_counter()

    @contextmanager
    def timed(self, name: str):
        """Adds the time spent inside to `"rollout"`, `"reward"` or `"sampling"` (everything except the update)."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def count(self, completion_mask: torch.Tensor) -> None:
        """Counts the responses and tokens of a batch that is trained on, by its mask of shape `(R, C)`."""
        self.responses += len(completion_mask)
        self.tokens = self.tokens + completion_mask.sum()

    def on_step_begin(self, args, state, control, **kwargs):
        self._reset()

    def on_step_end(self, args, state, control, **kwargs):
        device = self.trainer.accelerator.device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # the backward pass and the optimizer's kernels may still be running
        whole = time.perf_counter() - self.begin
        update = whole - self.seconds["sampling"]
        values = [float(self.responses), float(self.tokens), whole, self.seconds["rollout"], self.seconds["reward"],
                  update, peak_memory(device) / 2**30]  # fmt: skip
        gathered = self.trainer.accelerator.gather(torch.tensor([values], device=device))
        responses, tokens = gathered[:, :2].sum(0).tolist()
        whole, rollout, reward, update, memory = gathered[:, 2:].amax(0).tolist()
        tally = self.trainer.tally
        tally.add("time/update", update)
        # Over several steps: all seconds, responses or tokens divided by all seconds.
        if self.rollouts:
            tally.add("time/rollout", rollout)
            tally.add("time/reward", reward)
            tally.add("time/rollout_share", rollout / whole, whole)
            tally.add("throughput/responses_per_second", responses / whole, whole)
        tally.add("throughput/tokens_per_second", tokens / whole, whole)
        tally.add("memory/peak_gib", memory, how="max")
