"""Supervised fine-tuning, as a subclass of TRL's `SFTTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from ..agreement import check_shared
from ..policies.forward import likeliest
from ..policies.whole import only_whole_models
from ..scoring.layout import join_rows, pack, rows_to_join
from ..scoring.score import layout_logits, score_logits
from ..seeds import SUPERVISED, derive_seed
from ..trainer.callbacks import LossProgressCallback, replace_bar
from ..trainer.card import tuning_card
from ..trainer.checks import named_datasets
from ..trainer.metrics import Tally, add_over_processes
from ..trainer.policy_files import PolicyFiles
from ..trainer.resume import find_checkpoint
from ..trainer.throughput import ThroughputCallback
from ..utils import write_text
from .config import DiffusionSFTConfig
from .documents import Documents
from .masks import document_states
from .setup import check_documents, make_ready, set_up


logger = get_logger(__name__)


@dataclass
class _Evaluation:
    """An evaluation in progress: its number of rows (`None` for a stream), the number of rows read so far, and their metrics."""

    size: int | None
    read: int = 0
    tally: Tally = field(default_factory=Tally)


class DiffusionSFTTrainer(PolicyFiles, SFTTrainer):
    r"""
    Supervised fine-tuning of a diffusion policy. It has the constructor, the dataset formats and the options of
    [`~trl.SFTTrainer`].

    Some of the trained tokens of each document are masked, and the policy predicts them. With block attention each block has
    its own mask, and sees the clean blocks before it. One forward pass holds all blocks of a document (docs/method.md,
    section 9). Its prompt is in the pass once.

    The masks of a document depend on `seed`, the optimizer step and the tokens of the document. The number of processes, the
    order of rows, packing and an interruption change nothing.

    Example:

    ```python
    from datasets import Dataset

    from trl_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
    from trl_diffusion import tiny_policy_path
    from trl_diffusion.rewards import sudoku

    rows = []
    for row in sudoku.generate(1000, seed=0):
        prompt = sudoku.prompt(row["puzzle"])
        rows.append({"prompt": prompt, "completion": row["solution"]})

    trainer = DiffusionSFTTrainer(
        model=tiny_policy_path(),
        args=DiffusionSFTConfig("sudoku_sft", learning_rate=1e-3, max_steps=100),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy: a path, a hub id, or a model. The [`DiffusionSpec`] is in its config or in `args.diffusion_spec`.
        args ([`DiffusionSFTConfig`], *optional*):
            Configuration of this trainer.
        train_dataset, eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Datasets in any of TRL's formats: text, prompt-completion, messages, or `input_ids` with `labels`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. By default, it is loaded from the path or hub id of the model.
        kwargs (`dict`):
            The other arguments of [`~trl.SFTTrainer`], by name: `callbacks`, `optimizers`, `peft_config`, ...

    Raises:
        TypeError: if the model or the arguments have an unsupported type.
        ValueError: before any training, in these cases:

            - The policy has no mask token, or has layers or an attention that cannot be those of a diffusion policy.
            - A document holds the mask token or a token that the model does not have, or is longer than its context.
            - No token of the dataset is trained.
    """

    _tag_names = ["trl", "trl-diffusion", "sft"]
    _name = "diffusion SFT"

    # `compute_loss` divides by the tokens of all batches of a step.
    loss_is_scaled_for_ga: bool | None = True  # type: ignore[assignment]  # TRL infers `None`

    # Narrowed types of inherited attributes.
    args: DiffusionSFTConfig
    model: PreTrainedModel

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: DiffusionSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args, self.spec, processing_class = set_up(
            model, args, processing_class, named_datasets(train_dataset, eval_dataset), kwargs
        )
        self.masks = args.masks()
        self.tally = Tally()
        self.trained_tokens: int | None = None  # since `train` was called, `None` before the first batch
        self.evaluation: _Evaluation | None = None
        with only_whole_models():
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        self._throughput = ThroughputCallback(self, rollouts=False)
        self.add_callback(self._throughput)
        replace_bar(self, LossProgressCallback)
        self.data_collator = collator = make_ready(self)
        check_documents(self, collator)

    def spec_at(self, step: int) -> Any:
        """The spec at an optimizer step: with `block_sizes`, the block size changes during training."""
        sizes = self.args.block_sizes
        if not sizes or not self.state.max_steps:
            return self.spec
        stage = min(step * len(sizes) // self.state.max_steps, len(sizes) - 1)
        return self.spec.replace(block_size=sizes[stage])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`]. With `resume_from_checkpoint=True` it starts from the beginning if there is no checkpoint yet.

        Raises:
            ValueError: if no token was trained, if the processes do not share `output_dir`, or if a checkpoint is damaged or
                incomplete.
        """
        self.trained_tokens = None
        if not self.args.save_on_each_node:
            check_shared(self.accelerator, str(self.args.output_dir))
        output = super().train(find_checkpoint(self, resume_from_checkpoint), *args, **kwargs)
        if self.trained_tokens == 0:
            raise ValueError(
                f"Nothing was trained: the {self.state.global_step} steps had no token to train. Look at the labels of the stream, at "
                "the chat template and at `max_length`."
            )
        return output

    # ------------------------------------------------------------------------------------------------- the loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimizer step, and the number of trained tokens in those of all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(int(batch["trained"].sum()) for batch in samples)
        (total,) = add_over_processes(self.accelerator, float(count))
        self.trained_tokens = (self.trained_tokens or 0) + int(total)
        return samples, torch.tensor(total, device=device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss per trained token. `num_items_in_batch`: trained tokens of the step, over all processes."""
        if return_outputs:
            raise ValueError(
                f"{type(self).__name__} has no outputs to return: it reads the logits of masked tokens only."
            )
        documents = Documents(**inputs)
        sums, counts = self._losses(model, documents)
        if self.evaluation is None:
            self._throughput.count(documents.trained)
            self._record(sums, counts, self.tally)
            total = counts["trained"].sum() if num_items_in_batch is None else num_items_in_batch
            # Processes average their gradients, and `total` counts the tokens of all of them.
            scale = 1 if num_items_in_batch is None else self.accelerator.num_processes
            return sums["loss"].sum() * scale / total.clamp(min=1)
        rows, process = int(documents.packs[-1]) + 1, self.accelerator.process_index
        numbers = self.evaluation.read + process * rows + documents.packs
        self.evaluation.read += rows * self.accelerator.num_processes
        counted = torch.ones_like(numbers) if self.evaluation.size is None else numbers < self.evaluation.size
        self._record(
            {name: values * counted for name, values in sums.items()},
            {name: values * counted for name, values in counts.items()},
            self.evaluation.tally,
        )
        return sums["loss"].sum() / counts["trained"].sum().clamp(min=1)

    def _losses(self, model: nn.Module, documents: Documents) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums over the tokens of each document, and the number of tokens in each sum, `(R,)` each."""
        step = self.state.global_step if self.evaluation is None else 0  # evaluations have the same masks
        spec = self.spec if self.evaluation is not None else self.spec_at(step)
        stream = int(self.evaluation is not None)
        seed = derive_seed(self.args.seed, SUPERVISED, stream, step)
        layout = pack(documents.trajectories(), spec, document_states(documents, spec, seed, self.masks))
        if documents.packed:
            layout = join_rows(layout, rows_to_join(layout, len(documents.packs)))
        logits = layout_logits(model, layout)
        logps, entropies = score_logits(logits, layout, spec, compute_entropy=True)
        scored = layout.weights > 0
        right = torch.zeros_like(documents.numbers, dtype=torch.float32)
        right.index_add_(0, layout.responses, (likeliest(logits, spec) == layout.targets).float())
        sums = {
            "loss": -(logps * layout.weights).sum(1),
            "entropy": (cast(Tensor, entropies) * scored).sum(1).detach(),
            "mean_token_accuracy": right,
        }
        counts = {
            "trained": documents.trained.sum(1),
            "entropy": scored.sum(1),
            "mean_token_accuracy": torch.bincount(layout.responses, minlength=len(right)),
            "num_tokens": documents.prompt_mask.sum(1) + documents.trained.sum(1),
        }
        return sums, counts

    # ------------------------------------------------------------------------------------------------- metrics

    def _record(self, sums: dict[str, Tensor], counts: dict[str, Tensor], tally: Tally) -> None:
        """Adds the metrics of a batch, over all processes."""
        values = [*(one.sum() for one in sums.values()), *(one.sum() for one in counts.values())]
        totals = dict(
            zip(
                [*sums, *(f"of {name}" for name in counts)], add_over_processes(self.accelerator, *values), strict=True
            )
        )
        for name, of in (("loss", "trained"), ("entropy", "entropy"), ("mean_token_accuracy", "mean_token_accuracy")):
            if (weight := totals[f"of {of}"]) and (
                name != "loss" or tally is not self.tally
            ):  # transformers logs the loss of training
                tally.add(name, totals[name] / weight, weight)
        if tally is self.tally:
            self._total_train_tokens += int(totals["of num_tokens"])
            tally.add("num_tokens", self._total_train_tokens, how="last")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch of an evaluation. There are no predictions: the logits of most positions are never computed."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Runs the evaluation loop of transformers. Its loss and metrics are over the tokens of all rows, each row once."""
        dataset = dataloader.dataset
        self.evaluation = _Evaluation(None if isinstance(dataset, torch.utils.data.IterableDataset) else len(dataset))
        try:
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            figures = self.evaluation.tally.results()
        finally:
            self.evaluation = None
        metrics = cast("dict[str, Any]", output.metrics)
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of training since the last log."""
        if "loss" in logs:
            logs.update({name: value for name, value in self.tally.results().items() if value is not None})
            self.tally = Tally()
        super().log(logs, start_time)

    def create_model_card(  # type: ignore[override]  # TRL's arguments, which are not those of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the model card of the policy to the output directory (see [`~trainer.card.tuning_card`])."""
        if self.is_world_process_zero():
            more = (tags,) if isinstance(tags, str) else tuple(tags or ())
            card = tuning_card(self, model_name, dataset_name, more)
            write_text(Path(str(self.args.output_dir)) / "README.md", str(card))
