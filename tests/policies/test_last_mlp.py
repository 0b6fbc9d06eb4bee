"""The MLP of the last layer, computed only where logits are read: the same logits and gradients as of the whole pass."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.closeness import assert_close, assert_close_gradients
from tests.policies.backbones import BACKBONES, any_tiny_backbone, tiny_backbone
from trl_diffusion.policies.experts import expert_layers
from trl_diffusion.policies.forward import last_mlp_at, layer_lists, policy_logits


LENGTH = 10
# The last place is read twice.
ROWS, COLUMNS = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 9, 0, 4, 4])
FACTORS = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5])


def logits_and_gradients(model: nn.Module, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Of some tokens, with every logit of a place in the loss, each with another weight."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(2, -1)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(2)[None, None].expand(2, -1, -1, -1)
    model.zero_grad()
    if save:
        with last_mlp_at(model, ROWS, COLUMNS):
            logits = policy_logits(model, ids, positions, allowed, ROWS, COLUMNS)
    else:
        logits = policy_logits(model, ids, positions, allowed, ROWS, COLUMNS)
    shares = torch.randn(logits.shape[-1], generator=generator)
    (logits.float().log_softmax(-1) * shares * FACTORS[:, None]).sum().backward()  # after the context, as in a trainer
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(model: nn.Module) -> None:
    (found, gradients), (expected, right) = (logits_and_gradients(model, save) for save in (True, False))
    assert_close(found, expected)
    assert len(gradients) == len(right) > 3
    assert_close_gradients(torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in right]))


def calls(module: nn.Module) -> list[torch.Size]:
    """The shapes of what a module is given, from now on."""
    shapes: list[torch.Size] = []
    module.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    return shapes


def last_mlp(model: nn.Module) -> nn.Module:
    return layer_lists(model)[0][-1].mlp


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "gemma2", "phi", "gpt_neox", "qwen3_moe"])
def test_same_numbers(name):
    assert_same(tiny_backbone(name))


@pytest.mark.long
@pytest.mark.parametrize("name", BACKBONES)
def test_same_numbers_of_every_backbone(name):
    try:
        model = any_tiny_backbone(name)
        logits_and_gradients(model, save=False)
    except Exception as error:  # what the other tests of backbones are about
        pytest.skip(f"{name} does not run as a policy: {error!r:.80}")
    assert_same(model)


def test_only_the_places_that_are_read_are_computed():
    model = tiny_backbone("llama")
    of_last, of_first = calls(last_mlp(model).down_proj), calls(layer_lists(model)[0][0].mlp.down_proj)
    logits_and_gradients(model, save=True)
    logits_and_gradients(model, save=False)
    width = model.config.intermediate_size
    assert of_last == [(1, len(ROWS), width), (2, LENGTH, width)]
    assert of_first == [(2, LENGTH, width)] * 2


def test_experts_see_all_tokens():
    model = tiny_backbone("qwen3_moe")
    assert expert_layers(model)
    shapes = calls(last_mlp(model))
    logits_and_gradients(model, save=True)
    assert shapes == [(2, LENGTH, model.config.hidden_size)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = tiny_backbone("llama").train()
    expected = logits_and_gradients(model, save=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    first, last = calls(layer_lists(model)[0][0].self_attn.o_proj), calls(layer_lists(model)[0][-1].self_attn.o_proj)
    found = logits_and_gradients(model, save=True)
    assert (len(first), len(last)) == (2, 1)  # the last layer is not computed again
    assert_close(found[0], expected[0])
    for gradient, right in zip(found[1], expected[1], strict=True):
        assert_close_gradients(gradient, right)
    assert all(layer.gradient_checkpointing for layer in layer_lists(model)[0])


def test_an_adapter_under_autocast():
    model = get_peft_model(
        tiny_backbone("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    assert_same(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = logits_and_gradients(model, save=True)
        expected, _ = logits_and_gradients(model, save=False)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_nothing_is_left_behind():
    model = tiny_backbone("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(KeyError), last_mlp_at(model, ROWS, COLUMNS):
        raise KeyError
    shapes = calls(last_mlp(model).down_proj)
    logits_and_gradients(model, save=False)
    assert shapes == [(2, LENGTH, model.config.intermediate_size)] * 2
    assert layer_lists(model)[0][-1].gradient_checkpointing


def test_nothing_that_is_read():
    """A batch without a scored token: gradients are 0, but there, as every process of a parallel run needs them."""
    model, nothing = tiny_backbone("llama"), torch.zeros(0, dtype=torch.long)
    ids = torch.arange(LENGTH)[None]
    allowed = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    with last_mlp_at(model, nothing, nothing):
        policy_logits(model, ids, ids, allowed, nothing, nothing).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in last_mlp(model).parameters())
