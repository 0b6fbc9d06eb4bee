"""Running a policy: explicit attention, explicit positions, logits only where they are wanted."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaModel, PreTrainedTokenizerBase

from .attention import PLANNED_FOR, AttentionPlan
from .experts import expert_layers
from .spec import DiffusionSpec


if TYPE_CHECKING:
    from transformers import PreTrainedModel


NON_FINITE_ADVICE = (
    "Look for NaN and infinity in its weights (a training run that diverged, a damaged checkpoint), or load it in bfloat16 or "
    "float32 instead of float16."
)


# How models call the argument that takes a cache: transformers 5.24 has renamed it in all of them.
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


class NonFiniteLogits(FloatingPointError):
    """
    A policy whose logits are NaN or infinite, so that what it says is nothing.

    Args:
        row (`int`): which prompt, of those that it was asked about together.
        reason (`str`): what was found, where, and what to do.
    """

    def __init__(self, row: int, reason: str):
        super().__init__(f"Prompt {row}: {reason}")
        self.row, self.reason = row, reason


def policy_logits(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    allowed: Tensor | AttentionPlan,
    rows: Tensor,
    columns: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """
    One forward pass of a causal-LM backbone under an attention of our own, with the LM head at chosen places only.

    Args:
        model (`nn.Module`):
            The policy, wrapped (DDP, DeepSpeed, PEFT) or not.
        input_ids (`Tensor` of shape `(R, N)`): token ids.
        position_ids (`Tensor` of shape `(R, N)`): position of each token.
        allowed (boolean `Tensor` of shape `(R, 1, N or 1, K)`, or [`AttentionPlan`]): who may look at whom; `K > N` with a
            cache.
        rows, columns (`Tensor` of shape `(M,)`): the places whose logits are wanted.
        cache ([`~transformers.Cache`], *optional*): keys and values of what came before.

    Returns:
        `Tensor` of shape `(M, V)`.
    """
    if isinstance(allowed, Tensor):
        allowed = allowed.expand(-1, -1, input_ids.shape[1], -1)  # a view; some backbones look at the shape
    with logits_at(model, rows, columns):
        output = model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=cache is not None,
            **{CACHE: cache},
            **attention_arguments(model, allowed),
        )
    return output.logits[0]


def check_model(model: Any, tokenizer: Any, takes_text: bool = True) -> None:
    """
    Checks the two objects that make up a policy; the model alone without `takes_text`.

    Raises:
        TypeError: if the model is no model (but its path, say), or the tokenizer no tokenizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a model, got {model!r:.80} ({type(model).__name__}). Load it first, with AutoModelForCausalLM."
        )
    if takes_text and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"`tokenizer` must be a tokenizer, got {tokenizer!r:.80} ({type(tokenizer).__name__}). Load it first, with "
            "AutoTokenizer."
        )


def check_attention(model: nn.Module) -> str:
    """
    The model's attention implementation.

    Raises:
        ValueError: for one that cannot run an arbitrary mask, such as `flash_attention_2`.
    """
    return check_implementation(unwrap(model).config._attn_implementation)


def check_implementation(implementation: str) -> str:
    """The name of an attention implementation, under the conditions of [`check_attention`]."""
    if implementation not in ("sdpa", "eager", *PLANNED_FOR.values()):
        raise ValueError(
            f"attn_implementation={implementation!r} cannot run the attention mask of a diffusion policy. Load the "
            "model with attn_implementation='sdpa' (or 'eager'; 'flex_attention' only after `enable_plans(model)`)."
        )
    return implementation


def attention_arguments(model: nn.Module, allowed: Tensor | AttentionPlan) -> dict[str, Tensor | AttentionPlan]:
    """`allowed` in the form that the model's attention implementation takes."""
    if isinstance(allowed, Tensor):
        return {"attention_mask": attention_mask(model, allowed)}
    if check_attention(model) in PLANNED_FOR.values():
        # The plan decides. A 4-dimensional mask is what keeps the model from making a causal one.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=unwrap(model).device)
        return {"attention_mask": nothing, "attention_plan": allowed}
    return {"attention_mask": attention_mask(model, allowed.dense())}


def attention_mask(model: nn.Module, allowed: Tensor) -> Tensor:
    """A boolean mask in the form that the model's attention implementation takes."""
    if check_attention(model) != "eager":
        return allowed
    dtype = cast(Tensor, unwrap(model).get_input_embeddings().weight).dtype
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The model inside the wrappers that DDP and DeepSpeed put around it; PEFT's passes for the one that it holds."""
    while hasattr(model, "module"):
        model = cast(nn.Module, model.module)
    return cast("PreTrainedModel", model)


