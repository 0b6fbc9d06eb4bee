"""Calling reward functions with TRL's signature, outside of a trainer: functions, asynchronous functions, reward models."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, TrainerState
from trl import apply_chat_template, is_conversational

from ..agreement import fail_together
from ..errors import code_of
from ..policies.files import check_records, check_weights
from ..policies.loading import refusing_code
from ..policies.places import check_there
from .named import REWARDS, check_different


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase


_OTHER_MODEL = "Use a reward model of a kind that transformers knows, or a function."

RewardFunc = Callable[..., Any] | PreTrainedModel | str


def is_asynchronous(function: Any) -> bool:
    """Whether calling it gives something to await."""
    call = getattr(function, "__call__", None)  # noqa: B004  (of an object, which may be asynchronous)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def check_rewards(rewards: Any, count: int, name: str) -> None:
    """Raises a `ValueError` unless there is one number, or `None`, for each of `count` responses."""
    returned, wanted = (
        f"The reward function {name!r} returned",
        "Return a list with a number, or None, for each completion.",
    )
    try:
        number = len(rewards)
    except TypeError:
        raise ValueError(f"{returned} {rewards!r:.80} for {count} completions. {wanted}") from None
    if number != count:
        raise ValueError(f"{returned} {number} rewards for {count} completions. {wanted}")
    for reward in rewards:
        try:
            if reward is not None:
                float(reward)
        except (TypeError, ValueError):
            raise ValueError(f"{returned} {reward!r:.80}, which is no number. {wanted}") from None


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


def as_stored(reward: Any, name: str, where: str) -> float | None:
    """
    A reward as it is stored. NaN is `None`: the function does not apply.

    Raises:
        ValueError: naming the function and `where`, if the reward is not finite in float32.
    """
    value = math.nan if reward is None else float(reward)
    if abs(value) > torch.finfo(torch.float32).max:
        raise ValueError(
            f"The reward function {name!r} returned {value} for {where}; rewards must be finite in float32. Return a smaller number, or "
            "None if the function does not apply."
        )
    return None if math.isnan(value) else value


def check_reward_model(path: str) -> None:
    """
    Checks that there is a reward model at a path or on the hub.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the text is the name of a reward function of this package, which has to be passed itself.
    """
    if path in REWARDS and not Path(path).exists():
        module = REWARDS[path].__module__
        raise ValueError(
            f"`reward_funcs` has the text {path!r}, and a text is the path of a reward model. Pass the function itself: "
            f"from {module} import {path}."
        )
    check_there(path)


@dataclass
class RewardCaller:
    """
    Reward functions of every kind that [`~trl.GRPOTrainer`] takes, called as it calls them.

    Args:
        reward_funcs: one or several: callables with TRL's signature, asynchronous or not; reward models
            (`AutoModelForSequenceClassification` with one label); paths or hub ids of such models.
        tokenizers (`list`, *optional*): of each reward function, its tokenizer if it is a model; loaded from where the model
            is by default.
        chat_template_kwargs (`dict`, *optional*): further arguments of the reward models' chat templates.

    Raises:
        ValueError: if there is no reward function, two have the same name, or there is not one tokenizer for each.
    """

    reward_funcs: Any
    tokenizers: list[PreTrainedTokenizerBase | None] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        several = isinstance(self.reward_funcs, list | tuple)
        self.reward_funcs = list(self.reward_funcs) if several else [self.reward_funcs]
        if not self.reward_funcs:
            raise ValueError("No reward function was given. Pass at least one as `reward_funcs`.")
        self.tokenizers = list(self.tokenizers) or [None] * len(self.reward_funcs)
        if len(self.tokenizers) != len(self.reward_funcs):
            raise ValueError(
                f"There are {len(self.reward_funcs)} reward functions but {len(self.tokenizers)} tokenizers."
            )
        self.names = [_name(function) for function in self.reward_funcs]
        check_different(self.names)
        for place, function in enumerate(self.reward_funcs):
            if isinstance(function, str):
                check_reward_model(function)
                check_records(function)
                check_weights(function)
                with refusing_code(f"The reward model {function}", _OTHER_MODEL):
                    self.reward_funcs[place] = AutoModelForSequenceClassification.from_pretrained(
                        function, num_labels=1, trust_remote_code=False
                    )
            if isinstance(self.reward_funcs[place], PreTrainedModel):
                self.tokenizers[place] = self._tokenizer(place)

    def _tokenizer(self, place: int) -> PreTrainedTokenizerBase:
        """The tokenizer of a reward model, with padding that the model knows."""
        model, tokenizer = self.reward_funcs[place], self.tokenizers[place]
        if tokenizer is None:
            path = model.config._name_or_path
            with refusing_code(f"The tokenizer of the reward model {path}", _OTHER_MODEL):
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        return tokenizer

    @classmethod
    def of(cls, reward_funcs: Any, chat_template_kwargs: dict[str, Any]) -> RewardCaller:
        """What calls reward functions, which may be a caller already."""
        if isinstance(reward_funcs, cls):
            return reward_funcs
        return cls(reward_funcs, chat_template_kwargs=chat_template_kwargs)

    def to(self, device: torch.device) -> RewardCaller:
        """Moves reward models to a device, in evaluation mode."""
        for function in self.reward_funcs:
            if isinstance(function, nn.Module):
                function.to(device).eval()
        return self

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], columns: dict[str, list]
    ) -> dict[str, list[Any]]:
        """
        Scores responses.

        Args:
            prompts (`list`): of each response, its prompt, as text or messages.
            completions (`list`): the responses, in the same form.
            completion_ids (`list[list[int]]`): their token ids.
            columns (`dict[str, list]`): the other columns of the prompts.

        Returns:
            `dict[str, list]`: by the name of the reward function, a number or `None` for each response.

        Raises:
            ValueError: if a function does not return one number, or `None`, for each response.
        """
        arguments = {
            "prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns,
            # Nothing is trained, so there is no state and no log; functions that ask for them get empty ones.
            "trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None,
        }  # fmt: skip
        rewards: dict[str, Any] = {}
        waiting = {}
        for name, function, tokenizer in zip(self.names, self.reward_funcs, self.tokenizers, strict=True):
            if isinstance(function, nn.Module):
                rewards[name] = self._ask_model(function, tokenizer, prompts, completions)
            elif is_asynchronous(function):
                waiting[name] = function
            else:
                with code_of(f"The reward function {name!r}"):
                    rewards[name] = function(**arguments)
        if waiting:
            with code_of(f"One of the reward functions {[*waiting]}"):
                rewards.update(asyncio.run(_gather(waiting, arguments)))
        for name, values in rewards.items():
            check_rewards(values, len(prompts), name)
        return {name: list(rewards[name]) for name in self.names}

    def _ask_model(self, model: nn.Module, tokenizer: Any, prompts: list, completions: list) -> list[float]:
        """The first logit of a reward model for prompt and response together."""
        if is_conversational({"prompt": prompts[0]}):
            pairs = [
                {"messages": prompt + completion} for prompt, completion in zip(prompts, completions, strict=True)
            ]
            texts = [apply_chat_template(pair, tokenizer, **self.chat_template_kwargs)["text"] for pair in pairs]
        else:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        inputs = tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        with torch.inference_mode():
            return model(**inputs.to(next(model.parameters()).device)).logits[:, 0].float().tolist()


async def _gather(functions: dict[str, Callable], arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs asynchronous functions at the same time."""
    found = await asyncio.gather(*(function(**arguments) for function in functions.values()))
    return dict(zip(functions, found, strict=True))


def _name(function: Any) -> str:
    """What a reward function is called in logs and columns, as in TRL."""
    if isinstance(function, str):
        return function.rstrip("/").split("/")[-1]
    if isinstance(function, PreTrainedModel):
        return function.config._name_or_path.rstrip("/").split("/")[-1]
    return getattr(function, "__name__", type(function).__name__)
