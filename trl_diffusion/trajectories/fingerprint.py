"""Fingerprints of the weights and of the tokenizer that generated the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def fingerprint_policy(model: nn.Module | str | Path, subfolder: str = "", **source: Any) -> str | None:
    """
    A fingerprint of a policy's weights.

    It does not depend on the names of the parameters, on whether tied parameters are stored twice, or on whether a
    half-precision checkpoint was loaded in float32. A policy therefore has the same fingerprint as the checkpoint it was
    loaded from, in any of a family's formats. A LoRA adapter changes the fingerprint, unless it is new and has no effect
    yet.

    Args:
        model (`nn.Module`, `str` or `Path`): a model, or the directory or hub id of a checkpoint in safetensors format.
        subfolder (`str`, *optional*): the folder of the checkpoint there.
        source: `revision`, `cache_dir`, `token` and `local_files_only` with which a checkpoint is fetched from the hub.

    Returns:
        32 hexadecimal digits, or `None` for a checkpoint without safetensors files.
    """
    if isinstance(model, nn.Module):
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        fresh = not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
        digests = {_digest(tensor) for name, tensor in tensors.items() if not (fresh and "lora_" in name)}
    else:
        files = _weight_files(str(model), subfolder, source)
        if not files:
            return None
        digests = {_digest(tensor) for file in files for tensor in _tensors(file)}
    return xxhash.xxh3_128_hexdigest("".join(sorted(digests)).encode())


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of the vocabulary, that is, of the token of each id: 32 hexadecimal digits."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return xxhash.xxh3_128_hexdigest(repr(vocabulary).encode())


def _digest(tensor: Tensor) -> str:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()  # exact
    tensor = tensor.contiguous().cpu()
    content = xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"{tuple(tensor.shape)}{content}"


def _tensors(file: Path):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        for name in content.keys():  # noqa: SIM118  (not a mapping)
            yield content.get_tensor(name)


def _weight_files(path: str, subfolder: str, source: dict[str, Any]) -> list[Path]:
    directory = Path(path)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        pattern = f"{subfolder}/*.safetensors" if subfolder else "*.safetensors"
        directory = Path(snapshot_download(path, allow_patterns=[pattern], **source))
    files = (directory / subfolder).glob("*.safetensors")
    return sorted(file for file in files if not file.name.startswith("adapter_"))
