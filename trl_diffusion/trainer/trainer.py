"""The trainer: dTRPO, as a subclass of TRL's `GRPOTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOTrainer

from ..agreement import fail_together
from ..objectives.pairwise import Pairs, Responses, make_pairs, pairwise_loss, same_responses
from ..policies.forward import unwrap
from ..policies.whole import only_whole_models
from ..scoring.diagnostics import ratio_statistics, summarise_ratios
from ..scoring.estimators import ESTIMATORS, counted_tokens
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import write_text
from .batches import is_rows, trajectories_of, ungroup
from .callbacks import log_trajectories
from .card import PAPER, model_card
from .checks import check_callback, check_steps_made
from .config import DTRPOConfig
from .data import check_given
from .health import HealthCallback, signs_of
from .learning import Learning
from .metrics import How, Tally, add_over_processes
from .policy_files import PolicyFiles
from .reference import FILE as REFERENCE
from .reference import Reference, load_reference, save_reference
from .resume import ExactResume
from .rollouts import DiffusionRollouts, Seen
from .setup import make_ready, set_up
from .throughput import ThroughputCallback


if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput


logger = get_logger(__name__)


class DTRPOTrainer(PolicyFiles, ExactResume, DiffusionRollouts, GRPOTrainer):
    r"""
    Trainer for dTRPO (dLLM Trajectory Reduction Policy Optimization, https://huggingface.co/papers/2603.18806). It has the
    constructor, dataset format, reward functions and metrics of [`~trl.GRPOTrainer`].

    Responses are denoised block by block, instead of generated from left to right. The order in which their tokens were
    unmasked is recorded. An update draws one denoising step of each block, and scores its tokens, for all blocks in one
    packed forward pass. The weight of a scored token is one divided by the probability that its step was drawn. The loss
    is TRL's own, with these weights in place of its mask. The old log-probabilities are those recorded while decoding.

    Example:

    ```python
    from datasets import Dataset

    from trl_diffusion import DTRPOConfig, DTRPOTrainer, tiny_policy_path
    from trl_diffusion.rewards import sudoku

    puzzles = sudoku.generate(1000, seed=0)
    rows = [{"prompt": sudoku.prompt(row["puzzle"]), **row} for row in puzzles]

    trainer = DTRPOTrainer(
        model=tiny_policy_path(),
        reward_funcs=sudoku.sudoku_solved,
        args=DTRPOConfig("sudoku", max_completion_length=17),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy: a path, a hub id, or a model. The [`DiffusionSpec`] is in its config or in
            `args.diffusion_spec`.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            As for [`~trl.GRPOTrainer`].
        args ([`DTRPOConfig`], *optional*):
            Configuration of this trainer.
        train_dataset, eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            A prompt dataset, a trajectory dataset (see [`collect`] and [`load_trajectories`]), or, for
            `loss_type="dpo"`, a preference dataset. A prompt dataset has a `prompt` column, standard or conversational.
            Its other columns are passed to the reward functions. With a trajectory dataset nothing is generated. Its
            stored rewards are used if there are no `reward_funcs`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. By default, it is loaded from the path or hub id of the model.
        kwargs (`dict`):
            The other arguments of [`~trl.GRPOTrainer`], by name: `callbacks`, `optimizers`, `peft_config`, ...

    Raises:
        TypeError: if the model, the arguments or a dataset have an unsupported type.
        ValueError: before any training, in these cases:

            - There is no reward function.
            - A dataset is empty, has no `prompt` column, or has fewer rows than one rollout needs.
            - In every group, all stored rewards are equal.
            - The policy has no mask token.
            - A prompt holds the mask token, is too long for the policy, consists only of unknown tokens, or is dropped by
              the chat template.
    """

    _tag_names = ["trl", "trl-diffusion", "dtrpo"]
    _name = "dTRPO"
    _paper = PAPER

    # Narrowed types of inherited attributes.
    args: DTRPOConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    current_gradient_accumulation_steps: int
    _buffered_inputs: list[dict[str, Any]] | None  # type: ignore[assignment]  # TRL infers `None`

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs=None,
        args: DTRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        setup = set_up(model, reward_funcs, args, (train_dataset, eval_dataset), processing_class, kwargs)
        args = setup.args
        self.spec = setup.spec
        self.estimator = ESTIMATORS[args.estimator]
        self.scoring_config = args.scoring()
        self.reference = Reference(self, setup.maker)
        self._kept_columns = setup.kept_columns
        self.learning = Learning()
        self._is_recorded = setup.store is None or setup.store.recorded
        self._old_is_recorded = self.estimator.recorded and not args.rescore_old_log_probs
        beta = args.beta
        if self.reference.recorded:
            args.beta = 0.0  # so that no reference is loaded
        try:
            with only_whole_models():
                super().__init__(
                    model=model,
                    reward_funcs=setup.reward_funcs,
                    args=args,
                    train_dataset=setup.datasets[0],
                    eval_dataset=setup.datasets[1],
                    processing_class=setup.processing_class,
                    **kwargs,
                )
        finally:
            args.beta = beta
        self.beta = beta
        self._throughput = ThroughputCallback(self)
        self.add_callback(self._throughput)
        self.add_callback(HealthCallback(signs_of(args.loss_type, online=setup.store is None)))
        if args.log_trajectories:
            log_trajectories(self, args.log_trajectories)
        make_ready(self, setup, kwargs.get("optimizers", (None, None))[0])

    def _set_signature_columns_if_needed(self):
        """Keeps TRL's columns and those of stored responses. All other columns are unused."""
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        columns += [name for name in self._kept_columns if name not in columns]

    # ------------------------------------------------------------------------------------------------- the loss

    def _compute_loss(self, model, inputs):
        """TRL's loss, with the weights of the scored tokens in place of its mask (docs/method.md, sections 2 and 5)."""
        inputs = ungroup(inputs)
        self._throughput.count(inputs["completion_mask"])
        per_rollout = cast(int, self.args.steps_per_generation)
        iteration = self._step // per_rollout % self.num_iterations if self.model.training else 0
        self.check_estimator(inputs)
        if self.loss_type == "dpo":
            return self._finite(self._pairwise_loss(model, inputs, iteration))
        with self.scoring(inputs, iteration) as scored:
            layout = scored.layout
            if self.beta != 0.0:
                inputs["ref_per_token_logps"] = self.reference.of_batch(inputs, layout, iteration)
            # TRL's loss gets all writes: tokens after the completion and tokens that were taken back may count, too.
            inputs["completion_ids"], inputs["completion_mask"] = trajectories_of(inputs).event_ids, layout.weights
            for name in ("old_per_token_logps", "sampling_per_token_logps"):
                inputs.pop(name, None)
            if scored.old is not None:
                inputs["old_per_token_logps"] = scored.old
            if self.estimator.recorded:  # the other estimators score other states than the recorded ones
                inputs["sampling_per_token_logps"] = scored.recorded
            return self._finite(super()._compute_loss(model, inputs))

    def _pairwise_loss(self, model, inputs: dict[str, Any], iteration: int) -> Tensor:
        """The pairwise loss of better and worse responses of a group (docs/method.md, section 5)."""
        training = self.model.training
        pairs, left_out = self._pairs(inputs)
        if training:  # responses without a pair are left out; an evaluation keeps them for its metrics
            used, pairs = pairs.used()
            inputs = {key: value[used] if is_rows(value) else value for key, value in inputs.items()}
        with self.scoring(inputs, iteration) as scored:
            weights = scored.layout.weights
            logps, _ = self.score_policy(model)
            log_ratios = None
            if self.beta != 0.0:
                reference = self.reference.of_batch(inputs, scored.layout, iteration)
                log_ratios = ((logps - reference) * weights).sum(1)
                ratios = ratio_statistics(reference - logps.detach(), weights)
                kl = self.accelerator.reduce(ratios, reduction="sum")
                self._record("kl", summarise_ratios(kl)["kl_to_old"], kl[0].item())
        lengths = counted_tokens(trajectories_of(inputs), self.spec, self.scoring_config)
        responses = Responses((logps * weights).sum(1), log_ratios, lengths)
        loss, sums = pairwise_loss(responses, pairs, self.args.pairwise())

        figures: dict[str, Tensor | float] = {**sums, "pairs/count": len(pairs.chosen), **left_out}
        totals = dict(zip(figures, add_over_processes(self.accelerator, *figures.values()), strict=True))
        count = totals["pairs/count"]
        how: How = "mean" if self.evaluation is None else "sum"  # of counts: per batch, or over an evaluation
        for name, value in totals.items():
            if name not in sums:
                self._record(name, value, how=how)
            elif count:
                self._record(name, value / count, count)
        if training and count:
            self.learning.learnt = True
        if self.evaluation is not None:
            self._tally_loss(loss, inputs)
        return loss / self.current_gradient_accumulation_steps if training else loss

    def _pairs(self, inputs: dict[str, Any]) -> tuple[Pairs, dict[str, float]]:
        """Returns the pairs of a batch, and metrics by name: how many groups, pairs and responses were left out."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        which = cast(Literal["best_worst", "all"], self.args.pair_selection)
        masked, scores = ~inputs["completion_mask"].any(1), inputs["pair_scores"]
        unscored = scores.isnan() & ~masked
        scores = torch.where(masked, torch.nan, scores).view(-1, size)
        pairs = make_pairs(scores, which, same_responses(inputs["completion_ids"], inputs["completion_mask"], size))
        return pairs, {
            "pairs/tied_groups": pairs.tied,
            "pairs/identical": pairs.identical,
            "pairs/unscored_responses": unscored.sum().item(),
            "pairs/truncated_responses": (masked & self._counted(len(masked))).sum().item(),
        }

    def _finite(self, loss: Tensor) -> Tensor:
        """Returns the loss, after a check that it is finite on every process."""
        failure = None
        if not torch.isfinite(loss):
            failure = FloatingPointError(
                f"The loss is {loss.item()} after {self.state.global_step} optimizer steps, so nothing more can be learnt. "
                "Look at the last logged `grad_norm`, `kl` and rewards; a lower `learning_rate` or `max_grad_norm`, or "
                "bf16 instead of fp16, may help."
            )
        fail_together(self.accelerator, failure, "The loss")
        return loss

    # ----------------------------------------------------------------------------------------------- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains the policy. With `resume_from_checkpoint=True` it continues from the newest complete checkpoint in
        `output_dir`, or starts from the beginning if there is none. A command that was killed can therefore be given
        again unchanged. The other arguments are those of [`~transformers.Trainer.train`].

        Raises:
            ValueError: if another training uses `output_dir`, if the processes do not share it, if the checkpoint is damaged
                or incomplete, or if a stream ended before its first rollout.
        """
        self.learning = Learning()
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        check_steps_made(self.state.global_step, cast("Dataset | IterableDataset", self.train_dataset), self.args)
        if (said := self.learning.summary()) is not None:
            logger.warning(said)
        return result

    def get_eval_dataloader(self, eval_dataset=None):
        """The dataloader of an evaluation. Stored responses that only this evaluation is given are checked."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            size = unwrap(self.model).config.get_text_config().vocab_size
            check_given("eval_dataset", eval_dataset, self.spec, size, self.processing_class)
        return super().get_eval_dataloader(eval_dataset)

    def add_callback(self, callback) -> None:
        """
        Adds a callback.

        Raises:
            ValueError: if it is a callback of TRL that generates from left to right.
        """
        check_callback(callback)
        super().add_callback(callback)

    def create_model_card(  # type: ignore[override]  # TRL's arguments, which are not those of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the model card of the policy to the output directory (see [`model_card`])."""
        if self.is_world_process_zero():
            more = (tags,) if isinstance(tags, str) else tuple(tags or ())
            write_text(Path(self.args.output_dir) / "README.md", str(model_card(self, model_name, dataset_name, more)))

    def prepare_run(self) -> None:
        """With `precompute_ref_log_probs`, scores all stored responses with the reference."""
        if self.args.precompute_ref_log_probs and not self.reference.recorded:
            self.reference.precompute()

    def save_extra_files(self, checkpoint: Path) -> None:
        """Adds the reference, if it changes during training."""
        if self.args.sync_ref_model:
            save_reference(unwrap(cast(nn.Module, self.ref_model)), checkpoint, self.args.should_save)

    def load_extra_files(self, checkpoint: Path) -> None:
        """Restores the reference of a checkpoint, if it changes during training."""
        if self.args.sync_ref_model:
            load_reference(unwrap(cast(nn.Module, self.ref_model)), checkpoint)
        elif self.beta != 0.0 and Path(checkpoint, REFERENCE).is_file():
            logger.warning(
                f"{checkpoint} holds a reference that was updated during training. It is not loaded, because "
                "`sync_ref_model` is now False: the initial reference is used."
            )

    def extra_state(self) -> dict[str, Any]:
        """Metrics that were not logged yet, and the current rollout, which callbacks may plot."""
        seen = self.seen if self.inside_rollout() else None
        return {
            "tally": vars(self.tally),
            "last_rollouts": None if seen is None else seen.trajectories.to_dict(),
            "scores": None if seen is None else seen.scores,
        }

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        self.tally = Tally(**state["tally"])
        if state["last_rollouts"] is not None:
            trajectories = TrajectoryBatch.from_dict(state["last_rollouts"]).to(self.accelerator.device)
            self.seen = Seen(trajectories, state.get("scores") or {})
