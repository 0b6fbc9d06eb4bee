"""Whether the files of a checkpoint are whole, before any of them is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from ..utils import read_record


LFS_POINTER = b"version https://git-lfs.github.com/spec"
# The files of transformers and peft that hold an object.
RECORDS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "adapter_config.json",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
MODELS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_AGAIN = "Fetch it again."


def check_records(path: str | Path) -> None:
    """
    Checks the JSON files of a checkpoint in a directory. One on the hub has been checked by its client.

    Args:
        path (`str` or `Path`): directory, or hub id.

    Raises:
        ValueError: naming the file, if it is a pointer of Git LFS, or no JSON object.
    """
    for name in RECORDS:
        file = Path(path, name)
        if file.is_file():
            _check_content(file)
            read_record(file, advice=_AGAIN)


def check_weights(path: str | Path) -> None:
    """
    Checks the files of the weights in the directory of a checkpoint or an adapter. Headers are read, and no weights.

    Args:
        path (`str` or `Path`): directory, or hub id.

    Raises:
        ValueError: naming the file, if it is a pointer of Git LFS, empty, cut off or damaged, or if a part of the weights
            is missing.
    """
    directory = Path(path)
    names = [name for name in (*MODELS, *ADAPTERS) if not name.endswith(".json")]
    index = directory / INDEX
    if index.is_file():
        _check_content(index)
        parts = read_record(index, ("weight_map",), _AGAIN)["weight_map"]
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError(f"{index}: `weight_map` must name a file for each weight. {_AGAIN}")
        missing = sorted({part for part in parts.values() if not (directory / part).is_file()})
        if missing:
            raise ValueError(f"{index} names {missing}, which {directory} does not have. Fetch them.")
        names = sorted(set(parts.values()))
    for name in names:
        file = directory / name
        if file.is_file():
            _check_content(file)
            if file.suffix == ".safetensors":
                _check_safetensors(file)


def check_one_policy(directory: str | Path, adapter: bool) -> None:
    """
    Checks that a policy can be saved in a directory. An adapter and a whole model side by side would be opened as one policy,
    which nobody has trained.

    Args:
        directory (`str` or `Path`): the directory, which may not exist.
        adapter (`bool`): whether an adapter will be saved, and not a whole model.

    Raises:
        ValueError: if the directory holds the other kind.
    """
    whole = [*MODELS, *(path.name for path in sorted(Path(directory).glob("model-*-of-*.safetensors")))]
    found = [name for name in (whole if adapter else ADAPTERS) if Path(directory, name).exists()]
    if found:
        kinds = ("a whole model", "an adapter")
        raise ValueError(
            f"{directory} holds {kinds[not adapter]} ({found[0]}), and this run would save {kinds[adapter]} beside it. Set "
            "another `output_dir`, or remove what is there."
        )


def check_no_pointer(file: str | Path) -> None:
    """Raises a `ValueError` that names the file if it is a pointer of Git LFS, which stands for the file."""
    with Path(file).open("rb") as content:
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`.")


def _check_content(file: Path) -> None:
    check_no_pointer(file)
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty. {_AGAIN}")


def _check_safetensors(file: Path) -> None:
    """Compares the size of a file with what its header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("it has no header, or is cut off inside")
            header = json.loads(content.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (OSError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no weights in the format of safetensors ({error}). {_AGAIN}") from error
    if size != wanted:
        raise ValueError(f"{file} has {size} bytes, and its header says {wanted}: it is cut off or damaged. {_AGAIN}")
