"""
A policy is tried on a few tokens before it is used. Any causal backbone of transformers may be one, and some compute
something else under an attention mask, positions or a cache of our own than by themselves. Such a policy is refused here,
before it gives a wrong number.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .attention import PackedMask, Places, RaggedGroup, RaggedMask, backbone, plans_enabled, refuse_plans
from .cache import lane_cache
from .forward import attention_mask, check_attention, policy_logits, unwrap
from .limits import check_layers
from .lora import check_adapters
from .spec import DiffusionSpec, family_fields
from .training import random_settings, switch_off_router_loss


if TYPE_CHECKING:
    from collections.abc import Callable


logger = logging.getLogger(__name__)

LENGTH = 6  # tokens of a sequence: three blocks of two
GAP = 16  # tokens of padding between those that a packed row holds
EXACT, ROUNDED = 0.01, 0.1  # largest relative difference, with TF32 or better, and with 16 bits or less

_tried: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()


def try_policy(model: nn.Module, spec: DiffusionSpec, cached: bool | None = None, training: bool = False) -> None:
    """
    Tries a policy on a few tokens: what it gives for tokens that are packed, side by side or cached, as scoring and
    decoding run them, has to be what it gives for the same tokens by themselves, under a mask and under its own causal
    attention. Done once for a model; costs about six forward passes of 6 to 30 tokens. Random numbers are drawn from a
    copy of the global state, if at all.

    A model whose layers do not pass plans on to their attention is given masks from then on, which is slower.

    Args:
        model (`nn.Module`): the policy, wrapped or not. Where its parameters are shared among processes, all of them have
            to call this.
        spec ([`DiffusionSpec`]): facts about it.
        cached (`bool`, *optional*): whether it will decode with a cache. Defaults to whether its attention is by blocks.
        training (`bool`, *optional*, defaults to `False`): whether it has to give the same in training mode.

    Raises:
        ValueError: if the policy gives something else; the message names the model and what differs.
    """
    model, cached = unwrap(model), spec.attention == "block" if cached is None else cached
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # a model without weights computes nothing
    base = backbone(model)
    what = (base.config._attn_implementation == "eager", spec.attention, spec.clean_attention)
    done = _tried.setdefault(model, set())
    if any(
        what == others and cached <= with_cache and training <= in_training for others, with_cache, in_training in done
    ):
        return
    switch_off_router_loss(model)
    with plans_enabled(model):
        check_attention(model)
    check_layers(base.config)
    check_adapters(model)
    trial = _Trial(model, spec, cached)
    with _aside(model), torch.no_grad():
        trial.run(training)
    done.add((what, cached, training))


@contextmanager
def _aside(model: nn.Module):
    """Evaluation mode, and afterwards the modes and the random state of before."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        warnings.catch_warnings(action="ignore"),  # of checkpointing without a gradient
    ):
        model.eval()
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training


@dataclass
class _Rows:
    """
    Sequences of six tokens by themselves, and what the model gives for them.

    Attributes:
        ids (`Tensor` of shape `(R, 6)`): token ids. The last row is for causal attention.
        allowed (boolean `Tensor` of shape `(R, 1, 6, 6)`): who may look at whom.
        logits (`Tensor` of shape `(R, 6, V)`): the result.
    """

    ids: Tensor
    allowed: Tensor
    logits: Tensor


