"""One process fails, and all of them say so, instead of waiting for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def fail_together(accelerator: Accelerator, error: Exception | None, what: str) -> None:
    """
    Must be called by every process. Does nothing if no process has an error.

    Args:
        accelerator ([`~accelerate.Accelerator`]): knows the processes.
        error (`Exception`, *optional*): what went wrong on this one.
        what (`str`): what the processes were doing, for the message.

    Raises:
        Exception: `error` itself where there is one.
        RuntimeError: on the other processes, naming the ones that failed and their errors.
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
    A reward function that raises on every process if it raises on one, or returns there what are not rewards.

    Args:
        reward_func (callable): a reward function, asynchronous or not.
        name (`str`): its name.
        accelerator ([`~accelerate.Accelerator`]): knows the processes.
    """
    what = f"The reward function {name!r}"

    def check(rewards, completions) -> None:
        if len(rewards) != len(completions):
            raise ValueError(f"{what} returned {len(rewards)} rewards for {len(completions)} completions.")
        for reward in rewards:
            if reward is not None:
                float(reward)

    def call(completions, **kwargs):
        rewards, failure = None, None
        try:
            rewards = reward_func(completions=completions, **kwargs)
            check(rewards, completions)
        except Exception as error:
            failure = error
        fail_together(accelerator, failure, what)
        return rewards

    async def call_async(completions, **kwargs):
        rewards, failure = None, None
        try:
            rewards = await reward_func(completions=completions, **kwargs)
            check(rewards, completions)
        except Exception as error:
            failure = error
        fail_together(accelerator, failure, what)
        return rewards

    asynchronous = inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(
        getattr(reward_func, "__call__", None)  # noqa: B004
    )
    return call_async if asynchronous else call
