"""GRPO for diffusion language models: dTRPO under TRL."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from ..decoding.config import DecodingConfig
from ..decoding.decode import check_prompts, decode
from ..decoding.pace import PeerFailed
from ..objectives.pairwise import differing_groups, make_pairs, pairwise_loss, same_responses
from ..offline.preferences import is_preference_dataset
from ..policies.attention import enable_plans
from ..policies.forward import check_attention, unwrap
from ..policies.limits import check_layers
from ..policies.loading import load_config, load_renamed_weights, resolve_spec
from ..policies.lora import check_adapter, check_adapters, check_targets, empty_model
from ..policies.prompts import check_visible
from ..policies.quantized import keep_trainable
from ..policies.spec import set_spec
from ..policies.training import (
    DROPS,
    check_trainable,
    random_settings,
    switch_off_dropout,
    switch_off_router_loss,
    train_padding_token,
)
from ..policies.trial import try_policy
from ..scoring.diagnostics import estimate_quality, ratio_statistics, summarise_ratios
from ..scoring.draws import expected_weights
from ..scoring.estimators import ESTIMATORS
from ..scoring.layout import PackedLayout, pack
from ..scoring.score import high_entropy, score
from ..seeds import derive_seed
from ..trajectories.dataset import OWN_COLUMNS, REWARD_PREFIX, from_rows, is_trajectory_dataset
from ..trajectories.trajectory import TrajectoryBatch, response_blocks, token_states
from ._trl import unwrapped_policy, use_adapter
from .agreement import fail_together, failing_together
from .checks import (
    check_number_of_rows,
    check_one_gpu,
    check_order_is_asked_for,
    check_reference_can_move,
    check_removed_columns,
    check_steps_made,
)
from .config import DTRPOConfig
from .data import OfflineData, count_epochs, stored_columns
from .evaluation import RowwiseEvaluation
from .metrics import How, Tally, add_over_processes
from .reference import FILE as REFERENCE
from .reference import load_reference, save_reference
from .resume import ExactResume
from .throughput import ThroughputCallback


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer
    from transformers.trainer_utils import TrainOutput

    from ..policies.spec import DiffusionSpec


logger = get_logger(__name__)

_TRAIN, _EVAL, _DRAWS, _CHECKS, _STORED, _CHOICE = range(6)  # random streams


def _missing_directories(path: str | Path) -> list[Path]:
    """The directories that have to be made for this one to exist, innermost first."""
    return [directory for directory in (Path(path), *Path(path).parents) if not directory.exists()]


def _leave_no_empty_directory(init):
    """A trainer that cannot be built takes back the output directory that transformers has made for it."""

    @wraps(init)
    def wrapped(self, *args, **kwargs):
        try:
            init(self, *args, **kwargs)
        except BaseException:
            for directory in getattr(self, "_new_directories", ()):
                with suppress(OSError):  # not empty, or gone
                    directory.rmdir()
            raise

    return wrapped


class DTRPOTrainer(ExactResume, RowwiseEvaluation, GRPOTrainer):
    r"""
    Trainer for dTRPO (dLLM Trajectory Reduction Policy Optimization, https://huggingface.co/papers/2603.18806), with the
    constructor, dataset format, reward functions and metrics of [`~trl.GRPOTrainer`].

    Responses are denoised block by block instead of written from left to right, and the order in which their tokens
    were unmasked is remembered. An update then scores one drawn decoding step of each block, all blocks in one packed
    forward pass, and weighs each scored token by the inverse of the probability that it was drawn. TRL's own loss does
    the rest, with these weights where it has a mask. Old log-probabilities are the ones recorded while decoding.

    Example:

    ```python
    from datasets import Dataset

    from trl_diffusion import DTRPOConfig, DTRPOTrainer, tiny_policy_path
    from trl_diffusion.rewards import sudoku

    puzzles = sudoku.generate(1000, seed=0)
    dataset = Dataset.from_list([{"prompt": sudoku.prompt(row["puzzle"]), **row} for row in puzzles])

    trainer = DTRPOTrainer(
        model=tiny_policy_path(),
        reward_funcs=sudoku.sudoku_solved,
        args=DTRPOConfig("sudoku", max_completion_length=17),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy: a path or hub id, or a model. Its config holds a [`DiffusionSpec`], or
            `args.diffusion_spec` gives one.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            As for [`~trl.GRPOTrainer`].
        args ([`DTRPOConfig`], *optional*):
            Configuration of this trainer.
        train_dataset, eval_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Must have a `prompt` column, standard or conversational; other columns reach the reward functions. Or a
            trajectory dataset (see [`collect`] and [`load_trajectories`]): nothing is generated then, and
            `reward_funcs` may be left out, for the stored rewards. Or, for `loss_type="dpo"`, a preference dataset.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. Loaded from where the model is by default.
        kwargs (`dict`):
            The other arguments of [`~trl.GRPOTrainer`], by name: `callbacks`, `optimizers`, `peft_config`, ...

    Raises:
        TypeError: if the model, the arguments or a dataset are of another type.
        ValueError: before anything is trained, if there is no reward function, a dataset is empty, has no `prompt`
            column, or fewer rows than a rollout takes, the stored rewards of each group are all the same, the policy has no
            mask token, or a prompt holds the mask token, is too long for the policy, made of unknown tokens alone, or dropped
            by the chat template.
    """

    _tag_names = ["trl", "trl-diffusion", "dtrpo"]
    _name = "dTRPO"

    # What the trainers below may lack, or hold in a wider type, is there.
    args: DTRPOConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    current_gradient_accumulation_steps: int
    _buffered_inputs: list[dict[str, Any]] | None  # type: ignore[assignment]  # TRL infers `None`

    @_leave_no_empty_directory
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
        if not isinstance(model, str | PreTrainedModel | PeftModel):
            raise TypeError(f"`model` must be a path, a hub id or a model, got {type(model).__name__}.")
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(
                    f"`{name}` is not supported: responses of a diffusion policy are denoised in one turn."
                )
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DTRPOConfig(f"{name.rstrip('/').split('/')[-1]}-DTRPO")
        if not isinstance(args, DTRPOConfig):
            raise TypeError(f"`args` must be a DTRPOConfig, got {type(args).__name__}.")
        offline = is_trajectory_dataset(train_dataset) or is_preference_dataset(train_dataset)
        if not reward_funcs and not offline:
            raise ValueError("No reward source provided: pass at least one reward function as `reward_funcs`.")
        for name, dataset in _named_datasets(train_dataset, eval_dataset):
            _check_columns(name, dataset)
        check_order_is_asked_for(args, [dataset for _, dataset in _named_datasets(train_dataset, eval_dataset)])
        # All that can be known before the weights are loaded.
        check_one_gpu(args)
        config = _load_config(model, args)
        if processing_class is None:
            processing_class = _load_tokenizer(model)
        is_processor = isinstance(processing_class, ProcessorMixin)
        tokenizer = processing_class.tokenizer if is_processor else processing_class
        spec = resolve_spec(config, args.spec_overrides(), tokenizer)
        has_adapter = isinstance(model, PeftModel) or kwargs.get("peft_config") is not None
        check_reference_can_move(args, has_adapter)
        if kwargs.get("peft_config") is not None:
            check_adapter(kwargs["peft_config"])
            check_targets(empty_model(config) if isinstance(model, str) else model, kwargs["peft_config"])
        if not isinstance(model, str):
            check_adapters(model)
        check_layers(config)

        store = None
        if offline:
            if args.rescore_old_log_probs:
                raise ValueError(
                    "`rescore_old_log_probs=True` is for fresh responses: another policy may have made stored ones."
                )
            changed = kwargs.get("quantization_config") is not None
            store = OfflineData(model, config, args, spec, tokenizer, reward_funcs, changed)
            train_dataset, eval_dataset = store.prepare(train_dataset, eval_dataset)
            reward_funcs = reward_funcs or store.reward_funcs
        elif args.precompute_ref_log_probs:
            raise ValueError(
                "`precompute_ref_log_probs=True` is for stored responses; these are generated as it goes."
            )
        check_number_of_rows(train_dataset, args, 0 if store is None else store.dropped.total())
        named = _named_datasets(train_dataset, eval_dataset)
        self._kept_columns = stored_columns(dataset for _, dataset in named)
        removed = check_removed_columns(named, reward_funcs, ["prompt", *self._kept_columns], args)
        self._reference_is_recorded = store is not None and store.reference_is_recorded
        self._is_recorded = store is None or store.recorded
        self._ref_estimates: dict[tuple[int, int], Tensor] = {}  # by epoch and row
        self._ref_epochs = 0

        if (
            args.beta != 0.0
            and not self._reference_is_recorded
            and not isinstance(model, str)
            and kwargs.get("peft_config") is None
        ):
            if not isinstance(model, PeftModel) and not model.config._name_or_path:
                raise ValueError(
                    "`beta` is not 0, so a reference is needed, which is loaded from where the policy was; but this model "
                    "was not loaded from anywhere. Save it and pass the path as `model`, or set `beta=0`."
                )

        self.estimator = ESTIMATORS[args.estimator]
        self._old_is_recorded = self.estimator.recorded and not args.rescore_old_log_probs
        self.scoring_config = args.scoring()
        self._layout: PackedLayout | None = None
        self._old: Tensor | None = None
        self._recorded: Tensor | None = None
        self._stored: list[tuple[dict[str, Any], int, int]] | None = None  # rows of this rollout, responses, epoch
        self._rollouts: TrajectoryBatch | None = None
        self._unscored: Tensor | None = None  # responses of this rollout that no function scored
        self._differing: Tensor | None = None  # those of groups in which not all rewards are the same
        self._learnt: bool | None = None  # whether a response of this run made a gradient; `None` before a rollout
        self.last_rollouts: TrajectoryBatch | None = None
        self._rollout_clock = (-1, 0)  # optimizer step, and rollouts so far in it
        beta = args.beta
        if self._reference_is_recorded:
            args.beta = 0.0  # so that no reference is loaded
        self._new_directories = _missing_directories(args.output_dir)
        try:
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        finally:
            args.beta = beta
        self.beta = beta
        check_attention(self.model)
        if self._tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has neither a padding token nor an end-of-text token. Set `tokenizer.pad_token`; which "
                "one does not matter, padding is never looked at."
            )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP version 1 cannot decode on sharded parameters. Set `fsdp_version: 2` in the config of accelerate "
                "(recipes/accelerate/fsdp2.yaml), or use DDP or DeepSpeed."
            )

        self._throughput = ThroughputCallback(self)
        self.add_callback(self._throughput)
        if self.accelerator.num_processes > 1:
            self.reward_funcs = [
                func
                if isinstance(func, nn.Module)
                else failing_together(cast("Callable", func), name, self.accelerator)
                for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
            ]
        self.spec = spec
        devices = set(getattr(unwrap(self.model), "hf_device_map", {}).values())
        if len(devices) > 1:
            raise ValueError(
                f"The policy is spread over {len(devices)} devices ({', '.join(sorted(map(str, devices)))}): its attention "
                "masks are on one of them. Start with `accelerate launch`, which gives each process one GPU, or load the "
                "model with device_map=None. A policy that does not fit on one GPU trains with ZeRO-3 or FSDP."
            )
        policies = [policy for policy in (self.model, self.ref_model) if policy is not None]
        for policy in policies:
            keep_trainable(policy)
        self._check_policies(spec, kwargs.get("optimizers", (None, None))[0])
        planned = [enable_plans(unwrap(policy)) for policy in policies]
        self._share_prompts = args.share_prompts and spec.attention == "block" and all(planned)
        # What ends a response here is what TRL calls terminated (before TRL 1.16 it knew the tokenizer's token only).
        self.eos_token_ids = list(spec.stop_token_ids)
        if self._tokenizer.eos_token_id not in spec.stop_token_ids:
            logger.warning(
                f"The policy stops at {list(spec.stop_token_ids)}, the tokenizer's end-of-text token is "
                f"{self._tokenizer.eos_token_id}. `clipped_ratio` and `mask_truncated_completions` may take finished "
                "responses for truncated ones."
            )
        self.aux_loss_enabled = False  # see `switch_off_router_loss`
        set_spec(self.model.config, spec)
        if self.ref_model is not None:
            set_spec(unwrap(self.ref_model).config, spec)  # an engine of DeepSpeed has a config of its own
        logger.info(f"Diffusion policy: {spec}")
        for name, dataset in _named_datasets(train_dataset, eval_dataset):
            self._check_prompts(name, dataset)
        if removed:
            logger.warning(
                f"`remove_unused_columns=True` removes the columns {removed}: a reward function that looks for them gets "
                "nothing."
            )
        if store is not None:
            store.report()

    def _check_policies(self, spec: DiffusionSpec, optimizer: Optimizer | None) -> None:
        """
        Makes policy and reference ready to be scored, and tries them on a few tokens. Where parameters will be shared among
        processes, they cannot be used yet, and are tried at the first pass.
        """
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        # Recorded and re-scored log-probabilities are compared: no dropout between them.
        dropout = random_settings(self.model, DROPS)
        if dropout:
            logger.warning(
                f"Dropout is switched off ({', '.join(f'{name}={value}' for name, value in dropout.items())}): the log-"
                "probabilities that decoding records are compared with those that an update computes."
            )
        balance = switch_off_router_loss(self.model)
        if balance:
            logger.warning(
                f"The load-balancing loss of the experts is off (the model's config has router_aux_loss_coef={balance}): it "
                "would count the copies of a packed row. In a long run, look at how evenly the experts are used."
            )
        for policy in (self.model, self.ref_model):
            if policy is not None:
                switch_off_dropout(policy)
                switch_off_router_loss(policy)
        train_padding_token(self.model)
        check_trainable(self.model, optimizer, run=whole)
        if whole:
            self._try(self.model, spec, training=True)
            if self.ref_model is not None:
                self._try(self.ref_model, spec)

    def _try(self, policy: nn.Module, spec: DiffusionSpec, training: bool = False) -> None:
        """Tries a policy in the ways in which this trainer runs it; done once."""
        cached = spec.attention == "block" or self.args.approximate_cache is not None
        try_policy(policy, spec, cached, training)

    # ------------------------------------------------------------------------------------------------- rollouts

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """Denoises a response for each prompt, or takes the stored one; what happened is kept for the rest of this
        rollout."""
        if self._stored is not None:
            self._rollouts = self._take(prompt_ids)
            return self._rollouts.completions(), self._rollouts.completion_logps()
        self._seeds = self._row_seeds(len(prompt_ids))
        with self._throughput.timed("rollout"):
            self._rollouts = self._decode(prompt_ids, self.args.decoding(), self._seeds)
        return self._rollouts.completions(), self._rollouts.completion_logps()

    def _calculate_rewards(self, inputs, prompts, completions, *args, **kwargs):
        """TRL's rewards, with a clock. They must be finite, or NaN where no function applies."""
        with self._throughput.timed("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)  # of all processes
        first = self.accelerator.process_index * len(prompts)
        own = rewards[first : first + len(prompts)]
        if rewards.isinf().any():
            failure = None
            if own.isinf().any():
                row, function = own.isinf().nonzero()[0].tolist()
                failure = ValueError(
                    f"The reward function {self.reward_func_names[function]!r} returned {own[row, function].item()} for the "
                    f"answer {completions[row]!r:.200} to {prompts[row]!r:.200}. A reward must be finite, or None where it "
                    "does not apply."
                )
            fail_together(self.accelerator, failure, "A reward function")
        self._unscored = own.isnan().all(1)
        if self.model.training:
            self._differing = differing_groups(rewards, self.num_generations)[first : first + len(prompts)]
        return rewards

    def _decode(self, prompt_ids: list[list[int]], decoding: DecodingConfig, seeds: list[int]) -> TrajectoryBatch:
        """Decodes on this process, `rollout_batch_size` at once, with the policy out of its wrappers."""
        sharded = self._decodes_sharded()
        failure: Exception | None = None
        batch: TrajectoryBatch | None = None
        with unwrapped_policy(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=not sharded,
            gradient_checkpointing_kwargs=cast("dict[str, Any] | None", self.args.gradient_checkpointing_kwargs),
        ) as policy:
            was_training = policy.training
            policy.eval()
            try:
                batch = decode(
                    policy, prompt_ids, decoding, self.spec, seeds, self.args.rollout_batch_size, keep_pace=sharded
                )
            except PeerFailed:
                pass  # the other process says what it was
            except Exception as error:
                failure = error
            finally:
                policy.train(was_training)
        fail_together(self.accelerator, failure, "Decoding")
        assert batch is not None  # or a process would have failed
        return batch

    def _decodes_sharded(self) -> bool:
        """Whether rollouts run on sharded parameters, so that processes have to run the same number of passes."""
        if isinstance(self.model_wrapped, FSDPModule):
            return True
        is_engine = self.model_wrapped is not self.model  # before training there is none yet
        return is_deepspeed_zero3_enabled() and is_engine and not self.args.ds3_gather_for_generation

    def answer(
        self, prompts: list, decoding: DecodingConfig | None = None, seed: int = 0
    ) -> tuple[list[str], TrajectoryBatch]:
        """
        Lets the policy, as it is now, answer some prompts. Processes share the work.

        Args:
            prompts (`list`): standard or conversational prompts, the same on every process.
            decoding ([`DecodingConfig`], *optional*): settings. Defaults to the rollouts' with temperature 0.
            seed (`int`, *optional*, defaults to `0`): source of randomness if there is a temperature.

        Returns:
            `tuple[list[str], TrajectoryBatch]`: the text of each answer, in the order of the prompts and the same on
            every process, and the trajectories of those that this process decoded.
        """
        decoding = self.args.decoding(temperature=0.0) if decoding is None else decoding
        prompts = list(prompts)  # a dataset's column is not one
        if not prompts:
            raise ValueError("There is no prompt to answer.")
        prompt_ids = self._tokenize_prompts(prompts)[0]
        seeds = [derive_seed(seed, row) for row in range(len(prompts))]
        # Every process has the same number of rows; the last ones wrap around.
        share = -(-len(prompts) // self.accelerator.num_processes)
        first = self.accelerator.process_index * share
        rows = [row % len(prompts) for row in range(first, first + share)]
        batch = self._decode([prompt_ids[row] for row in rows], decoding, [seeds[row] for row in rows])
        texts = self.processing_class.batch_decode(batch.completions(), skip_special_tokens=True)
        return gather_object(texts)[: len(prompts)], batch

    def _row_seeds(self, num_rows: int) -> list[int]:
        """
        One seed for each local row of this rollout: a function of the run's seed, the optimizer step and the row's
        place in the whole rollout, so it does not depend on the number of processes or on evaluations in between, and
        a resumed run repeats it.
        """
        step = self.state.global_step
        if self.evaluation is not None:  # a row's place in the whole evaluation, so batches do not matter either
            first = self.evaluation.first
            return [derive_seed(self.args.seed, _EVAL, step, first + row) for row in range(num_rows)]
        last_step, rollouts = self._rollout_clock
        rollouts = rollouts + 1 if last_step == step else 0
        self._rollout_clock = (step, rollouts)
        first = self.accelerator.process_index * num_rows
        return [derive_seed(self.args.seed, _TRAIN, step, rollouts, first + row) for row in range(num_rows)]

    def _generate_and_score_completions(self, inputs):
        """TRL's rollout, with the trajectories attached to its output: one row each, so that they are shuffled and
        split with it."""
        beta, self.beta = self.beta, 0.0  # the reference is asked later, about the states that are drawn
        try:
            if "event_steps" in inputs[0]:
                inputs = self._choose(inputs)
            with self._throughput.timed("sampling"):
                output = super()._generate_and_score_completions(inputs)
            rollouts = self._rollouts
            assert rollouts is not None  # TRL has called `_generate_single_turn`
            if self.model.training:
                self.last_rollouts = rollouts
            stored, unscored = self._stored, self._unscored
            assert unscored is not None  # TRL has called `_calculate_rewards`
        finally:
            self.beta = beta
            self._rollouts = self._stored = self._unscored = None
        draw_seeds = [derive_seed(seed, _DRAWS) for seed in self._seeds]
        output.update(
            canvas_ids=rollouts.canvas_ids,
            canvas_steps=rollouts.steps,
            canvas_logps=rollouts.logps,
            canvas_lengths=rollouts.canvas_lengths,
            draw_seeds=torch.tensor(draw_seeds, device=rollouts.canvas_ids.device),
        )
        if self.args.weighting == "none":
            output["expected_weight"] = self._expected_weight(output)
        if "old_per_token_logps" in output and not self._old_is_recorded:
            output["old_estimates"] = self._old_estimates(output)
        if self.loss_type == "dpo":  # where nobody scored, TRL's advantage is 0
            output["pair_scores"] = torch.where(unscored, torch.nan, output["advantages"])
        if stored is not None and self._ref_estimates and self.model.training:
            rows = [self._ref_estimates[epoch, row["row"]][index] for row, index, epoch in stored]
            output["ref_estimates"] = (
                pad_sequence([row.T for row in rows], batch_first=True).transpose(1, 2).to(rollouts.logps.device)
            )
        self._log_rollouts(rollouts)
        if self.model.training:
            self._note_gradient(output["completion_mask"].any(1))
        return self._group(output)

    # ------------------------------------------------------------------------------------------ stored responses

    def _choose(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Picks a stored response for each row of a rollout and leaves it in `self._stored`; a group with more responses
        than are asked for gives others in every epoch. Returns the rows as a prompt dataset would have them.
        """
        size = self.num_generations if self.model.training else self.num_generations_eval
        epoch = int(self.state.epoch or 0) if self.model.training else 0
        first = self.accelerator.process_index * len(inputs)
        self._stored, self._seeds, visible = [], [], []
        for place, row in enumerate(inputs, start=first):
            index = place % size
            count = len(row["canvas_lengths"])
            if count > size:
                generator = torch.Generator().manual_seed(derive_seed(self.args.seed, _CHOICE, epoch, row["row"]))
                index = int(torch.randperm(count, generator=generator)[index])
            self._stored.append((row, index, epoch))
            self._seeds.append(self._stored_seed(epoch, row["row"], index))
            visible.append(
                {
                    name: value[index] if name.startswith(REWARD_PREFIX) else value
                    for name, value in row.items()
                    if name not in OWN_COLUMNS
                }
            )
        return visible

    def _stored_seed(self, epoch: int, row: int, index: int) -> int:
        """Source of the draws of a stored response: another one in every epoch, the same in a resumed run."""
        return derive_seed(self.args.seed, _STORED, epoch, row, index)

    def _take(self, prompt_ids: list[list[int]]) -> TrajectoryBatch:
        """The stored responses as the rollout."""
        assert self._stored is not None  # `_choose` has left them
        for ids, (row, _, _) in zip(prompt_ids, self._stored, strict=True):
            if list(ids) != list(row["prompt_ids"]):
                raise ValueError(
                    f"Row {row['row']}: the tokenizer turns the prompt into other tokens than those it was answered with. "
                    "Use the tokenizer, chat template and `chat_template_kwargs` that the data was made with."
                )
        batch = from_rows([(row, index) for row, index, _ in self._stored], self.spec)
        return batch.to(self.accelerator.device)

    # ----------------------------------------------------------------------------------------------- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Trains the policy. With `resume_from_checkpoint=True` it goes on from the newest complete checkpoint in
        `output_dir`, and starts anew if there is none yet, so that a command that may be killed can just be given again.
        The other arguments are those of [`~transformers.Trainer.train`].

        Raises:
            ValueError: if another training is going on in `output_dir`, the checkpoint is damaged or lacks something, or a
                stream ended before its first rollout.
        """
        self._learnt = None
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        check_steps_made(self.state.global_step, cast("Dataset | IterableDataset", self.train_dataset), self.args)
        if self._learnt is False:
            logger.warning(
                "Nothing was learnt from the rewards: in every group all responses had the same one, or none could be "
                "compared. Look at `frac_reward_zero_std` and the rewards (docs/troubleshooting.md)."
            )
        return result

    def prepare_run(self) -> None:
        """Lets the reference score stored responses, if it is to do so before training."""
        if self.args.precompute_ref_log_probs and not self._reference_is_recorded:
            self._precompute_reference()

    def save_extra_files(self, checkpoint: Path) -> None:
        """Adds the reference, if it is one that moves."""
        if self.args.sync_ref_model:
            save_reference(unwrap(cast(nn.Module, self.ref_model)), checkpoint, self.args.should_save)

    def load_extra_files(self, checkpoint: Path) -> None:
        """The reference as it was at a checkpoint, if it is one that moves."""
        if self.args.sync_ref_model:
            load_reference(unwrap(cast(nn.Module, self.ref_model)), checkpoint)
        elif self.beta != 0.0 and Path(checkpoint, REFERENCE).is_file():
            logger.warning(
                f"{checkpoint} holds a reference that had moved; with `sync_ref_model=False` that of the start is used again."
            )

    def extra_state(self) -> dict[str, Any]:
        """Figures that were not logged yet, and the rollout that callbacks may draw."""
        rollouts = self.last_rollouts if self.inside_rollout() else None
        return {"tally": vars(self.tally), "last_rollouts": None if rollouts is None else vars(rollouts)}

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        self.tally = Tally(**state["tally"])
        if state["last_rollouts"] is not None:
            self.last_rollouts = TrajectoryBatch(**state["last_rollouts"]).to(self.accelerator.device)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_renamed(self, checkpoint: str | None) -> bool:
        """Loads a checkpoint under a family's own names, which transformers' trainer would pass over with a warning."""
        model = unwrap(self.model)
        if checkpoint is None or isinstance(model, PeftModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False  # these checkpoints have the model's names
        return load_renamed_weights(model, checkpoint)

    @torch.no_grad()
    def _precompute_reference(self) -> None:
        """The reference's estimates for every stored response and every draw that training will make of it."""
        rows = cast(Dataset, self.train_dataset)
        epochs = count_epochs(len(rows), self.args)
        if epochs <= self._ref_epochs:  # `train` was called before
            return
        processes = self.accelerator.num_processes
        # As many for every process, whatever they share; the last ones wrap around.
        own = [
            (self.accelerator.process_index + turn * processes) % len(rows)
            for turn in range(-(-len(rows) // processes))
        ]
        bar = tqdm(own, desc="reference", unit="prompt", disable=not self.accelerator.is_main_process)
        found = []
        for row in (rows[number] for number in bar):
            batch = from_rows([(row, index) for index in range(len(row["canvas_lengths"]))], self.spec)
            batch = batch.to(self.accelerator.device)
            for epoch in range(epochs):
                seeds = [self._stored_seed(epoch, row["row"], index) for index in range(len(batch))]
                passes = []
                for iteration in range(self.num_iterations):
                    draws = [derive_seed(derive_seed(seed, _DRAWS), iteration) for seed in seeds]
                    states = self.estimator.states(batch, self.spec, draws, self.scoring_config)
                    layout = pack(batch, self.spec, states, self.estimator.one_row, self._share_prompts)
                    passes.append(self._reference_logps(layout))
                found.append(((epoch, row["row"]), torch.stack(passes, 1).cpu()))
        self._ref_estimates, self._ref_epochs = dict(gather_object(found)), epochs
        if self.eval_dataset is None:
            self.ref_model = None

    def _group(self, output: dict[str, Any]) -> dict[str, Any]:
        """
        Tensors of shape `(R, ...)` as `(R / G, G, ...)` for groups of `G` responses to a prompt, so that TRL shuffles and
        splits groups instead of responses, and a batch can share prompts. As it was, if a batch does not hold groups.
        """
        size = self.num_generations
        if (
            not (self._share_prompts or self.loss_type == "dpo")
            or not self.model.training
            or self.args.per_device_train_batch_size % size
        ):
            return output
        return {key: value.unflatten(0, (-1, size)) if _is_rows(value) else value for key, value in output.items()}

    def _ungroup(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Undoes [`_group`]; always a copy."""
        if inputs["prompt_ids"].dim() == 2:
            return dict(inputs)
        return {key: value.flatten(0, 1) if _is_rows(value) else value for key, value in inputs.items()}

    @torch.no_grad()
    def _old_estimates(self, output: dict[str, Any]) -> Tensor:
        """
        What the policy of this rollout estimates for the states that each pass over it will draw, `(R, iterations, C)`;
        where the recording does not say.
        """
        size = self.args.per_device_train_batch_size
        rows = len(output["prompt_ids"])
        estimates = []
        for begin in range(0, rows, size):
            part = {k: v[begin : begin + size] if _is_rows(v) else v for k, v in output.items()}
            passes = []
            for iteration in range(self.num_iterations):
                with self._scoring(part, iteration) as layout:
                    passes.append(score(self.model, layout, self.spec, self.temperature)[0])
            estimates.append(torch.stack(passes, 1))
        return torch.cat(estimates)

    # -------------------------------------------------------------------------------------------------- scoring

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, compute_entropy=False, **kwargs
    ):
        """
        Log-probabilities of the scored tokens, 0 elsewhere.

        TRL calls this during a rollout for the old policy, whose log-probabilities are the recorded ones.
        """
        if self._layout is None:
            if self._rollouts is None:
                raise RuntimeError(
                    "Token ids alone have no log-probability under a diffusion policy: it depends on the order in which "
                    "they were unmasked. Use `trl_diffusion.scoring.score.score` on the states of a trajectory."
                )
            return _fit(self._rollouts.logps, logits_to_keep), None, None
        gradient = self.args.entropy_coef != 0.0 or self.args.use_adaptive_entropy
        logps, entropies = score(model, self._layout, self.spec, self.temperature, compute_entropy, gradient)
        if compute_entropy:  # the policy's own pass, not the reference's
            self._log_scores(logps.detach())
        entropies = None if entropies is None else _fit(entropies, logits_to_keep)
        return _fit(logps, logits_to_keep), entropies, None

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """
        The scored tokens that `top_entropy_quantile` keeps, of the tokens of all processes. `mask` holds the weights of
        the tokens, which TRL takes for 0 and 1.
        """
        entropies, weights = entropies.detach().float(), mask.float()
        local = (values[weights > 0] for values in (entropies, weights))
        pool = [
            self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=0, pad_index=-1.0))
            for values in local
        ]
        real = pool[1] > 0
        return high_entropy(entropies, weights, (pool[0][real], pool[1][real]), threshold)

    def _compute_loss(self, model, inputs):
        """TRL's loss with the weights of the scored tokens as its mask (docs/method.md, sections 2 and 5)."""
        inputs = self._ungroup(inputs)
        self._throughput.count(inputs["completion_mask"])
        width = inputs["completion_ids"].shape[1]
        per_rollout = cast(int, self.args.steps_per_generation)
        iteration = self._step // per_rollout % self.num_iterations if self.model.training else 0
        if self._check_is_due():
            self._check_estimator(inputs)
        with self._scoring(inputs, iteration) as layout:
            if self.beta != 0.0:
                reference = self._reference_estimates(inputs, layout, iteration)
                inputs["ref_per_token_logps"] = _fit(reference, width)
            if self.loss_type == "dpo":
                return self._finite(self._pairwise_loss(model, inputs, layout, reference))
            if self.args.weighting == "none":
                inputs["num_items_in_batch"] = inputs["expected_weight"]
            inputs["completion_mask"] = _fit(layout.weights, width)
            inputs.pop("old_per_token_logps", None)
            if self._old is not None:
                inputs["old_per_token_logps"] = _fit(self._old, width)
            if not self.estimator.recorded:  # what was recorded is of other states: nothing to compare the policy with
                inputs.pop("sampling_per_token_logps", None)
            return self._finite(super()._compute_loss(model, inputs))

    def _finite(self, loss: Tensor) -> Tensor:
        """The loss, if it is finite on every process."""
        failure = None
        if not torch.isfinite(loss):
            failure = FloatingPointError(
                f"The loss is {loss.item()} after {self.state.global_step} optimizer steps, so nothing more can be learnt. "
                "Look at the last logged `grad_norm`, `kl` and rewards; a lower `learning_rate` or `max_grad_norm`, or "
                "bf16 instead of fp16, may help."
            )
        fail_together(self.accelerator, failure, "The loss")
        return loss

    @contextmanager
    def _scoring(self, inputs: dict[str, Any], iteration: int = 0):
        """
        Draws the states that this pass over a rollout scores, and lays them out. Policy, old policy and reference share
        them. `self._old` is what the old policy estimates there, `None` if that is the policy as it is now.
        """
        self._try(self.model, self.spec, training=True)
        batch = _trajectories(inputs)
        seeds = [derive_seed(seed, iteration) for seed in inputs["draw_seeds"].tolist()]
        states = self.estimator.states(batch, self.spec, seeds, self.scoring_config)
        self._layout = pack(batch, self.spec, states, self.estimator.one_row, self._share_prompts)
        self._recorded = torch.where(states.weights > 0, batch.logps, 0.0)  # what is not scored has ratio 1
        if self._old_is_recorded:
            self._old = self._recorded
        else:
            self._old = inputs["old_estimates"][:, iteration] if "old_estimates" in inputs else None
        try:
            yield self._layout
        finally:
            self._layout = self._old = self._recorded = None

    def _pairwise_loss(self, model, inputs: dict[str, Any], layout: PackedLayout, reference: Tensor) -> Tensor:
        """`-log sigmoid` of the difference of log-ratios to the reference, better against worse response of a group."""
        logps, _ = score(model, layout, self.spec, self.temperature)
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        which = cast(Literal["best_worst", "all"], self.args.pair_selection)
        masked, scores = ~inputs["completion_mask"].any(1), inputs["pair_scores"]
        unscored = scores.isnan() & ~masked
        scores = torch.where(masked, torch.nan, scores).view(-1, size)
        pairs = make_pairs(scores, which, same_responses(inputs["completion_ids"], inputs["completion_mask"], size))
        lengths = _trajectories(inputs).completion_lengths if self.args.dpo_length_normalization else None
        log_ratios = ((logps - reference) * layout.weights).sum(1)
        loss, sums = pairwise_loss(log_ratios, pairs, self.beta, lengths)

        self._log_scores(logps.detach())
        kl = self.accelerator.reduce(ratio_statistics(reference - logps.detach(), layout.weights), reduction="sum")
        self._record("kl", summarise_ratios(kl)["kl_to_old"], kl[0].item())
        left_out = {
            "tied_groups": pairs.tied,
            "identical": pairs.identical,
            "unscored_responses": unscored.sum(),
            "truncated_responses": (masked & self._counted(len(masked))).sum(),
        }
        totals = add_over_processes(self.accelerator, *sums.values(), *left_out.values())
        *values, count = totals[: len(sums)]
        for name, value in zip(("chosen", "rejected", "margins", "accuracies"), values, strict=True):
            if count:
                self._record(f"rewards/{name}", value / count, count)
        how: How = "mean" if self.evaluation is None else "sum"  # of a batch, or of all of an evaluation
        self._record("pairs/count", count, how=how)
        for name, value in zip(left_out, totals[len(sums) :], strict=True):
            self._record(f"pairs/{name}", value, how=how)
        if training and count:
            self._learnt = True
        if self.evaluation is not None:
            self._tally_loss(loss, inputs)
        return loss / self.current_gradient_accumulation_steps if training else loss

    def _reference_estimates(self, inputs: dict[str, Any], layout: PackedLayout, iteration: int) -> Tensor:
        """What the reference estimates for the states of this pass: as recorded, as precomputed, or by a pass of its
        own."""
        if self._reference_is_recorded:
            return torch.where(layout.weights > 0, inputs["canvas_logps"], 0.0)
        if "ref_estimates" in inputs:
            return _fit(inputs["ref_estimates"][:, iteration], layout.weights.shape[1])
        return self._reference_logps(layout)

    @torch.no_grad()
    def _reference_logps(self, layout: PackedLayout) -> Tensor:
        """The reference's log-probabilities of the scored tokens: one forward pass on the policy's own states."""
        if self.ref_model is not None:
            self._try(self.ref_model, self.spec)
            return score(self.ref_model, layout, self.spec, self.temperature)[0]
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            raise ValueError(
                "The reference left memory when `precompute_ref_log_probs=True` had asked it about the rows of train_dataset. "
                "Give the trainer the other rows as `eval_dataset` when it is made, or make a new one for more epochs."
            )
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return score(self.model, layout, self.spec, self.temperature)[0]

    def _expected_weight(self, output: dict[str, Any]) -> Tensor:
        """What the weights of a draw sum to on average, over the rollouts of all processes."""
        tokens = token_states(self.spec, _trajectories(output))
        total = expected_weights(
            tokens, self.scoring_config.step_distribution, self.args.num_draws, self.args.num_scored_blocks
        )
        return self.accelerator.reduce(total.sum(), reduction="sum")

    # -------------------------------------------------------------------------------------------------- metrics

    def _log_rollouts(self, rollouts: TrajectoryBatch) -> None:
        """Shape of the trajectories of a rollout."""
        rows = self._counted(len(rollouts))
        counted = rollouts.completion_mask & rows[:, None]
        blocks = response_blocks(self.spec, rollouts.prompt_lengths, rollouts.canvas_ids.shape[1])
        pairs = torch.unique(
            torch.stack([counted.nonzero()[:, 0], blocks[counted], rollouts.steps[counted]]), dim=1
        ).shape[1]
        tokens, steps, responses = add_over_processes(self.accelerator, counted.sum(), pairs, rows.sum())
        self._record("diffusion/tokens_per_step", tokens / max(steps, 1), steps)
        self._record("diffusion/steps_per_response", steps / responses, responses)

    def _log_scores(self, logps: Tensor) -> None:
        """How the scored log-probabilities compare with the old policy's: those recorded while decoding, for estimators
        that score what was recorded (docs/method.md, section 4)."""
        assert self._layout is not None and self._recorded is not None  # inside `_scoring`
        weights = self._layout.weights
        scored, old = weights > 0, logps if self._old is None else self._old
        if self._is_recorded:
            self._record_ratios(self.accelerator.reduce(ratio_statistics(logps - old, weights), reduction="sum"))
        gap = torch.where(scored, (logps - self._recorded).abs(), 0.0)
        rows = self._counted(len(gap)).sum()
        total, tokens, responses = add_over_processes(self.accelerator, gap.sum(), scored.sum(), rows)
        self._record("diffusion/scored_tokens", tokens / responses, responses)
        if self.estimator.recorded and self._is_recorded:
            self._record("diffusion/recorded_gap/mean", total / max(tokens, 1), tokens)
            self._record("diffusion/recorded_gap/max", self.accelerator.gather(gap.max()).max().item(), how="max")

    def _note_gradient(self, counted: Tensor) -> None:
        """Remembers whether a response of this rollout makes a gradient; pairs say so themselves. `counted`, `(R,)`: those
        of this process that are not masked."""
        assert self._differing is not None  # TRL has called `_calculate_rewards`
        number = self.accelerator.reduce((self._differing & counted).sum(), reduction="sum").item()
        self._learnt = bool(self._learnt) or (number > 0 and self.loss_type != "dpo")

    def _check_is_due(self) -> bool:
        """Whether this is the first batch of an optimizer step at which the estimator is to be checked."""
        every = self.args.estimator_check_steps
        due = every is not None and self.model.training and self.state.global_step % every == 0
        return due and self._step % self.current_gradient_accumulation_steps == 0

    def _check_estimator(self, inputs: dict[str, Any]) -> None:
        """Logs how estimates compare with the exact log-ratio of a few trajectories."""
        batch = _trajectories(inputs).select(slice(0, self.args.estimator_check_size))
        seeds = [derive_seed(seed, _CHECKS) for seed in inputs["draw_seeds"][: len(batch)].tolist()]

        def log_ratios(layout: PackedLayout) -> Tensor:
            logps, _ = score(self.model, layout, self.spec, self.temperature)
            if self.beta != 0.0:
                return logps - self._reference_logps(layout)
            return logps - torch.where(layout.weights > 0, batch.logps, 0.0)

        quality = estimate_quality(log_ratios, batch, self.spec, self.scoring_config, seeds)
        self._record("diffusion/check/log_ratio", self.accelerator.gather(quality.exact).mean().item())
        for name in ("bias", "std", "correlation"):
            value = torch.tensor([getattr(quality, name)], device=batch.logps.device)
            value = self.accelerator.gather(value).nanmean().item()
            if value == value:
                self._record(f"diffusion/check/{name}", value)

    # --------------------------------------------------------------------------------------------------- checks

    def _set_signature_columns_if_needed(self):
        """TRL's columns, and those of stored responses; what else there is, is unused."""
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        columns += [name for name in self._kept_columns if name not in columns]

    def _check_prompts(self, name: str, dataset: Dataset | IterableDataset) -> None:
        """Finds prompts that the policy cannot take before anything is trained. A stream is checked as it comes."""
        if isinstance(dataset, IterableDataset):
            return
        forms: set = set()
        for begin in range(0, len(dataset), 1000):
            prompts = dataset[begin : begin + 1000]["prompt"]
            for row, prompt in enumerate(prompts, start=begin):
                _check_form(f"{name}: row {row}", prompt)
            prompt_ids = self._tokenize_prompts(prompts)[0]
            if prompts and not any(prompt_ids):
                raise ValueError(
                    f"{name}: the tokenizer turns every prompt into no tokens at all. If there is none beside the "
                    "model, transformers makes an empty one: pass the right one as `processing_class`."
                )
            try:
                check_prompts(prompt_ids, self.spec, self.model.config, self.max_completion_length)
            except ValueError as error:
                raise ValueError(f"{name}, rows {begin} to {begin + len(prompts) - 1}: {error}") from error
            try:
                check_visible(
                    self._tokenizer, prompts, prompt_ids, begin, forms, **cast(dict, self.chat_template_kwargs)
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def _check_form(where: str, prompt: Any) -> None:
    """Raises a `ValueError` if a prompt is neither text nor a list of messages with text."""
    if not prompt and not isinstance(prompt, int | float):
        raise ValueError(f"{where} has no prompt (it is {prompt!r}).")
    if isinstance(prompt, str):
        return
    messages = prompt if isinstance(prompt, list) else [prompt]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(prompt, list):
            raise ValueError(f"{where}: a prompt must be text or a list of messages, got {prompt!r}.")
        content = message.get("content")
        if message.get("role") is None or not isinstance(content, str | list):
            raise ValueError(f"{where}: a message must have a `role` and a `content`, got {message!r}.")
        if isinstance(content, list) and any(part.get("type") != "text" for part in content):
            raise ValueError(f"{where}: diffusion policies here take text only, got {message!r}.")


def _fit(values: Tensor, width: int) -> Tensor:
    """Pads or cuts the columns of a canvas tensor to the width of TRL's completion tensors."""
    return F.pad(values, (0, width - values.shape[1]))


def _is_rows(value: Any) -> bool:
    """Whether this entry of a batch has a row for each response (or group)."""
    return isinstance(value, Tensor) and value.dim() > 0


def _trajectories(inputs: dict[str, Any]) -> TrajectoryBatch:
    """The trajectories of a batch."""
    return TrajectoryBatch(
        prompt_ids=inputs["prompt_ids"],
        prompt_mask=inputs["prompt_mask"],
        canvas_ids=inputs["canvas_ids"],
        steps=inputs["canvas_steps"],
        logps=inputs["canvas_logps"],
        canvas_lengths=inputs["canvas_lengths"],
        completion_lengths=inputs["completion_mask"].long().sum(1),
    )


def _named_datasets(train_dataset, eval_dataset) -> list[tuple[str, Any]]:
    named = [("train_dataset", train_dataset)]
    if isinstance(eval_dataset, dict):
        named += [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    elif eval_dataset is not None:
        named.append(("eval_dataset", eval_dataset))
    return named


def _check_columns(name: str, dataset: Any) -> None:
    if dataset is None:
        raise ValueError(f"`{name}` is required.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a Dataset or an IterableDataset, got {type(dataset).__name__}.")
    columns = dataset.column_names
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    if columns is None:  # a stream that does not know its columns
        return
    if is_preference_dataset(dataset):
        return
    if "prompt" not in columns:
        raise ValueError(f"`{name}` has no `prompt` column; it has {sorted(columns)}.")
    images = sorted({"image", "images"} & set(columns))
    if images:
        raise ValueError(f"`{name}` has {images}: diffusion policies here take text only. Remove these columns.")
    taken = sorted({"prompts", "completions", "trainer_state", "log_extra", "log_metric"} & set(columns))
    if taken:
        raise ValueError(
            f"`{name}` has {taken}: reward functions get something else under these names. Rename the columns."
        )


def _load_tokenizer(model: str | PreTrainedModel | PeftModel) -> PreTrainedTokenizerBase:
    path = model if isinstance(model, str) else model.config._name_or_path
    if not path:
        raise ValueError(
            "The model was not loaded from anywhere, so its tokenizer is unknown: pass `processing_class`."
        )
    return AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")


def _load_config(model: str | PreTrainedModel | PeftModel, args: DTRPOConfig) -> PretrainedConfig:
    if not isinstance(model, str):
        return model.config
    known = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
    return load_config(model, **{key: value for key, value in args.model_options().items() if key in known})