@contextmanager
def logits_at(model: nn.Module, rows: Tensor, columns: Tensor):
    """
    Inside this context the model's LM head sees only the hidden states at `(rows, columns)`, as one row of `M`, so the
    model returns logits of shape `(1, M, V)` and the `(R, N, V)` logits never exist. The gather happens in a hook on
    the head, inside the model's own forward: wrappers that shard or gather parameters are not bypassed.
    """
    head = unwrap(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][rows, columns][None], *args[1:]))
    by_hand = type(head) is nn.Linear and head.weight.device.type == "cpu" and not torch.is_grad_enabled()
    by_hand = by_hand and "forward" not in vars(head)  # somebody else's, such as a dispatch over devices
    if by_hand:
        head.forward = partial(_few_rows, head)
    try:
        yield
    finally:
        handle.remove()
        if by_hand:
            vars(head).pop("forward", None)


def layer_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers that a model consists of: one in most models, none in those that do not call it `layers`."""
    named = (module for name, module in model.named_modules() if name.split(".")[-1] == "layers")
    return [module for module in named if isinstance(module, nn.ModuleList)]


@contextmanager
def last_mlp_at(model: nn.Module, rows: Tensor, columns: Tensor):
    """
    Inside this context the last layer computes its MLP at the places `(rows, columns)` only, each `(M,)`. Use it with [`logits_at`]
    for the same places: after the attention of the last layer, the logits of a place depend on no other place. It saves most of
    that layer, forward and backward, where few places of a long row are read.

    The last layer is not checkpointed here, because it would be computed again after the context has ended. A layer with experts
    computes all places, so that their router sees all tokens. So does a model without a list of layers, or with several.
    """
    lists = layer_lists(model)
    last: Any = lists[0][-1] if len(lists) == 1 else None
    mlp = getattr(last, "mlp", None)
    if last is None or not isinstance(mlp, nn.Module) or expert_layers(last):
        yield
        return
    times: list[Tensor] = []  # how often each place is among the M, of the pass that is under way

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ones = torch.ones_like(rows, dtype=args[0].dtype)
        times.append(torch.zeros_like(args[0][..., 0]).index_put((rows, columns), ones, accumulate=True))
        return (args[0][rows, columns][None], *args[1:])

    def scatter(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        often = times.pop()
        whole = output.new_zeros(*often.shape, output.shape[-1])
        shares = output[0] / often[rows, columns, None].to(output.dtype)  # a place that is there twice counts once
        return whole.index_put((rows, columns), shares, accumulate=True)

    handles = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
    checkpointed = getattr(last, "gradient_checkpointing", False)
    if checkpointed:
        last.gradient_checkpointing = False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if checkpointed:
            last.gradient_checkpointing = True


def _few_rows(head: nn.Linear, hidden: Tensor) -> Tensor:
    """
    What `head` computes, for a row of few positions and a large vocabulary: on a CPU the product is up to three times as
    fast with the large matrix on the left. `(1, M, d)` to `(1, M, V)`.
    """
    logits = (head.weight @ hidden[0].T).T.contiguous()
    return (logits if head.bias is None else logits + head.bias)[None]


def log_distribution(logits: Tensor, spec: DiffusionSpec, temperature: float = 1.0) -> Tensor:
    """
    The policy's log-distribution over tokens, in float32 (docs/method.md, section 3.6). Decoding and scoring both use it.
    Tokens that are no answer have no share: those that the tokenizer does not have, and the mask token (see
    [`DiffusionSpec`]).

    Args:
        logits (`Tensor` of shape `(..., V)`): logits of the model.
        spec ([`DiffusionSpec`]): facts about the policy.
        temperature (`float`, *optional*, defaults to `1.0`): what the logits are divided by; 0 stands for 1, since the
            distribution that greedy decoding looks at is the untempered one.

    Returns:
        float32 `Tensor` of shape `(..., V)`.
    """
    logits = logits.float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    if spec.absent_token_ids or not spec.predicts_mask_token:
        # A vector that is added, out of place: autograd keeps no extra copy of the logits.
        logits = logits + _removed(logits, spec, not spec.predicts_mask_token)
    return logits.log_softmax(-1)


def likeliest(logits: Tensor, spec: DiffusionSpec) -> Tensor:
    """
    The most likely token of each distribution, `(...)`, of those that can be written: not the mask token, whatever its share of the
    softmax, and none of `absent_token_ids`. `logits` has shape `(..., V)`.
    """
    return (logits.detach() + _removed(logits, spec, True)).argmax(-1)


def _removed(logits: Tensor, spec: DiffusionSpec, mask_token: bool) -> Tensor:
    """`(V,)`: minus infinity for the tokens that the tokenizer does not have, and for the mask token if asked; 0 for the others."""
    removed = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    if mask_token:
        removed[spec.mask_token_id] = -torch.inf
    for first, end in spec.absent_token_ids or ():
        removed[first:end] = -torch.inf
    return removed
