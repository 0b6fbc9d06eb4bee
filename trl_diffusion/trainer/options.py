"""What the configs of all trainers have in common: defaults of the machine, options of the policy, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from ..utils import no_repeated_keys
from .trackers import check_trackers


if TYPE_CHECKING:
    from ..sft.config import DiffusionSFTConfig
    from .config import DTRPOConfig


def settle(args: DTRPOConfig | DiffusionSFTConfig) -> None:
    """
    Reads `diffusion_spec`, and sets the options that were left open and that transformers would set to something that this
    machine cannot do, or would ask about.

    Raises:
        ValueError: if `diffusion_spec` is no mapping and no JSON object, if `bf16` is set without a GPU that has bfloat16, or if
            a tracker of `report_to` is not installed.
    """
    args.diffusion_spec = _mapping(args.diffusion_spec)
    check_trackers(args.report_to)
    has_bf16 = is_torch_bf16_gpu_available() or is_torch_xla_available()
    if args.bf16 is None and (args.use_cpu or not has_bf16):
        args.bf16 = False
    if args.bf16 and not args.use_cpu and not has_bf16:
        raise ValueError(
            "`bf16` is set, and this machine has no GPU with bfloat16. Train on one, or set `bf16` to false (`--bf16 false`): on a "
            "CPU that is enough for small policies."
        )
    if not torch.accelerator.is_available():  # torch warns that it cannot be done
        args.dataloader_pin_memory = False
    if args.trust_remote_code is None:  # with `None`, transformers asks on the terminal
        args.trust_remote_code = False


def _mapping(value: Any) -> dict[str, Any] | None:
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value, object_pairs_hook=no_repeated_keys)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`diffusion_spec` must be a mapping or a JSON object, got {value!r} ({error})."
            ) from error
    if not isinstance(found, dict | None):
        raise ValueError(f"`diffusion_spec` must be a mapping or a JSON object, got {value!r}.")
    return found


_REHEARSED: ContextVar[int | None] = ContextVar("rehearsed", default=None)


@contextmanager
def rehearsing(processes: int) -> Iterator[None]:
    """Inside, settings are those of a run of so many processes with a GPU each, although this process is alone."""
    token = _REHEARSED.set(processes)
    try:
        yield
    finally:
        _REHEARSED.reset(token)


NO_REMOTE_CODE = "the families load without their hub code, which hides its attention masks from this library"


class PolicyOptions:
    """Mixin of the configs of trainers: how the policy is loaded, and options that do not apply to one."""

    if TYPE_CHECKING:
        diffusion_spec: dict[str, Any] | str | None
        model_init_kwargs: dict[str, Any] | str | None

    @property
    def world_size(self) -> int:
        """Number of processes; those of the run that is rehearsed."""
        return _REHEARSED.get() or cast(Any, super()).world_size

    @property
    def n_gpu(self) -> int:
        """Number of GPUs of this process; in a rehearsal at most one, as for each process of the run."""
        found = cast(Any, super()).n_gpu
        return found if _REHEARSED.get() is None else min(found, 1)

    def spec_overrides(self) -> dict[str, Any] | None:
        """`diffusion_spec` as a mapping, after `__post_init__` has parsed it."""
        return self.diffusion_spec if isinstance(self.diffusion_spec, dict) else None

    def model_options(self) -> dict[str, Any]:
        """Options for loading the model: `model_init_kwargs`, which transformers has parsed into a mapping."""
        return cast(dict[str, Any], self.model_init_kwargs or {})

    def refused(self) -> dict[str, str]:
        """Options that are set although they do not apply to a diffusion policy, each with the reason."""
        raise NotImplementedError

    def set_in_spite_of(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """Of the options that `reasons` names, those that are set, each with the reason and its value; and remote code."""
        fields = cast(Any, type(self)).__dataclass_fields__
        found = {}
        for name, why in reasons.items():
            if name not in fields:
                continue
            value, neutral = getattr(self, name), fields[name].default
            asks_for_nothing = name == "router_aux_loss_coef" and value == 0.0
            if value not in (neutral, None) and not asks_for_nothing:
                found[name] = f"{why} (got {value!r}, leave it at {neutral!r})"
        if self.model_options().get("trust_remote_code", False) is not False:  # with `None`, transformers asks
            found["model_init_kwargs"] = f"`trust_remote_code`: {NO_REMOTE_CODE}"
        return found

    def check_refused(self, base: type) -> None:
        """Raises a `ValueError` if options of TRL's config `base` are set that do not apply to a diffusion policy."""
        if refused := self.refused():
            reasons = "\n".join(f"- `{name}`: {why}" for name, why in refused.items())
            raise ValueError(f"These options of {base.__name__} cannot be used with a diffusion policy:\n{reasons}")
