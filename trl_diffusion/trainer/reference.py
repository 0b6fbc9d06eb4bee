"""The reference policy: the source of its log-probabilities, and its weights in a checkpoint if it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from ..scoring.score import score
from ..seeds import DRAWS, derive_seed
from ..trajectories.dataset import from_rows
from ..trajectories.trajectory import TrajectoryBatch
from ._trl import use_adapter
from .batches import trajectories_of
from .data import count_epochs
from .rollouts import StoredResponse
from .scored import fit


if TYPE_CHECKING:
    from ..scoring.layout import PackedLayout
    from .trainer import DTRPOTrainer


FILE = "reference.pt"


class Reference:
    """
    The log-probabilities of the reference. They have one of three sources: they were recorded with the stored responses,
    they are computed for all stored responses before training, or each step computes them in a forward pass.

    Args:
        trainer ([`DTRPOTrainer`]): the trainer that it belongs to.
        maker (`str`, *optional*): fingerprint of the reference, if the reference generated the stored responses. The recorded
            log-probabilities are then its own.
    """

    def __init__(self, trainer: DTRPOTrainer, maker: str | None):
        self.trainer, self.maker = trainer, maker
        # For each epoch and row: a tensor of shape (responses, I, E), and the number of its columns that are canvas positions.
        self.estimates: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self._epochs = 0  # number of epochs in `estimates`

    @property
    def recorded(self) -> bool:
        """Whether the reference generated the stored responses that the trainer was made with."""
        return self.maker is not None

    def generated(self, stored: list[StoredResponse] | None) -> bool:
        """Whether the reference generated all responses of a rollout. Not so if they are fresh (`stored` is `None`)."""
        return (
            self.recorded and stored is not None and {one.row["policy_fingerprint"] for one in stored} == {self.maker}
        )

    def of_batch(self, inputs: dict[str, Any], layout: PackedLayout, iteration: int) -> Tensor:
        """
        The reference's log-probabilities of the tokens that a pass scores, `(R, E)`.

        Args:
            inputs (`dict[str, Any]`): a batch of a rollout, one row for each response.
            layout ([`PackedLayout`]): the packed states that the pass scores.
            iteration (`int`): number of passes over the rollout before this one.
        """
        if "ref_estimates" in inputs and not self.recorded:
            return inputs["ref_estimates"][:, iteration]
        if self.recorded and not inputs.get("of_reference", True):  # an evaluation of other rows
            return self.logps(layout)
        return self.of_layout(trajectories_of(inputs), layout)

    def of_layout(self, batch: TrajectoryBatch, layout: PackedLayout) -> Tensor:
        """The reference's log-probabilities of the tokens of a batch that a layout scores, `(R, E)`: recorded, or from one forward
        pass."""
        if self.recorded:
            return torch.where(layout.weights > 0, batch.event_logps, 0.0)
        return self.logps(layout)

    @torch.no_grad()
    def logps(self, layout: PackedLayout) -> Tensor:
        """The reference's log-probabilities of the tokens that a layout scores, `(R, E)`, from one forward pass."""
        trainer = self.trainer
        if trainer.ref_model is not None:
            trainer.try_policy(trainer.ref_model)
            return score(trainer.ref_model, layout, trainer.spec, trainer.temperature)[0]
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not isinstance(model, PeftModel):
            if self.recorded:
                raise ValueError(
                    "The reference was not loaded, because it generated all responses of the trainer's own datasets, and these are "
                    "others. Pass their dataset as `eval_dataset` when the trainer is created."
                )
            raise ValueError(
                "The reference was removed from memory after `precompute_ref_log_probs=True` had scored the rows of train_dataset. "
                "Pass other rows as `eval_dataset` when the trainer is created, or create a new trainer for more epochs."
            )
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return score(trainer.model, layout, trainer.spec, trainer.temperature)[0]

    @torch.no_grad()
    def precompute(self) -> None:
        """Scores every stored response of the training dataset, for every draw that training will make."""
        trainer = self.trainer
        rows = cast(Dataset, trainer.train_dataset)
        epochs = count_epochs(len(rows), trainer.args)
        if epochs <= self._epochs:  # an earlier call of `train` has computed them
            return
        processes, process = trainer.accelerator.num_processes, trainer.accelerator.process_index
        # Every process scores the same number of rows, since the passes of sharded models must match. The last rows repeat.
        own = [(process + turn * processes) % len(rows) for turn in range(-(-len(rows) // processes))]
        bar = tqdm(own, desc="reference", unit="prompt", disable=not trainer.accelerator.is_main_process)
        found = []
        for row in (rows[number] for number in bar):
            responses = range(len(row["canvas_lengths"]))
            batch = from_rows([(row, index) for index in responses], trainer.spec).to(trainer.accelerator.device)
            for epoch in range(epochs):
                stored = [StoredResponse(row, index, epoch) for index in responses]
                seeds = [derive_seed(response.seed(trainer.args.seed), DRAWS) for response in stored]
                layouts = [trainer.layout(batch, seeds, iteration)[0] for iteration in range(trainer.num_iterations)]
                with (
                    trainer.accelerator.autocast()
                ):  # before training, the model below an adapter does not enter it itself
                    passes = [self.logps(layout) for layout in layouts]
                found.append(((epoch, row["row"]), (torch.stack(passes, 1).cpu(), batch.canvas_ids.shape[1])))
        self.estimates, self._epochs = dict(gather_object(found)), epochs

    def precomputed(self, stored: list[StoredResponse] | None, trajectories: TrajectoryBatch) -> dict[str, Tensor]:
        """The precomputed log-probabilities for the responses of a rollout, as the entry `ref_estimates` of a batch,
        `(R, I, E)` for `I` iterations. No entry if nothing was precomputed."""
        if stored is None or not self.estimates:
            return {}
        # The reference is removed here, not in `precompute`: a resumed run may first finish a rollout without this entry.
        # An evaluation and the check of the estimator still need the reference, because they score other states.
        if self.trainer.eval_dataset is None and not self.trainer.args.estimator_check_steps:
            self.trainer.ref_model = None
        width = trajectories.canvas_ids.shape[1]
        taken_back = trajectories.event_steps.shape[1] - width
        rows = []
        for row, index, epoch in stored:
            values, own = self.estimates[epoch, row["row"]]
            rows.append(torch.cat([fit(values[index, :, :own], width), fit(values[index, :, own:], taken_back)], 1))
        return {"ref_estimates": torch.stack(rows).to(self.trainer.accelerator.device)}


def save_reference(model: nn.Module, checkpoint: str | Path, write: bool) -> None:
    """
    Adds the weights of the reference to a checkpoint. Every process must call it, since the weights may be sharded.

    Args:
        model (`nn.Module`): the reference, unwrapped.
        checkpoint (`str` or `Path`): directory of the checkpoint.
        write (`bool`): whether this process writes.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        with _whole(parameter):
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if write:
                weights[name] = value.detach().cpu().clone()
    if write:
        torch.save(weights, Path(checkpoint) / FILE)


@torch.no_grad()
def load_reference(model: nn.Module, checkpoint: str | Path) -> None:
    """
    Restores the weights of the reference from a checkpoint. Every process must call it.

    Args:
        model (`nn.Module`): the reference, unwrapped.
        checkpoint (`str` or `Path`): directory of the checkpoint.

    Raises:
        ValueError: if the checkpoint has no reference, a damaged reference, or the reference of another model.
    """
    path = Path(checkpoint) / FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no {FILE}, the reference that `sync_ref_model=True` had updated, so training would continue with "
            "the initial reference. Set `sync_ref_model=False`, or start a new run with this checkpoint as `model`."
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}). Go on from another checkpoint.") from error
    shapes = {name: _shape(parameter) for name, parameter in model.named_parameters()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise ValueError(f"{path} holds the weights of another model than the reference, {type(model).__name__}.")
    for name, parameter in model.named_parameters():
        value = weights[name]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        with _whole(parameter, change=True) as mine:
            if mine:
                parameter.copy_(value)


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3, a sharded parameter is empty


@contextmanager
def _whole(parameter: Tensor, change: bool = False) -> Iterator[bool]:
    """
    Context in which a parameter that ZeRO-3 shards is complete. With `change`, changes by the first process apply to all
    processes. Yields whether this process is the one that changes it.
    """
    if not is_deepspeed_zero3_enabled():
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if change else None):
        yield distributed.get_rank() == 0
