"""All imports from TRL that its documentation does not guarantee. If TRL moves something, this file breaks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trl.models import unwrap_model_for_generation
from trl.trainer.utils import print_prompt_completions_sample, use_adapter

from ..utils import printable


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
    from trl import GRPOTrainer

    class TrainerMixin(GRPOTrainer):
        """Base of mixins for a [`~trl.GRPOTrainer`]: narrowed types of inherited attributes."""

        args: Any
        eval_dataset: Any
        model: PreTrainedModel
        model_wrapped: nn.Module
        num_completions_to_print: int
        num_generations_eval: int
        state: Any
        train_dataset: Any
        _buffered_inputs: list[dict[str, Any]] | None  # type: ignore[assignment]  # TRL infers `None`
        _logs: dict[str, Any]
else:
    TrainerMixin = object

__all__ = [
    "TrainerMixin",
    "print_completions",
    "unwrapped_policy",
    "use_adapter",
]


def print_completions(prompts: list, completions: list, *args: Any, **kwargs: Any) -> None:
    """Prints TRL's table of responses, with control characters as escape sequences."""
    print_prompt_completions_sample(_printable(list(prompts)), _printable(list(completions)), *args, **kwargs)


def _printable(text: Any) -> Any:
    """Text or messages, with control characters as escape sequences."""
    if isinstance(text, str):
        return printable(text)
    if isinstance(text, list):
        return [_printable(one) for one in text]
    return {name: _printable(value) for name, value in text.items()} if isinstance(text, dict) else text


@contextmanager
def unwrapped_policy(
    model,
    accelerator,
    gather_deepspeed3_params: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
):
    """
    `unwrap_model_for_generation`, with three differences. It also restores hooks of ZeRO-3 and gradient checkpointing if an
    error is raised inside. Gradient checkpointing has the same kind afterwards, in every version of TRL. With gathered
    parameters, processes may run different numbers of forward passes, because DeepSpeed's comparison of the first passes
    is switched off.
    """
    failure, base = None, accelerator.unwrap_model(model)
    checkpointing = base.is_gradient_checkpointing
    with unwrap_model_for_generation(model, accelerator, gather_deepspeed3_params=gather_deepspeed3_params) as policy:
        coordinator = _coordinator(model) if gather_deepspeed3_params else None
        if coordinator is not None:
            coordinator.reset_step = lambda: None  # replaces the method; all other hooks are removed
        try:
            yield policy
        except BaseException as error:
            failure = error
        finally:
            if coordinator is not None:
                del coordinator.reset_step
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
    if failure is not None:
        raise failure


def _coordinator(model):
    """The object that fetches the parameters of a ZeRO-3 engine. `None` for other models."""
    optimizer = getattr(model, "optimizer", None)
    return getattr(getattr(optimizer, "parameter_offload", optimizer), "param_coordinator", None)
