"""Responses of a policy that is being trained. All processes take part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

from accelerate.utils import gather_object

from ..agreement import fail_together
from ..decoding.config import DecodingConfig
from ..decoding.decode import check_prompts, decode
from ..decoding.pace import PeerFailed
from ..policies.forward import unwrap
from ..seeds import derive_seed
from ..trajectories.trajectory import TrajectoryBatch
from ._trl import unwrapped_policy


if TYPE_CHECKING:
    from collections.abc import Callable

    from ..sft.trainer import DiffusionSFTTrainer
    from .rollouts import DiffusionRollouts

    Trainer: TypeAlias = DiffusionRollouts | DiffusionSFTTrainer


def decode_on_all(
    trainer: Trainer,
    prompt_ids: list[list[int]],
    decoding: DecodingConfig,
    seeds: list[int],
    batch_size: int | None,
    sharded: bool,
) -> TrajectoryBatch:
    """
    Decodes on this process with the policy of a trainer. Every process must call it.

    Args:
        trainer: the trainer.
        prompt_ids (`list[list[int]]`): token ids of the prompts.
        decoding ([`DecodingConfig`]): settings.
        seeds (`list[int]`): seed of each prompt.
        batch_size (`int`, *optional*): prompts that are decoded at once. All of them if `None`.
        sharded (`bool`): whether the parameters are sharded while decoding, so that all processes must run the same number of
            passes.
    """
    failure: Exception | None = None
    batch: TrajectoryBatch | None = None
    with unwrapped_policy(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=not sharded,
        gradient_checkpointing_kwargs=cast("dict[str, Any] | None", trainer.args.gradient_checkpointing_kwargs),
    ) as policy:
        was_training = policy.training
        policy.eval()
        try:
            batch = decode(policy, prompt_ids, decoding, trainer.spec, seeds, batch_size, keep_pace=sharded)
        except PeerFailed:
            pass  # the other process reports its error
        except Exception as error:
            failure = error
        finally:
            policy.train(was_training)
    fail_together(trainer.accelerator, failure, "Decoding")
    assert batch is not None  # otherwise a process would have failed
    return batch


def answer_together(
    trainer: Trainer,
    tokenizer: Any,
    prompt_ids: list[list[int]],
    decoding: DecodingConfig,
    seed: int,
    decode: Callable[[list[list[int]], DecodingConfig, list[int]], TrajectoryBatch],
) -> tuple[list[str], TrajectoryBatch]:
    """
    Responses to prompts that are the same on every process. Processes share the work.

    Args:
        trainer: the trainer.
        tokenizer: its tokenizer.
        prompt_ids (`list[list[int]]`): token ids of the prompts.
        decoding ([`DecodingConfig`]): settings.
        seed (`int`): seed of the random numbers.
        decode (`Callable`): decodes the prompts of this process.

    Returns:
        `tuple[list[str], TrajectoryBatch]`: the text of each response, in the order of the prompts and the same on every
        process, and the trajectories of the responses that this process decoded.
    """
    # Every process checks the prompts of all processes.
    check_prompts(prompt_ids, trainer.spec, unwrap(trainer.model).config, decoding.max_new_tokens)
    seeds = [derive_seed(seed, row) for row in range(len(prompt_ids))]
    # Every process has the same number of rows, so the last ones repeat the first ones.
    share = -(-len(prompt_ids) // trainer.accelerator.num_processes)
    first = trainer.accelerator.process_index * share
    rows = [row % len(prompt_ids) for row in range(first, first + share)]
    batch = decode([prompt_ids[row] for row in rows], decoding, [seeds[row] for row in rows])
    texts = tokenizer.batch_decode(batch.completions(), skip_special_tokens=True)
    return gather_object(texts)[: len(prompt_ids)], batch
