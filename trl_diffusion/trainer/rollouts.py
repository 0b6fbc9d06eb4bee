"""Rollouts of fresh responses, which the policy denoises, or of stored responses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled

from ..agreement import fail_together
from ..decoding.config import DecodingConfig
from ..fields import check_kind
from ..objectives.pairwise import differing_groups
from ..policies.prompts import as_prompts, is_started, tokenize_prompts
from ..scoring.draws import expected_weights
from ..scoring.states import states_to_draw
from ..seeds import CHOICE, DRAWS, EVALUATION, STORED, TRAINING, derive_seed
from ..trajectories.dataset import OWN_COLUMNS, REWARD_PREFIX, from_rows
from ..trajectories.revisions import NEVER
from ..trajectories.trajectory import TrajectoryBatch, steps_of_responses
from .answering import answer_together, decode_on_all
from .batches import columns_of, is_rows, trajectories_of
from .learning import Learning
from .metrics import add_over_processes
from .scored import DiffusionScoring


if TYPE_CHECKING:
    from .throughput import ThroughputCallback


class StoredResponse(NamedTuple):
    """
    A response of a trajectory dataset that a rollout uses.

    Attributes:
        row (`dict[str, Any]`): row of the dataset.
        place (`int`): number of the response in its row, from 0.
        epoch (`int`): number of passes of training over the dataset before this one.
    """

    row: dict[str, Any]
    place: int
    epoch: int

    def seed(self, seed: int) -> int:
        """Seed of the draws of this response. It differs in every epoch, and is the same in a resumed run."""
        return derive_seed(seed, STORED, self.epoch, self.row["row"], self.place)


@dataclass(frozen=True)
class Rollout:
    """
    The rollout in progress. TRL's hooks set its attributes, one after another.

    Attributes:
        stored (`list[StoredResponse]`, *optional*): the stored responses of the rollout. `None` for fresh ones.
        seeds (`tuple[int, ...]` of length `R`): seed of each response.
        trajectories ([`TrajectoryBatch`], *optional*): the responses, as soon as they exist.
        rewards (`Tensor` of shape `(R, F)`, *optional*): the reward of each response by each function, as soon as the
            functions were called. NaN where a function does not apply.
        differing (bool `Tensor` of shape `(R,)`, *optional*): in training, responses of groups whose rewards are not all
            the same.
    """

    stored: list[StoredResponse] | None = None
    seeds: tuple[int, ...] = ()
    trajectories: TrajectoryBatch | None = None
    rewards: Tensor | None = None
    differing: Tensor | None = None

    @property
    def unscored(self) -> Tensor:
        """Responses to which no reward function applies, bool, `(R,)`."""
        assert self.rewards is not None  # TRL has called `_calculate_rewards`
        return self.rewards.isnan().all(1)


@dataclass(frozen=True)
class Seen:
    """
    Responses of this process that callbacks can show.

    Attributes:
        trajectories ([`TrajectoryBatch`]): how they were denoised.
        scores (`dict[str, list[float]]`): under the name of each reward function, the rewards of the responses. Under
            `advantage`, their advantages.
        name (`str`, *optional*): prefix of their evaluation, such as `"eval"`. Empty for a rollout of training.
    """

    trajectories: TrajectoryBatch
    scores: dict[str, list[float]]
    name: str = ""

    def called(self, what: str) -> str:
        """The name under which `what` is logged: for example `eval/trajectory`, or in training `trajectory`."""
        return f"{self.name}/{what}" if self.name else what


class DiffusionRollouts(DiffusionScoring):
    """
    The rollouts of a [`~trl.GRPOTrainer`] for a diffusion policy. Each response is a row of every tensor of a rollout, so
    TRL shuffles and splits trajectories in the same way as its own tensors.

    Attributes:
        rollout ([`Rollout`], *optional*): the rollout in progress. `None` if there is none.
        seen ([`Seen`], *optional*): the last rollout of training on this process, with its rewards.
        seen_in_evaluation ([`Seen`], *optional*): the first batch of the last evaluation on this process, with its rewards.
        learning ([`Learning`]): counts of the rollouts of the run, and of those from which nothing could be learnt.
    """

    rollout: Rollout | None = None
    seen: Seen | None = None
    seen_in_evaluation: Seen | None = None

    num_generations: int
    _throughput: ThroughputCallback
    _rollout_clock: tuple[int, int] = (-1, 0)  # optimizer step, and rollouts so far in it
    learning: Learning

    @property
    def last_rollouts(self) -> TrajectoryBatch | None:
        """The last rollout of training on this process, if there was one."""
        return None if self.seen is None else self.seen.trajectories

    # ---------------------------------------------------------------------------------------------- TRL's hooks

    def _generate_and_score_completions(self, inputs):
        """TRL's rollout, with the trajectories in its output, one row for each response."""
        beta, self.beta = self.beta, 0.0  # the reference scores later, in the drawn states
        try:
            self.rollout = Rollout()
            if "event_steps" in inputs[0]:
                inputs = self._choose(inputs)
            with self._throughput.timed("sampling"):
                output = super()._generate_and_score_completions(inputs)
            rollout = self.rollout
        finally:
            self.beta, self.rollout = beta, None
        trajectories = rollout.trajectories
        assert trajectories is not None  # TRL has called the hooks below
        output.update(
            **columns_of(trajectories),
            draw_seeds=torch.tensor(
                [derive_seed(seed, DRAWS) for seed in rollout.seeds], device=trajectories.canvas_ids.device
            ),
        )
        if self.reference.recorded:
            # The number of processes whose responses another policy generated.
            (others,) = add_over_processes(self.accelerator, not self.reference.generated(rollout.stored))
            output["of_reference"] = torch.tensor(others == 0)
        if self.estimator.recorded:
            output["num_items_in_batch"] = self._total_weight(output)
        if "old_per_token_logps" in output and not self._old_is_recorded:
            output["old_estimates"] = self.old_estimates(output)
        if self.loss_type == "dpo":  # TRL gives responses without a reward the advantage 0
            output["pair_scores"] = torch.where(rollout.unscored, torch.nan, output["advantages"])
        self._log_trajectories(trajectories)
        self._keep_to_look_at(rollout, output["advantages"])
        if self.model.training:
            output.update(self.reference.precomputed(rollout.stored, trajectories))
            self._note_gradient(rollout, output["completion_mask"].any(1))
        return self._group(output)

    def _tokenize_prompts(self, prompts):
        """Token ids as in TRL. If a conversation ends with the beginning of a response, that turn is left open."""
        template = cast("dict[str, Any]", self.chat_template_kwargs)
        try:
            ids, *others = super()._tokenize_prompts(prompts)
        except (TemplateError, ValueError):
            tokenize_prompts(self._tokenizer, prompts, **template)  # its error names the prompt
            raise
        for row, prompt in enumerate(prompts):
            if is_started(prompt):
                (ids[row],) = tokenize_prompts(self._tokenizer, [prompt], **template)
        return ids, *others

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        """A response to each prompt, fresh or stored."""
        assert self.rollout is not None  # `_generate_and_score_completions` has begun one
        if self.rollout.stored is not None:
            trajectories = self._take(self.rollout.stored, prompt_ids)
        else:
            seeds = self.row_seeds(len(prompt_ids))
            self.rollout = replace(self.rollout, seeds=tuple(seeds))
            with self._throughput.timed("rollout"):
                trajectories = self.decode(prompt_ids, self.args.decoding(), seeds)
        self.rollout = replace(self.rollout, trajectories=trajectories)
        return trajectories.completions(), trajectories.completion_logps()

    def _calculate_rewards(self, inputs, prompts, completions, *args, **kwargs):
        """TRL's rewards. They must be finite, or NaN if no function applies."""
        assert self.rollout is not None
        with self._throughput.timed("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)  # of all processes
        first = self.accelerator.process_index * len(prompts)
        own = slice(first, first + len(prompts))
        if rewards.isinf().any():
            failure = self._infinite_reward(rewards[own], prompts, completions)
            fail_together(self.accelerator, failure, "A reward function")
        differing = differing_groups(rewards, self.num_generations)[own] if self.model.training else None
        self.rollout = replace(self.rollout, rewards=rewards[own], differing=differing)
        return rewards

    def _infinite_reward(self, rewards: Tensor, prompts: list, completions: list) -> ValueError | None:
        """The error for the first infinite reward of this process. `None` if there is none. `rewards`: `(R, F)`."""
        if not rewards.isinf().any():
            return None
        row, function = rewards.isinf().nonzero()[0].tolist()
        return ValueError(
            f"The reward function {self.reward_func_names[function]!r} returned {rewards[row, function].item()} for the "
            f"answer {completions[row]!r:.200} to {prompts[row]!r:.200}. A reward must be finite, or None where it does not "
            "apply."
        )

    # ------------------------------------------------------------------------------------------ fresh responses

    def decode(self, prompt_ids: list[list[int]], decoding: DecodingConfig, seeds: list[int]) -> TrajectoryBatch:
        """
        Decodes on this process, `rollout_batch_size` prompts at a time. Every process must call it.

        Args:
            prompt_ids (`list[list[int]]`): token ids of the prompts.
            decoding ([`DecodingConfig`]): settings.
            seeds (`list[int]`): seed of each prompt.
        """
        return decode_on_all(self, prompt_ids, decoding, seeds, self.args.rollout_batch_size, self._decodes_sharded())

    def _decodes_sharded(self) -> bool:
        """Whether rollouts run on sharded parameters, so that all processes must run the same number of passes."""
        if isinstance(self.model_wrapped, FSDPModule):
            return True
        is_engine = self.model_wrapped is not self.model  # before training there is no engine yet
        return is_deepspeed_zero3_enabled() and is_engine and not self.args.ds3_gather_for_generation

    def answer(
        self, prompts: str | list, decoding: DecodingConfig | None = None, seed: int = 0
    ) -> tuple[list[str], TrajectoryBatch]:
        """
        Generates responses to some prompts with the current policy. Processes share the work.

        Args:
            prompts (`str` or `list`): one or more prompts, as strings or conversations, the same on every process.
            decoding ([`DecodingConfig`], *optional*): settings. Defaults to those of the rollouts, with temperature 0.
            seed (`int`, *optional*, defaults to `0`): seed of the random numbers, used if there is a temperature.

        Returns:
            `tuple[list[str], TrajectoryBatch]`: the text of each response, in the order of the prompts and the same on every
            process, and the trajectories of the responses that this process decoded.
        """
        decoding = self.args.decoding(temperature=0.0) if decoding is None else decoding
        check_kind("decoding", decoding, DecodingConfig, "a DecodingConfig")
        prompts = as_prompts(prompts)
        prompt_ids = self._tokenize_prompts(prompts)[0]
        return answer_together(self, self._tokenizer, prompt_ids, decoding, seed, self.decode)

    def row_seeds(self, num_rows: int) -> list[int]:
        """
        One seed for each response of this process's part of a rollout. It depends on the seed of the run, the optimizer
        step and the place of the response in the whole rollout. It does not depend on the number of processes or on
        evaluations, and a resumed run repeats it.
        """
        step = self.state.global_step
        if self.evaluation is not None:  # place in the whole evaluation, so that the batches do not matter
            first = self.evaluation.first
            return [derive_seed(self.args.seed, EVALUATION, step, first + row) for row in range(num_rows)]
        last_step, rollouts = self._rollout_clock
        rollouts = rollouts + 1 if last_step == step else 0
        self._rollout_clock = (step, rollouts)
        first = self.accelerator.process_index * num_rows
        return [derive_seed(self.args.seed, TRAINING, step, rollouts, first + row) for row in range(num_rows)]

    # ----------------------------------------------------------------------------------------- stored responses

    def _choose(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Begins a rollout of stored responses, one for each row of `inputs`. If a stored group has more responses than are
        needed, each epoch draws some of them at random. Returns the rows in the form of a prompt dataset.
        """
        size = self.num_generations if self.model.training else self.num_generations_eval
        epoch = int(self.state.epoch or 0) if self.model.training else 0
        first = self.accelerator.process_index * len(inputs)
        stored, visible = [], []
        for place, row in enumerate(inputs, start=first):
            index = place % size
            count = len(row["canvas_lengths"])
            if count > size:
                generator = torch.Generator().manual_seed(derive_seed(self.args.seed, CHOICE, epoch, row["row"]))
                index = int(torch.randperm(count, generator=generator)[index])
            stored.append(StoredResponse(row, index, epoch))
            visible.append(
                {
                    name: value[index] if name.startswith(REWARD_PREFIX) else value
                    for name, value in row.items()
                    if name not in OWN_COLUMNS
                }
            )
        self.rollout = Rollout(stored, tuple(response.seed(self.args.seed) for response in stored))
        return visible

    def _take(self, stored: list[StoredResponse], prompt_ids: list[list[int]]) -> TrajectoryBatch:
        """The trajectories of stored responses."""
        for ids, (row, *_) in zip(prompt_ids, stored, strict=True):
            if list(ids) != list(row["prompt_ids"]):
                raise ValueError(
                    f"Row {row['row']}: the tokenizer gives other tokens for the prompt than those that are stored. Use the "
                    "tokenizer, chat template and `chat_template_kwargs` that the data was made with."
                )
        batch = from_rows([(row, index) for row, index, _ in stored], self.spec)
        return batch.to(self.accelerator.device)

    # ------------------------------------------------------------------------------------------------- one batch

    def _group(self, output: dict[str, Any]) -> dict[str, Any]:
        """
        Reshapes tensors from `(R, ...)` to `(R / G, G, ...)`, for groups of `G` responses to a prompt. TRL then shuffles and
        splits groups instead of responses, and a batch can share prompts. If a batch does not consist of whole groups, the
        tensors are returned unchanged.
        """
        size = self.num_generations
        if (
            not (self._share_prompts or self.loss_type == "dpo")
            or not self.model.training
            or self.args.per_device_train_batch_size % size
        ):
            return output
        return {key: value.unflatten(0, (-1, size)) if is_rows(value) else value for key, value in output.items()}

    def _total_weight(self, output: dict[str, Any]) -> Tensor:
        """Expected sum of the weights of the tokens of a rollout, over all processes. TRL divides some losses by it. With
        `weighting="unbiased"` it is the number of tokens that count."""
        tokens, config = (
            states_to_draw(trajectories_of(output), self.spec, self.scoring_config.selection),
            self.scoring_config,
        )
        total = tokens.counted.sum()
        if config.weighting == "none":
            total = expected_weights(tokens, config.step_distribution, config.num_draws, config.num_blocks).sum()
        return self.accelerator.reduce(total, reduction="sum")

    def _note_gradient(self, rollout: Rollout, counted: Tensor) -> None:
        """Records whether a response of this rollout has a gradient. With `loss_type="dpo"`, `_pairwise_loss` records this.
        `counted`, `(R,)`: responses of this process that are not masked."""
        assert rollout.differing is not None  # TRL has called `_calculate_rewards`
        number = self.accelerator.reduce((rollout.differing & counted).sum(), reduction="sum").item()
        self.learning.learnt |= number > 0 and self.loss_type != "dpo"
        self.learning.note(number, lambda: self._why_idle(rollout))

    def _why_idle(self, rollout: Rollout) -> str:
        """Why no response of a rollout has an advantage."""
        assert rollout.trajectories is not None and rollout.differing is not None
        answers, stops = rollout.trajectories.completions(), set(self.spec.stop_token_ids)
        prompts = [tuple(ids) for ids in rollout.trajectories.prompt_ids.tolist()]
        written = sum(not set(ids) <= stops for ids in answers)
        different = len({(prompt, *ids) for prompt, ids in zip(prompts, answers, strict=True)}) - len(set(prompts))
        any_written, any_different, any_scored, any_differing = add_over_processes(
            self.accelerator, written, different, (~rollout.unscored).sum(), rollout.differing.sum()
        )
        if not any_written:
            return "every response is empty. Does the policy know prompts of this form?"
        if not any_different:
            return "all responses to a prompt are the same. A higher `temperature` makes them differ."
        if not any_scored:
            return "no reward function applies to any response (`None`, or NaN)."
        if any_differing:
            return "all responses are cut off, and `mask_truncated_completions` masks them. Raise `max_completion_length`."
        return (
            "all responses to a prompt have the same reward. Easier prompts help, or a reward that also tells wrong responses "
            "apart."
        )

    def _keep_to_look_at(self, rollout: Rollout, advantages: Tensor) -> None:
        """Keeps a rollout of training, or the first batch of an evaluation, so that callbacks can show it."""
        assert rollout.trajectories is not None and rollout.rewards is not None
        columns = zip(self.reward_func_names, rollout.rewards.T.tolist(), strict=True)
        seen = Seen(rollout.trajectories, {**dict(columns), "advantage": advantages.tolist()})
        if self.evaluation is None:
            if self.model.training:
                self.seen = seen
        elif self.evaluation.is_first_batch:
            count = int(self.evaluation.counted.sum())
            scores = {name: values[:count] for name, values in seen.scores.items()}
            self.seen_in_evaluation = Seen(seen.trajectories.select(slice(count)), scores, self.evaluation.name)

    def _log_trajectories(self, trajectories: TrajectoryBatch) -> None:
        """Records metrics about the trajectories of a rollout."""
        rows = self._counted(len(trajectories))
        if trajectories.revisions is not None:
            revised = (trajectories.revisions.steps != NEVER) & rows[:, None]
            taken_back, responses = add_over_processes(self.accelerator, revised.sum(), rows.sum())
            self._record("diffusion/taken_back", taken_back / max(responses, 1), responses)
        tokens, steps, responses = add_over_processes(
            self.accelerator,
            (trajectories.completion_lengths * rows).sum(),
            (steps_of_responses(self.spec, trajectories) * rows).sum(),
            rows.sum(),
        )
        self._record("diffusion/tokens_per_step", tokens / max(steps, 1), steps)
        self._record("diffusion/steps_per_response", steps / responses, responses)
