"""What this machine has: packages, devices, and the attention kernels that work on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from io import StringIO

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from torch.nn import functional

from ..plan.fit import free_disk, free_memory
from ..policies.attention import PackedMask
from .findings import Findings, one_line


GIB = 2**30
OPTIONAL = ("deepspeed", "bitsandbytes", "flash_attn", "lm_eval", "math_verify", "matplotlib")


def check_packages(findings: Findings) -> None:
    """The versions of the packages that this one needs, beside those that it supports, and of those that it can use."""
    said = []
    for line in requires("trl-diffusion") or ():
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            findings.mistake("packages", f"{need.name} is missing, which must be {need.specifier or 'there'}.")
            continue
        said.append(f"{need.name} {found} ({need.specifier})")
        if not need.specifier.contains(found, prereleases=True):
            findings.mistake(
                "packages", f"{need.name} is {found}, but must be {need.specifier}: pip install '{need}'."
            )
    findings.say("packages", f"trl-diffusion {version('trl-diffusion')} needs " + ", ".join(said))
    others = [name for name in OPTIONAL if find_spec(name) is not None]
    missing = [name for name in OPTIONAL if name not in others]
    findings.say(
        "packages",
        f"there are also {', '.join(others) or 'none of those that are optional'}; not {', '.join(missing)}",
    )


def check_devices(findings: Findings) -> None:
    """Processors, memory, GPUs and the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = free_memory()
    memory = "" if free is None else f", {free / GIB:.1f} GiB of memory free"
    findings.say("devices", f"{cores} CPU cores{memory}, {free_disk('.') / GIB:.0f} GiB of disk free")
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        half = "computes in bfloat16" if torch.cuda.is_bf16_supported() else "does not compute in bfloat16"
        findings.say("devices", f"GPU {number}: {found.name}, {found.total_memory / GIB:.0f} GiB, {half}")
    if not torch.cuda.is_available():
        findings.say("devices", "no GPU that torch can use: what is measured below is the CPU")


def check_deepspeed(findings: Findings) -> None:
    """Whether DeepSpeed can be imported, and why not."""
    if find_spec("deepspeed") is None:
        findings.say("deepspeed", "not installed; ZeRO-2 and ZeRO-3 need it: pip install 'trl-diffusion[deepspeed]'")
        return
    try:
        with redirect_stdout(StringIO()):
            import deepspeed
        findings.say("deepspeed", f"{deepspeed.__version__} can be imported")
    except Exception as error:  # it looks for compilers and devices when it is imported
        findings.say(
            "deepspeed", f"cannot be imported ({type(error).__name__}: {one_line(error)}); ZeRO-2 and ZeRO-3 need it"
        )


# ---------------------------------------------------------------------------------------------------------- kernels


def check_kernels(findings: Findings, device: str, wanted: str | None = None) -> None:
    """
    Calls each attention kernel on a tiny input, forward and backward, and compares it with the plain formula.

    Args:
        findings ([`Findings`]): where to note what is found.
        device (`str`): where.
        wanted (`str`, *optional*): the implementation that a run asks for, which must work.
    """
    kernels: dict[str, Callable[[PackedMask, Tensor, Tensor, Tensor], Tensor]] = {
        "sdpa": _sdpa,
        "flex_attention": partial(_flex, compiled=device == "cuda"),
    }
    for name, kernel in kernels.items():
        begun = time.perf_counter()
        try:
            wrong = _difference(kernel, device)
        except Exception as error:
            message = f"{name} does not work on {device} ({type(error).__name__}: {one_line(error):.160})"
            if name in ("sdpa", wanted):
                findings.mistake("kernels", f"{message}. Use another machine, or another `attn_implementation`.")
            else:
                findings.say("kernels", message)
            continue
        seconds = time.perf_counter() - begun
        findings.say(
            "kernels",
            f"{name}: forward and backward under a packed mask on {device}, off by {wrong:.0e}, in {seconds:.1f} s",
        )
    unused = "it takes no mask of a diffusion policy, so nothing here uses it"
    findings.say("kernels", f"flash-attention {_flash(device)}; {unused}")


def _sdpa(mask: PackedMask, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense()).transpose(1, 2)


def _flex(mask: PackedMask, query: Tensor, key: Tensor, value: Tensor, compiled: bool) -> Tensor:
    return mask.attend_flex(nn.Identity(), query, key, value, compiled=compiled)


def _flash(device: str) -> str:
    """Whether flash-attention is there and works, in words."""
    if find_spec("flash_attn") is None:
        return "is not installed"
    try:
        attend = import_module("flash_attn").flash_attn_func
        states = [torch.randn(1, 24, 2, 16, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        attend(*states).sum().backward()
        return "works"
    except Exception as error:  # without the right GPU, or made for another torch
        return f"does not work ({type(error).__name__}: {one_line(error):.160})"


def _difference(kernel: Callable[[PackedMask, Tensor, Tensor, Tensor], Tensor], device: str) -> float:
    """The largest difference between what a kernel gives and the plain formula, of values and gradients, relative to the largest."""
    length, size = 24, 16
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 2, length, size, generator=generator).to(device).requires_grad_() for _ in range(3)]
    ranks = (torch.arange(length, device=device) // 4)[None]
    copies = (torch.arange(length, device=device) >= length // 2).long()
    mask = PackedMask(ranks, copies, torch.ones(1, length, dtype=torch.bool, device=device))
    query, key, value = states
    scores = (query @ key.transpose(2, 3) / size**0.5).masked_fill(~mask.dense(), -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    found = kernel(mask, query, key, value)
    weights = torch.randn(expected.shape, generator=generator).to(device)
    gradients = [torch.autograd.grad((one * weights).sum(), states) for one in (found, expected)]
    pairs = [(found.detach(), expected.detach()), *zip(*gradients, strict=True)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
