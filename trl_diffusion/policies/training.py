"""What training needs of a policy: something to train, every embedding trained, and no dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .attention import backbone
from .forward import unwrap
from .lora import adapters


# Parts of the names that modules and configs give to what training does at random: probabilities of dropping something, and
# noise, which some routers look at in evaluation mode, too, so that it is not switched off.
DROPS, RANDOM = ("drop",), ("drop", "jitter", "noise")
NOT_HERE = ("classifier", "summary")  # of heads that a causal model does not have


def switch_off_dropout(model: nn.Module) -> None:
    """
    Has a model drop nothing in training mode: dropout layers of any class, probabilities that modules hand to functions
    (`attention_dropout`, `residual_dropout`, `layerdrop`), and those of adapters. The config, which is saved, stays as it is.
    """
    for module in model.modules():
        if "drop" in type(module).__name__.lower() and isinstance(getattr(module, "p", None), float):
            vars(module)["p"] = 0.0
        for name, value in vars(module).items():
            if not any(part in name for part in DROPS):
                continue
            if isinstance(value, float):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):  # of PEFT, by the names of adapters
                value.update({adapter: 0.0 for adapter, number in value.items() if isinstance(number, float)})


def random_settings(model: nn.Module, parts: tuple[str, ...] = RANDOM) -> dict[str, float]:
    """What the config of a model and those of its adapters say about dropout and noise, other than 0, by name."""
    configs = [backbone(model).config.get_text_config().to_dict(), *map(vars, adapters(model).values())]
    return {
        name: value
        for config in configs
        for name, value in config.items()
        if any(part in name for part in parts)
        and not any(part in name for part in NOT_HERE)
        and isinstance(value, float)
        and value
    }


def switch_off_router_loss(model: nn.Module) -> float:
    """
    Has a mixture of experts return no router logits, of which its load-balancing loss is made: that loss would count the
    noisy copies of a packed row, and it cannot read a mask of our own.

    Returns:
        `float`: the coefficient that the config has for the loss; 0 if the policy is no mixture of experts.
    """
    config = backbone(model).config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return 0.0
    config.output_router_logits = False
    return getattr(config, "router_aux_loss_coef", None) or 0.0


def gather_experts_at_once(model: nn.Module) -> None:
    """
    Under ZeRO-3, has DeepSpeed gather the experts of a layer together. The processes use different experts, and DeepSpeed
    otherwise stops, since it wants the same order of modules on all of them. Call it before DeepSpeed gets the model.
    """
    if not is_deepspeed_zero3_enabled():
        return
    for name, module in model.named_modules():
        shapes = (getattr(weight, "ds_shape", weight.shape) for weight in module.parameters(recurse=False))
        if name.endswith("experts") and any(len(shape) == 3 for shape in shapes):
            module._z3_leaf = True  # as deepspeed.utils.set_z3_leaf_modules does for all modules of a class


def train_padding_token(model: nn.Module) -> None:
    """
    Lets the embedding of the padding token have a gradient, which transformers takes from it (`padding_idx`). A diffusion
    policy often pads with its end-of-text token, which is trained like any other; what only pads has no gradient anyway.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def check_trainable(model: nn.Module, optimizer: Optimizer | None = None, run: bool = True) -> None:
    """
    Checks that there is something to train.

    Args:
        model (`nn.Module`): the policy.
        optimizer (`Optimizer`, *optional*): the one that will train it, if it is there already.
        run (`bool`, *optional*, defaults to `True`): whether to look at a pass of a few tokens, which shows which parameters
            take part; parameters of adapters that are not active, or merged, do not.

    Raises:
        ValueError: if no parameter is trainable, none of those that are takes part, or the optimizer holds none of these.
    """
    trainable = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        how = "`requires_grad` is False for all of them. Set it for those to be trained, or pass a `peft_config`."
        if adapters(model):
            how = (
                f"its adapters {sorted(adapters(model))} are frozen or switched off. Open an adapter that is to be trained "
                "with `AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True)`."
            )
        raise ValueError(f"The policy has no trainable parameters: {how}")
    if run:
        reached = trainable.keys() & _reached(model)
        if not reached:
            raise ValueError(
                f"None of the {len(trainable)} trainable parameters of the policy ({next(iter(trainable.values()))}, ...) takes "
                "part in what it computes. Are their adapters active (`model.set_adapter(name)`), switched on, and not merged?"
            )
        trainable = {key: trainable[key] for key in reached}
    held = (
        {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if optimizer
        else trainable
    )
    if not trainable.keys() & held:
        raise ValueError(
            "The optimizer holds none of the trainable parameters of the policy. Make it from the parameters of the model that "
            "you pass (after an adapter was added, not before), or pass `optimizer_cls_and_kwargs`."
        )


@torch.enable_grad()
def _reached(model: nn.Module) -> set[int]:
    """`id` of each parameter that would have a gradient, as the graph of a pass in evaluation mode shows."""
    model = unwrap(model)
    modes = [(module, module.training) for module in model.modules()]
    tokens = torch.arange(2, device=next(model.parameters()).device)[None]
    model.eval()  # without checkpointing, which would hide the graph
    try:
        logits: Tensor = model(input_ids=tokens % backbone(model).config.get_text_config().vocab_size).logits
    finally:
        for module, was_training in modes:
            module.training = was_training
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where a gradient is accumulated
            found.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return found