class _Trial:
    """The passes of [`try_policy`], whose arguments these are."""

    def __init__(self, model: nn.Module, spec: DiffusionSpec, cached: bool):
        self.model, self.base, self.cached = model, backbone(model), cached
        self.config = self.base.config
        self.full = spec.attention == "full"
        self.pairs = spec.replace(block_size=2, block_origin="sequence")  # the blocks of the trial
        self.device = next(model.parameters()).device
        self.tolerance = _tolerance(model)

    def run(self, training: bool) -> None:
        """Compares, and raises what [`try_policy`] raises."""
        try:
            rows = self._alone()
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise self._refusal(f"it fails under an attention mask of its own ({_line(error)})") from error
        if not rows.logits.isfinite().all():
            return  # there is nothing to compare; decoding and scoring say so
        self._check_mask(rows)
        problem = self._check_passes(rows)
        if problem is not None:
            refuse_plans(self.model)
            if self._check_passes(rows) is not None:
                raise self._refusal(problem)
            logger.warning(
                f"The layers of `{self.config.model_type}` do not pass on what they are told about attention: it is computed "
                "with a mask for every pair of tokens, which is slower for long rows, and right."
            )
        if training:
            self._check_training()

    # ----------------------------------------------------------------------------------------------- what is right

    def _alone(self) -> _Rows:
        """Sequences by themselves, with eager attention and a mask."""
        token = self._tokens
        places = torch.arange(LENGTH, device=self.device)
        causal = places <= places[:, None]
        if self.full:
            short = (places < 4).expand(LENGTH, LENGTH)
            everything = torch.ones_like(causal)
            ids = [token(0, 1, 2, 3, 4, 5), token(0, 1, 2, 3, 4, 6), token(0, 1, 2, 3, 4, 5), token(0, 1, 2, 3, 4, 6)]
            allowed = [everything, everything, short, short, causal]
        else:
            ids = [token(0, 1, 6, 7, 4, 5), token(0, 1, 6, 8, 4, 5), token(0, 1, 2, 3, 9, 10)]
            ranks = [self.pairs.rank(places, 0, places >= start) for start in (2, 2, 4)]  # what comes before is clean
            allowed = [*(rank <= rank[:, None] for rank in ranks), causal]
        rows = torch.stack([*ids, ids[0]])
        masks = torch.stack(allowed)[:, None]
        return _Rows(rows, masks, self._eager(rows, masks))

    def _eager(self, ids: Tensor, allowed: Tensor | None) -> Tensor:
        """The model's logits for `(R, 6)` tokens, with a mask or, without one, with the attention that it has by itself."""
        before = self.config._attn_implementation
        if before != "eager":
            self.base.set_attn_implementation("eager")
        try:
            if allowed is None:
                return self.model(input_ids=ids, use_cache=False).logits
            positions = torch.arange(LENGTH, device=self.device).expand(ids.shape)
            mask = attention_mask(self.model, allowed)
            return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        finally:
            if before != "eager":
                self.base.set_attn_implementation(before)

    def _tokens(self, *numbers: int) -> Tensor:
        """Some tokens, which are spread over the vocabulary."""
        size = self.config.get_text_config().vocab_size
        return torch.tensor(
            [((number + 1) * size // 13 + number % 2) % size for number in numbers], device=self.device
        )

    # ------------------------------------------------------------------------------------------------- what is compared

    def _check_mask(self, rows: _Rows) -> None:
        """Whether attention obeys a mask."""
        if not family_fields(self.config):  # what a family does by itself, its tests compare with the published code
            own = self._eager(rows.ids[-1:], None)[0]
            everything = torch.ones_like(rows.allowed[:1])
            if self._differ(own, rows.logits[-1]) and self._differ(own, self._eager(rows.ids[-1:], everything)[0]):
                raise self._refusal(
                    "under a causal mask and with the positions 0, 1, 2, ... its logits are "
                    f"{_difference(own, rows.logits[-1]):.0%} off those that it gives without either"
                )
        if self.full:
            hidden, seen, seeing = (rows.logits[2, :4], rows.logits[3, :4]), (0, 1, 5), 0
        else:
            hidden, seen, seeing = (rows.logits[0, :2], rows.logits[2, :2]), (0, 1, 3), 2
        if self._differ(*hidden):
            raise self._refusal("a token sees others that the attention mask hides from it")
        one, other, changed = seen
        reached = (rows.logits[one] != rows.logits[other]).any(-1)
        if reached[changed] and not reached[seeing]:
            raise self._refusal(
                "a token sees nothing of a later one that the attention mask shows it: its layers run from left to right"
            )

    def _check_passes(self, rows: _Rows) -> str | None:
        """What is wrong with the passes that scoring and decoding run, `None` if nothing is."""
        passes: dict[str, Callable[[_Rows], tuple[Tensor, Tensor]]]
        if self.full:
            passes = {"a row with padding": self._padded, "a row that holds several sequences": self._beside}
        else:
            passes = {"a packed row": self._packed}
        if self.cached:
            passes["a pass over cached tokens"] = self._from_cache
        with plans_enabled(self.model):
            for name, compare in passes.items():
                try:
                    ours, right = compare(rows)
                except (torch.OutOfMemoryError, MemoryError):
                    raise
                except Exception as error:
                    return f"{name} fails ({_line(error)})"
                if self._differ(ours, right):
                    return (
                        f"{name} gives logits that are {_difference(ours, right):.0%} off those of the same tokens at the "
                        "same positions by themselves"
                    )
        return None

    def _check_training(self) -> None:
        """Whether the model gives the same in training mode."""
        places = torch.arange(2 * LENGTH, device=self.device)
        rows = self._tokens(*range(2 * LENGTH))[None]
        everything = torch.ones(1, 1, len(places), len(places), dtype=torch.bool, device=self.device)

        def run() -> Tensor:
            return self._logits(rows, places[None], everything, places)

        first: dict[str, Tensor] = {}
        with plans_enabled(self.model), _outputs(self.model, first):
            evaluated = run()
        second: dict[str, Tensor] = {}
        self.model.train()
        try:
            with plans_enabled(self.model), _outputs(self.model, second):
                trained = run()
        finally:
            self.model.eval()
        if self._differ_anywhere(trained, evaluated):
            settings = ", ".join(f"{name}={value}" for name, value in random_settings(self.model).items())
            changed = (name for name in first if name in second and self._differ_anywhere(second[name], first[name]))
            raise self._refusal(
                "in training mode its logits are not those of evaluation mode, beginning with the module "
                f"`{next(changed, '')}`: noise that cannot be switched off from here. Recorded and scored log-probabilities "
                f"are compared, so set it to 0 in the model's config ({settings or 'which names none'})"
            )

    # ------------------------------------------------------------------------------------------------------ the passes

    def _logits(
        self, ids: Tensor, positions: Tensor, allowed, columns: Tensor, rows: Tensor | None = None, cache=None
    ):
        rows = torch.zeros_like(columns) if rows is None else rows
        return policy_logits(self.model, ids, positions, allowed, rows, columns, cache)

    def _packed(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """
        `[ clean 0 1 2 3 | padding | copy of block 1 | copy of block 2 ]`, as scoring lays out a response: what goes by the
        place in the row instead of the position is far off.
        """
        last = len(rows.ids) - 2

        def row(clean: Tensor, padding: Tensor, copies: Tensor) -> Tensor:
            return torch.cat([clean, padding, copies])

        nothing = torch.zeros(GAP, dtype=torch.long, device=self.device)
        ids = row(rows.ids[last, :4], nothing, torch.cat([rows.ids[0, 2:4], rows.ids[last, 4:]]))
        places = torch.arange(LENGTH, device=self.device)
        positions = row(places[:4], nothing, places[2:])
        copies = row(nothing[:4], nothing, places[2:] // 2)
        valid = row(places[:4] >= 0, nothing > 0, places[2:] >= 0)
        plan = PackedMask(self.pairs.rank(positions, 0, copies > 0)[None], copies, valid[None])
        ours = self._logits(ids[None], positions[None], plan, valid.nonzero()[:, 0])
        return ours[4:], torch.cat([rows.logits[0, 2:4], rows.logits[last, 4:]])

    def _padded(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Sequences of six and four tokens, each in a row, as scoring lays out states with full attention: the second one."""
        chosen = rows.ids[[0, 3]]
        places = torch.arange(LENGTH, device=self.device)
        valid = places < torch.tensor([[6], [4]], device=self.device)
        at, columns = valid.nonzero(as_tuple=True)
        ours = self._logits(chosen, places.expand(2, -1), valid[:, None, None], columns, at)
        return ours[6:], rows.logits[3, :4]

    def _beside(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """The same two, one behind the other in a row, as decoding runs them: the second one."""
        places = torch.arange(10, device=self.device)
        groups = [RaggedGroup(Places(part), Places(part), None) for part in (places[None, :6], places[None, 6:])]
        ids, positions = torch.cat([rows.ids[0], rows.ids[3, :4]]), torch.cat([places[:6], places[:4]])
        ours = self._logits(ids[None], positions[None], RaggedMask(groups, 10, 10), places)
        return ours[6:], rows.logits[3, :4]

    def _from_cache(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """The last block after a pass that has filled the cache: with what is before it, or with full attention with all."""
        row = 0 if self.full else len(rows.ids) - 2
        cache = lane_cache(self.config, 1, LENGTH)
        places = torch.arange(LENGTH, device=self.device)

        def run(begin: int, end: int) -> Tensor:
            cache.slots.write = places[begin:end]
            allowed = rows.allowed[row : row + 1, :, begin:end, :end]
            group = RaggedGroup(Places(places[None, : end - begin]), Places(places[None, :end]), allowed)
            plan = RaggedMask([group], end - begin, LENGTH)
            ids, positions = rows.ids[row : row + 1, begin:end], places[None, begin:end]
            return self._logits(ids, positions, plan, places[: end - begin], cache=cache)

        run(0, 6 if self.full else 4)
        return run(4, 6), rows.logits[row, 4:]

    # --------------------------------------------------------------------------------------------------------- numbers

    def _differ(self, ours: Tensor, right: Tensor) -> bool:
        return not _difference(ours, right) <= self.tolerance

    def _differ_anywhere(self, ours: Tensor, right: Tensor) -> bool:
        """As `_differ`, of passes that run the same operations on the same shapes."""
        return not float(_differences(ours, right).max()) <= self.tolerance

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(
            f"`{self.config.model_type}` (attn_implementation={self.config._attn_implementation!r}) cannot be a diffusion "
            f"policy here: {reason}. Use a backbone whose attention takes any mask and any positions (Llama, Qwen2, Qwen3, ...)."
        )


def _differences(ours: Tensor, right: Tensor) -> Tensor:
    """Root mean square difference at each position, in units of the spread of what is right."""
    ours, right = ours.float().flatten(0, -2), right.float().flatten(0, -2)
    spread = (right - right.mean(-1, keepdim=True)).square().mean().sqrt()
    return (ours - right).square().mean(-1).sqrt() / spread.clamp(min=torch.finfo(torch.float32).tiny)


def _difference(ours: Tensor, right: Tensor) -> float:
    """
    How far logits are off what is right: the (lower) median over positions, since in a mixture of experts rounding may send
    a position to another expert.
    """
    return float(_differences(ours, right).median())


def _tolerance(model: nn.Module) -> float:
    """What rounding may do to the logits of this model."""
    # What is sharded may be computed in another type than it is stored in.
    coarse = any(
        isinstance(parameter, DTensor) or not parameter.is_floating_point() or parameter.dtype.itemsize < 4
        for parameter in model.parameters()
    )
    return ROUNDED if coarse or torch.is_autocast_enabled(backbone(model).device.type) else EXACT


@contextmanager
def _outputs(model: nn.Module, found: dict[str, Tensor]):
    """Inside this context, the tensors that modules give are kept under their names, parts before the whole."""

    def keep(name: str, module: nn.Module, args: tuple, output) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1:
            found.setdefault(name, output.clone())  # some are changed in place later

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
