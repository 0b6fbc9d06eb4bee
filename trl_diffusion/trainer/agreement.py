"""If one process fails, all processes raise an error instead of waiting for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import code_of
from ..rewards.call import check_rewards, is_asynchronous


def fail_together(accelerator: Accelerator, error: Exception | None, what: str) -> None:
    """
    Raises an error on every process if one process has an error. Every process must call it.

    Args:
        accelerator ([`~accelerate.Accelerator`]): connects the processes.
        error (`Exception`, *optional*): the error of this process, if any.
        what (`str`): what the processes were doing, for the message.

    Raises:
        Exception: `error` itself, on a process that has one.
        RuntimeError: on the other processes, with the processes that failed and their errors.
    """
    if accelerator.num_processes > 1:
        failed = accelerator.gather(torch.tensor([error is not None], device=accelerator.device))
        texts = gather_object([f"{type(error).__name__}: {error}"]) if failed.any() else []
    if error is not None:
        raise error
    if accelerator.num_processes > 1 and failed.any():
        reasons = "; ".join(f"process {rank}: {texts[rank]}" for rank in failed.nonzero().flatten().tolist())
        raise RuntimeError(f"{what} failed on another process, so this one stops too. {reasons}")


def failing_together(reward_func: Callable, name: str, accelerator: Accelerator) -> Callable:
    """
    Wraps a reward function. It raises on every process if, on one of them, it raises or returns invalid rewards.

    Args:
        reward_func (callable): a reward function, asynchronous or not.
        name (`str`): its name.
        accelerator ([`~accelerate.Accelerator`]): connects the processes.
    """
    what = f"The reward function {name!r}"

    def call(completions, **kwargs):
        rewards, failure = None, None
        try:
            with code_of(what):
                rewards = reward_func(completions=completions, **kwargs)
            check_rewards(rewards, len(completions), name)
        except Exception as error:
            failure = error
        fail_together(accelerator, failure, what)
        return rewards

    async def call_async(completions, **kwargs):
        rewards, failure = None, None
        try:
            with code_of(what):
                rewards = await reward_func(completions=completions, **kwargs)
            check_rewards(rewards, len(completions), name)
        except Exception as error:
            failure = error
        fail_together(accelerator, failure, what)
        return rewards

    return call_async if is_asynchronous(reward_func) else call
